"""Faults of a model folder are reported in one line each, and slices are read as views where possible."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.mapped_file import MappedFile
from megatron_hapo.checkpoint.model_folder import INDEX
from megatron_hapo.checkpoint.safetensors_header import shape_faults
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import Placement, Run, hf_tensor_shapes, read_shape
from tests.tiny_families import STACKED, expected_tensors, write_family

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The tensors of a sound folder, and its config under the key 'config'."""
    folder = write_family(tmp_path_factory.mktemp("sound"), "llama3")
    return {"folder": folder, **load_file(folder / "model.safetensors")}  # type: ignore[dict-item]


@pytest.fixture
def sharded(sound: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The same model in two files with an index."""
    tensors = {name: value for name, value in sound.items() if name != "folder"}
    (tmp_path / "config.json").write_text((Path(str(sound["folder"])) / "config.json").read_text())
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read_everything(folder: Path) -> dict[str, torch.Tensor]:
    shape = read_shape(folder)
    reader = HfReader(folder, shape)
    return {name: reader.read(Placement(None, (Run(name, 0, -1),))) for name in hf_tensor_shapes(shape)}


def change_file(folder: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor in its file, or remove it if `change` returns None."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    changed = change(tensors.pop(tensor))
    save_file(tensors if changed is None else {**tensors, tensor: changed}, path)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, r"cannot read .*model-1\.safetensors \(incomplete download or copy\?\)"),
    "missing shard": (
        lambda f: (f / "model-0.safetensors").unlink(),
        r"names model-0\.safetensors, which is missing",
    ),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "is not an index of safetensors files"),
    "wrong shape": (
        lambda f: change_file(f, Q_PROJ, lambda t: t[:-1].clone()),
        rf"{Q_PROJ} has shape \(47, 48\), but config\.json implies \(48, 48\)",
    ),
    "wrong dtype": (
        lambda f: change_file(f, Q_PROJ, lambda t: t.to(torch.int32)),
        rf"{Q_PROJ} has dtype I32; supported: F32, BF16, F16",
    ),
    "tensor in no file": (lambda f: change_index(f, lambda m: m.pop(Q_PROJ)), f"has no tensor {Q_PROJ}"),
    "tensor not where the index says": (lambda f: change_file(f, Q_PROJ, lambda t: None), f"says that {Q_PROJ} is in"),
    "tensor that the model does not have": (
        lambda f: change_index(f, lambda m: m.update({"model.layers.0.self_attn.q_proj.bias": "model-0.safetensors"})),
        r"has model\.layers\.0\.self_attn\.q_proj\.bias, which a llama model does not have",
    ),
    "no weights": (
        lambda f: (f / INDEX).unlink(),
        "contains neither model.safetensors.index.json nor model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_folder_is_reported_in_one_line(sharded: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(sharded)
    with pytest.raises(ConfigError, match=message) as raised:
        read_everything(sharded)
    assert len(raised.value.faults) == 1
    assert "\n" not in str(raised.value)


def test_a_sound_folder_is_read_completely(sharded: Path, sound: dict[str, torch.Tensor]) -> None:
    for name, value in read_everything(sharded).items():
        assert torch.equal(value, sound[name]), name


def test_stacked_experts_are_read_one_by_one_in_slices(tmp_path: Path) -> None:
    folder = write_family(tmp_path, STACKED)
    want = expected_tensors(folder, STACKED)
    for name, value in read_everything(folder).items():
        assert torch.equal(value, want[name]), name
    reader = HfReader(folder, read_shape(folder))
    for kind, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.0.mlp.experts.3.{kind}_proj.weight"
        part = reader.read(Placement(axis, (Run(name, 5, 11),)))
        assert torch.equal(part, want[name].narrow(axis, 5, 6)), name


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    os.truncate(path, size)
    values = MappedFile(path).tensor(size - 7, torch.bfloat16, 3)
    assert values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("start", "adjacent"), [(0, True), (3, False)], ids=["whole", "rows"])
def test_contiguous_runs_are_a_view_and_others_are_concatenated(
    sound: dict[str, torch.Tensor], sharded: Path, start: int, adjacent: bool
) -> None:
    """One folder stores gate and up projection one after the other; the other stores them in two files."""
    folder = Path(str(sound["folder"]))
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    place = Placement(0, (Run(gate, start, len(sound[gate])), Run(up, start, len(sound[up]))))
    want = torch.cat([sound[gate][start:], sound[up][start:]])
    reader = HfReader(folder, read_shape(folder))
    value = reader.read(place)
    assert torch.equal(value, want)
    assert torch.equal(HfReader(sharded, read_shape(sharded)).read(place), want)
    first = reader.read(Placement(0, place.runs[:1]))
    assert (value.data_ptr() == first.data_ptr()) == adjacent
    value.zero_()
    assert torch.equal(HfReader(folder, read_shape(folder)).read(place), want), "the file has changed"


@pytest.mark.parametrize("family", ["qwen3", STACKED])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_config_of_other_sizes_than_the_weights_is_found_in_their_headers(
    family: str, key: str, tmp_path: Path
) -> None:
    folder = write_family(tmp_path, family)
    assert shape_faults(folder, read_shape(folder)) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 2 * config[key]}))
    (fault, *_) = shape_faults(folder, read_shape(folder))
    assert fault.startswith(f"{folder}/model")
    assert re.search(r"has shape \(.*\), but config.json implies \(.*\)", fault)
    assert str(2 * config[key]) in fault.partition("implies")[2]


def test_files_without_a_header_are_left_to_the_reader(sharded: Path) -> None:
    (sharded / "model-0.safetensors").write_bytes(b"\xff" * 64)
    (sharded / "model-1.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]")
    assert shape_faults(sharded, read_shape(sharded)) == []
