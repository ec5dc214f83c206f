"""The family tables at the sizes of real models, without their weights: names, shapes, every element exactly once."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import (
    Shape,
    fused_expert,
    hf_tensor_shapes,
    is_expert,
    num_parameters,
    placement,
    read_shape,
)
from tests.time_limits import patient

CONFIGS = Path(__file__).parent / "fixtures" / "hf_configs"


@dataclass(frozen=True)
class Layout:
    """A training layout of a model.

    `parameters` is their number according to the metadata of the published checkpoint.
    """

    parameters: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


MODELS = {
    "Qwen2.5-Math-1.5B": Layout(1_543_714_304, tp=2),
    "Qwen2.5-Math-7B": Layout(7_615_616_512, tp=4),
    "Llama-3.1-8B": Layout(8_030_261_248, tp=2, pp=2),
    "Llama-3.1-70B": Layout(70_553_706_496, tp=8, pp=4),
    "Qwen3-8B": Layout(8_190_735_360, tp=4),
    "Qwen3-14B": Layout(14_768_307_200, tp=4, pp=2),
    "Qwen3-32B": Layout(32_762_123_264, tp=8, pp=2),
    "Qwen3-30B-A3B": Layout(30_532_122_624, tp=4, ep=8, dp=2),
    "Qwen3-235B-A22B": Layout(235_093_634_560, tp=4, pp=2, ep=32, dp=8),
}


@pytest.fixture
def shape_of(tmp_path: Path):
    def read(model: str) -> Shape:
        (path,) = CONFIGS.glob(f"*--{model}.json")
        shutil.copy(path, tmp_path / "config.json")
        return read_shape(tmp_path)

    return read


@pytest.mark.parametrize("model", MODELS)
def test_the_table_has_the_names_and_shapes_of_transformers(model: str, shape_of: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = shape_of(model)
    assert num_parameters(shape) == MODELS[model].parameters
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    if shape.tied_embeddings:
        del expected["lm_head.weight"]
    table = hf_tensor_shapes(shape)
    # transformers stacks the experts in memory
    fused = {name: fused_expert(name, shape) for name in table}
    stacked = {fuse.tensor: fuse.shape for fuse in fused.values() if fuse}
    assert {name: size for name, size in table.items() if not fused[name]} | stacked == expected


Parameters = dict[str, tuple[int, ...]]


def megatron_shapes(folder: Path, world_size: int, sizes: dict[str, int]) -> tuple[list[Parameters], list[float]]:
    """Names and shapes of the first and the last rank's parameters, and the rotary frequencies.

    Uses torch's fake process group: no other rank of the world exists.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_hapo.model import megatron_on_cpu

    megatron_on_cpu.install()
    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model

    seen, frequencies = [], []
    for rank in (0, world_size - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        layout = parallel_layout.initialize(
            ParallelSizes.for_world(world_size, **sizes),
            device=torch.device("cpu"),
            seed=0,
            timeout_seconds=patient(60),
        )
        (model,) = build_model(read_shape(folder), layout, dtype=torch.bfloat16)
        seen.append({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        frequencies = model.rotary_pos_emb.inv_freq.tolist()
        del model
        parallel_layout.shutdown()
    return seen, frequencies


@pytest.fixture(scope="module")
def fake_world():
    """One process for all models, so that Megatron is imported only once."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("model", MODELS)
def test_every_element_of_a_large_model_is_placed_exactly_once(
    model: str, shape_of: Any, tmp_path: Path, fake_world: ProcessPoolExecutor
) -> None:
    shape, layout = shape_of(model), MODELS[model]
    sizes = {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
    (first, last), frequencies = fake_world.submit(megatron_shapes, tmp_path, layout.world_size, sizes).result(
        timeout=patient(300)
    )
    assert frequencies == pytest.approx(rotary_frequencies(tmp_path), rel=1e-6)
    layers_of_stage = shape.num_layers // layout.pp
    in_layer = re.compile(r"decoder\.layers\.")
    runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    whole: dict[str, int] = defaultdict(int)
    for stage in range(layout.pp):
        local = {name: size for name, size in first.items() if in_layer.match(name)}
        local |= first if stage == 0 else {}
        local |= last if stage == layout.pp - 1 else {}
        for name, size in local.items():
            if name == "output_layer.weight" and shape.tied_embeddings:
                continue
            for rank in range(layout.ep if is_expert(name) else layout.tp):
                place = placement(
                    name, shape, first_layer=stage * layers_of_stage, tp_rank=0 if is_expert(name) else rank,
                    tp_size=layout.tp, ep_rank=rank if is_expert(name) else 0, ep_size=layout.ep,
                )  # fmt: skip
                if place.axis is None:
                    assert hf_tensor_shapes_of(shape)[place.runs[0].tensor] == size, name
                    whole[place.runs[0].tensor] += rank == 0
                    continue
                assert sum(run.stop - run.start for run in place.runs) <= size[place.axis], name
                for run in place.runs:
                    want = hf_tensor_shapes_of(shape)[run.tensor]
                    assert len(want) == len(size), name
                    assert want[1 - place.axis :][:1] == size[1 - place.axis :][:1] or len(size) == 1, name
                    runs[run.tensor].append((run.start, run.stop))
                    whole[run.tensor] = place.axis
    for name, size in hf_tensor_shapes_of(shape).items():
        if name not in runs:
            assert whole.get(name) == 1, f"{name} is placed {whole.get(name, 0)} times"
            continue
        end = 0
        for start, stop in sorted(runs[name]):
            assert start == end, f"{name}: {start} follows {end}"
            end = stop
        assert end == size[whole[name]], name


def rotary_frequencies(folder: Path) -> list[float]:
    """The frequencies that transformers computes, with llama3 scaling where the config asks for it."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq.tolist()


_SHAPES: dict[Shape, dict[str, tuple[int, ...]]] = {}


def hf_tensor_shapes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """hf_tensor_shapes, cached."""
    if shape not in _SHAPES:
        _SHAPES[shape] = hf_tensor_shapes(shape)
    return _SHAPES[shape]
