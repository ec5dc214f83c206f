"""A flipped bit in a folder that we wrote is refused, with the file named; weights of others must be plausible."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hapo import cli
from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.hub_hashes import hub_differences
from megatron_hapo.checkpoint.manifest import MANIFEST, check_manifest, damaged_files, hash_files, write_manifest
from megatron_hapo.checkpoint.model_folder import atomic_folder
from megatron_hapo.checkpoint.plausible import check_plausible
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import read_shape
from tests.distributed import run_ranks
from tests.tiny_families import write_family

FILES = {"model.safetensors": 3000, "run_state.json": 90, "deep/er/file": 10, ".metadata": 400, "empty": 0}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "written") as folder:
        for name, size in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(random.Random(name).randbytes(size))
    return tmp_path / "written"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_refused_with_the_file_named(written: Path) -> None:
    assert check_manifest(written)
    assert damaged_files(written) == []
    for name in [*FILES, MANIFEST]:
        size = (written / name).stat().st_size
        for bit in random.Random(0).sample(range(8 * size), min(8 * size, 60)):
            flip(written / name, bit)
            with pytest.raises(ConfigError) as refused:
                check_manifest(written)
            assert len(refused.value.faults) == 1, (name, bit)
            assert str(refused.value).startswith(f"{written / name}: "), (name, bit)
            flip(written / name, bit)
    assert check_manifest(written)


def test_missing_and_truncated_files_are_named_without_reading_the_others(written: Path) -> None:
    (written / "deep/er/file").unlink()
    (written / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError) as refused:
        check_manifest(written, quick=True)
    assert [fault.split(";")[0] for fault in refused.value.faults] == [
        f"{written}/deep/er/file: missing",
        f"{written}/model.safetensors: has 5 bytes, but was written with 3000 (incomplete copy?)",
    ]


def test_several_processes_can_share_the_files(written: Path) -> None:
    for name in FILES:
        if FILES[name]:
            flip(written / name, 5)
    parts = [damaged_files(written, share=share, num_shares=3) for share in range(3)]
    assert sorted(fault for part in parts for fault in part) == damaged_files(written)
    assert all(parts)


def test_hashes_of_other_processes_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"as written")
    known = hash_files(tmp_path, ["shard"])
    (tmp_path / "shard").write_bytes(b"as damagod")
    write_manifest(tmp_path, known)
    assert damaged_files(tmp_path)[0].startswith(f"{tmp_path / 'shard'}: its checksum differs")


def test_folders_of_others_have_no_manifest_and_no_faults(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    assert not check_manifest(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model-00000-00000.safetensors", "tokenizer.json", MANIFEST])
def test_convert_refuses_a_flipped_bit_in_an_export(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    source = shutil.copytree(exported, tmp_path / "source")
    flip(source / name, 8 * (source / name).stat().st_size - 100)
    assert cli.main(["convert", "hf-to-megatron", str(source), str(tmp_path / "out")]) == cli.EXIT_FAULT
    assert capsys.readouterr().err.startswith(f"{source / name}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `convert megatron-to-hf` writes it: one weight file, companions, manifest."""
    model = write_family(tmp_path_factory.mktemp("model") / "hf", "qwen3", dtype="bfloat16", tokenizer=True)
    (model / "model.safetensors").rename(model / "model-00000-00000.safetensors")
    tensors = load_file(model / "model-00000-00000.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00000-00000.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_manifest(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [(float("nan"), "contains NaN or infinity"), (float("-inf"), "contains NaN or infinity"), (0.0, "is all zero")],
)
def test_weights_that_cannot_be_right_are_refused(dtype: torch.dtype, spoil: float, message: str) -> None:
    weights = torch.randn(33, 65).to(dtype)
    check_plausible(weights, "a")
    check_plausible(torch.zeros(5, dtype=dtype), "a bias")
    if spoil == 0:
        weights.zero_()
    else:
        weights[17, 3] = spoil
    with pytest.raises(ConfigError, match=rf"^model\.path: a {message}: the file is damaged"):
        check_plausible(weights, "a")


def test_a_weight_with_a_flipped_exponent_bit_is_refused() -> None:
    weights = torch.randn(33, 65, dtype=torch.bfloat16) / 50
    for bit in (14, 13, 12):
        changed = weights.clone()
        changed.view(torch.int16)[3, 3] ^= 1 << bit
        if changed[3, 3].abs() > 1:  # the flip of a bit that is set makes the weight smaller instead
            with pytest.raises(ConfigError, match="a weight is at most 65504 in magnitude"):
                check_plausible(changed, "a")


def test_damaged_weights_of_others_are_named_with_their_file(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama3")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][2, 2] = 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reader = HfReader(folder, read_shape(folder))
    reader.check()
    with pytest.raises(ConfigError, match=rf"{folder}/model\.safetensors: {name} contains 1e\+30"):
        reader.check(values=True)


@pytest.mark.parametrize("layout", ["local-dir", "cache"])
def test_files_are_compared_with_the_hubs_hashes_beside_them(tmp_path: Path, layout: str) -> None:
    """`hf download --local-dir` records each file's etag; the Hub's cache names its blobs by it."""
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    contents = {"model.safetensors": b"weights" * 100, "config.json": b"{}"}
    for name, content in contents.items():
        is_large = name.endswith("safetensors")
        blob = b"blob %d\0" % len(content) + content
        etag = (hashlib.sha256(content) if is_large else hashlib.sha1(blob)).hexdigest()
        if layout == "cache":
            (tmp_path / "blobs").mkdir(exist_ok=True)
            (tmp_path / "blobs" / etag).write_bytes(content)
            (folder / name).symlink_to(f"../../blobs/{etag}")
        else:
            records = folder / ".cache" / "huggingface" / "download"
            records.mkdir(parents=True, exist_ok=True)
            (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{etag}\n1764000000.5\n")
            (folder / name).write_bytes(content)
    assert hub_differences(folder) == (2, [])
    flip(folder / "model.safetensors", 3)
    assert hub_differences(folder) == (2, [folder / "model.safetensors"])


def load_in_every_way(rank: int, folder: Path) -> str:
    from megatron_hapo.checkpoint.weights import load_weights
    from megatron_hapo.config import ParallelSizes
    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model

    sizes = ParallelSizes.for_world(2, tp=2)
    layout = parallel_layout.initialize(sizes, device=torch.device("cpu"), seed=0, timeout_seconds=60)
    shape = read_shape(folder)
    try:
        load_weights(build_model(shape, layout, dtype=torch.bfloat16), shape, layout, folder)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["damaged", "sound", "of others"])
def test_ranks_that_load_together_all_refuse_a_damaged_folder(exported: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    weights = folder / "model-00000-00000.safetensors"
    if kind == "damaged":
        flip(weights, 8 * weights.stat().st_size - 9)
    if kind == "of others":
        (folder / MANIFEST).unlink()
        tensors = load_file(weights)
        tensors["model.norm.weight"][:] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    for error in run_ranks(2, load_in_every_way, folder):
        if kind == "damaged":
            assert error.startswith(f"model.path: {weights}: its checksum differs")
        elif kind == "of others":
            assert error.startswith(f"model.path: {weights}: model.norm.weight contains NaN or infinity")
        else:
            assert error == ""
