"""`megatron-hapo convert`: bitwise round trips over different layouts, atomic folders, one-line errors."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_hapo import cli
from megatron_hapo.checkpoint.manifest import MANIFEST
from megatron_hapo.checkpoint.model_folder import INDEX, atomic_folder, is_megatron_folder
from megatron_hapo.checkpoint.torch_dist_metadata import read_metadata
from tests.time_limits import patient
from tests.tiny_families import expected_tensors, write_family


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("moe") / "hf", "qwen3_moe", dtype="bfloat16", tokenizer=True)


@pytest.fixture(scope="module")
def megatron(moe: Path) -> Path:
    """The model as a Megatron checkpoint, written by two ranks."""
    target = moe.parent / "megatron"
    assert cli.main(["convert", "hf-to-megatron", str(moe), str(target), "--tp", "2", "--ep", "2"]) == 0
    return target


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, each from the file that the index names."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sum(len(tensors) for tensors in files.values()) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def test_a_round_trip_over_another_layout_is_bitwise(moe: Path, megatron: Path, capfd: pytest.CaptureFixture) -> None:
    """The vocabulary size is odd, so the first layout pads it; that padding must not reach the second."""
    assert is_megatron_folder(megatron)
    back = megatron.parent / "back"
    arguments = ["convert", "megatron-to-hf", str(megatron), str(back), "--pp", "2", "--verify"]
    assert cli.main(arguments) == 0, capfd.readouterr().err
    difference = capfd.readouterr().out.split("largest difference of logits (float32, 56 tokens): ")[1].split()[0]
    assert float(difference) < 1e-5
    tensors, want = read_folder(back), expected_tensors(moe, "qwen3_moe")
    assert tensors.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(tensors[name], value), name
    assert {path.name for path in moe.iterdir() if path.suffix != ".safetensors"} <= {p.name for p in back.iterdir()}
    assert not list(megatron.parent.glob("*.partial"))


@pytest.mark.slow
def test_torchrun_converts_and_verifies_in_another_dtype(megatron: Path) -> None:
    back = megatron.parent / "float32"
    tool = Path(__file__).parents[2] / "tools" / "convert_megatron_to_hf.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(tool)]
    arguments = [str(megatron), str(back), "--ep", "2", "--dtype", "float32", "--verify"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=patient(300))
    assert done.returncode == 0, done.stderr
    assert {str(value.dtype) for value in read_folder(back).values()} == {"torch.float32"}
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_faults_are_reported_together_and_nothing_is_written(
    moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, direction: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    arguments = ["convert", direction, str(moe), str(full), "--tp", "4", "--ep", "3"]
    assert cli.main(arguments) == cli.EXIT_FAULT
    error = capsys.readouterr().err
    assert "--tp: 6 attention heads do not split over tp=4\n" in error
    assert "--ep: 4 experts do not split over ep=3\n" in error
    assert f"{full}: exists and is not empty; choose another folder or remove it\n" in error
    assert ("is not a Megatron checkpoint (torch_dist)" in error) == (direction == "megatron-to-hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


@pytest.mark.parametrize("source", ["none", "gpt2"])
def test_an_unsupported_source_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture, source: str) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(["convert", "hf-to-megatron", str(tmp_path / source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    error = capsys.readouterr().err
    assert ("no such folder" if source == "none" else "model_type 'gpt2' is not supported") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_disk_space_is_reported_before_the_start(
    moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert cli.main(["convert", "hf-to-megatron", str(moe), str(tmp_path / "out")]) == cli.EXIT_FAULT
    assert "needs 0.0 GB, 0.0 GB are free on its disk" in capsys.readouterr().err


@pytest.fixture
def disk_with_little_space() -> Iterator[None]:
    """Limits every file of this process and its children to 16 KiB, less than the weights need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_leaves_no_folder(
    moe: Path,
    megatron: Path,
    tmp_path: Path,
    direction: str,
    disk_with_little_space: None,
    capfd: pytest.CaptureFixture,
) -> None:
    source = moe if direction == "hf-to-megatron" else megatron
    assert cli.main(["convert", direction, str(source), str(tmp_path / "out"), "--tp", "2", "--ep", "2"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"out\.partial: cannot be written, \S+ GB are free on its disk: .", error)
    assert re.search(r": .*(File too large|a file could not be written completely)", error), "the reason is missing"
    assert "<class" not in error
    assert list(tmp_path.iterdir()) == []


def copy_without_manifest(source: Path, target: Path) -> Path:
    """A copy as if somebody else had written the folder: its checksums would reveal every change first."""
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST))


class Code:
    """An object whose unpickling creates a folder."""

    def __init__(self, parent: Path):
        self._parent = parent

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._parent / "it ran"),)


def test_metadata_that_would_run_code_is_rejected(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = copy_without_manifest(megatron, tmp_path / "source")
    (source / ".metadata").write_bytes(pickle.dumps(Code(tmp_path)))
    assert cli.main(["convert", "megatron-to-hf", str(source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    assert f"{source}/.metadata is not the metadata of a checkpoint, rejected: it names posix.mkdir" in (
        capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_objects_that_would_run_code_are_rejected(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """torch unpickles objects other than tensors without restrictions."""
    source = copy_without_manifest(megatron, tmp_path / "source")
    metadata = read_metadata(source)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("common_state"))
    content = io.BytesIO()
    torch.save([Code(tmp_path)], content)
    (source / "common.distcp").write_bytes(content.getvalue())
    metadata.storage_data[index] = _StorageInfo("common.distcp", 0, len(content.getvalue()))
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    assert cli.main(["convert", "megatron-to-hf", str(source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    assert re.fullmatch(
        rf"model\.path: {source}/common\.distcp: common_state.* is not a plain value, rejected: .*\n",
        capsys.readouterr().err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_of_another_model_is_reported_in_one_line(
    megatron: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = copy_without_manifest(megatron, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 8}))
    assert cli.main(["convert", "megatron-to-hf", str(source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"model.path: {source} does not hold the model of its config.json: "), error
    assert "shape mismatch" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_narrower_dtype_is_verified_against_rounded_weights(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = write_family(tmp_path / "hf", "qwen3", tokenizer=True)
    assert cli.main(["convert", "hf-to-megatron", str(source), str(tmp_path / "megatron")]) == 0
    arguments = [str(tmp_path / "megatron"), str(tmp_path / "back"), "--dtype", "bfloat16", "--verify"]
    assert cli.main(["convert", "megatron-to-hf", *arguments]) == 0, capfd.readouterr().err
    assert {value.dtype for value in read_folder(tmp_path / "back").values()} == {torch.bfloat16}


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_reported_in_one_line(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture, fault: str
) -> None:
    source = copy_without_manifest(megatron, tmp_path / "source")
    file = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    if fault == "truncated":
        os.truncate(file, size - 1)
    else:
        file.unlink()
    assert cli.main(["convert", "megatron-to-hf", str(source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    assert capsys.readouterr().err == (
        f"model.path: {file} is incomplete or missing; it had {size} bytes (incomplete download or copy?)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_fault_found_while_reading_leaves_no_folder(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in moe.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((moe / "model.safetensors").read_bytes()[:-100])
    assert cli.main(["convert", "hf-to-megatron", str(broken), str(tmp_path / "out")]) == cli.EXIT_FAULT
    error = capsys.readouterr().err
    assert "incomplete download or copy" in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    target = tmp_path / "target"
    partial = tmp_path / "target.partial"
    partial.mkdir()
    (partial / "left by a killed run").touch()

    def write(content: str, *, fails: bool) -> None:
        with atomic_folder(target) as folder:
            assert list(folder.iterdir()) == []
            (folder / "file").write_text(content)
            if fails:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", fails=True)
    assert list(tmp_path.iterdir()) == []
    write("first", fails=False)
    with pytest.raises(KeyboardInterrupt):
        write("second", fails=True)
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
