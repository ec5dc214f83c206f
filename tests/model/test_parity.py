"""Every family on real Megatron over gloo: logits equal transformers' at every layout; round trips are bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hapo.config import ParallelSizes
from tests.distributed import run_ranks
from tests.tiny_families import FAMILIES, VOCAB_SIZE, expected_tensors, write_family

_PAIRS = [{"tp": 2}, {"pp": 2}]
_CHUNKS: dict[str, list[dict[str, int]]] = {
    "qwen3": [{"pp": 2, "vpp": 2}, {"pp": 2, "first_stage_layers": 3}],
    "qwen3_moe_mixed": [{"pp": 2, "vpp": 2}],
}
_EXPERTS_4 = [{"tp": 2, "ep": 2}, {"tp": 2, "ep": 4}, {"pp": 2, "ep": 2}, {"tp": 2, "etp": 2, "ep": 2}]
LAYOUTS: dict[int, dict[str, list[dict[str, int]]]] = {
    1: {case: [{}] for case in FAMILIES},
    2: {
        case: [
            *_PAIRS,
            *([{"ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}] if "moe" in case else []),
            *_CHUNKS.get(case, []),
        ]
        for case in FAMILIES
    },
    4: {
        case: [
            {"tp": 2, "pp": 2},
            *(_EXPERTS_4 if case == "qwen3_moe" else []),
        ]
        for case in FAMILIES
    },
}


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (17, 40, 5)]


def through_megatron(rank: int, folder: Path, cases: dict[str, list[dict[str, int]]]) -> list[dict[str, Any]]:
    """One rank's results of each case and layout: float32 logits, and the tensors that it owns in bfloat16."""
    from megatron.core import parallel_state

    from megatron_hapo.checkpoint.hf_weights import load_hf_weights, owned_tensors
    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model
    from megatron_hapo.model.families import is_hf_expert, read_shape
    from megatron_hapo.model.forward import sequence_logits

    seen = []
    for case, layouts in cases.items():
        for sizes in layouts:
            layout = parallel_layout.initialize(
                ParallelSizes.for_world(torch.distributed.get_world_size(), **sizes),
                device=torch.device("cpu"),
                seed=0,
                timeout_seconds=60,
            )
            shape = read_shape(folder / case)
            model = build_model(shape, layout, dtype=torch.float32)
            load_hf_weights(model, shape, layout, folder / case)
            logits = sequence_logits(model, shape, layout, sequences())
            model = build_model(shape, layout, dtype=torch.bfloat16)
            load_hf_weights(model, shape, layout, folder / f"{case}_bf16")
            tensors = [(name, value.clone()) for name, value in owned_tensors(model, shape, layout)]
            # A rank whose consumer has not reached its experts yet must not hold up what others gather.
            experts = [is_hf_expert(name) for name, _ in tensors]
            assert experts == sorted(experts)
            seen.append(
                {
                    "logits": logits and torch.cat(logits).numpy(),
                    "tensors": {name: _bits(value) for name, value in tensors},
                    "count": len(tensors),
                }
            )
            parallel_state.destroy_model_parallel()
    return seen


def _bits(value: torch.Tensor) -> Any:
    return value.view(torch.int16).numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for case in FAMILIES:
        write_family(folder / case, case)
        write_family(folder / f"{case}_bf16", case, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def reference(models: Path) -> dict[str, Any]:
    """transformers' logits of each case."""
    from transformers import AutoModelForCausalLM

    logits = {}
    for case in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(models / case, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits[case] = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in sequences()])
    return logits


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_equal_transformers_and_round_trips_are_bitwise(
    models: Path, reference: dict[str, Any], world_size: int
) -> None:
    cases = LAYOUTS[world_size]
    ranks = run_ranks(world_size, through_megatron, models, cases, timeout_seconds=240)
    views = zip(*ranks, strict=True)
    for case, layouts in cases.items():
        want = {name: _bits(value) for name, value in expected_tensors(models / f"{case}_bf16", case).items()}
        for sizes, view in zip(layouts, views, strict=False):
            logits = next(part["logits"] for part in view if part["logits"] is not None)
            worst = float((torch.from_numpy(logits) - reference[case]).abs().max())
            assert worst < 1e-5, f"{case} {sizes}: logits differ by {worst}"
            got = {name: value for part in view for name, value in part["tensors"].items()}
            assert got.keys() == want.keys(), f"{case} {sizes}: {got.keys() ^ want.keys()}"
            assert sum(part["count"] for part in view) == len(want), f"{case} {sizes}: a tensor came twice"
            for name, value in want.items():
                assert (got[name] == value).all(), f"{case} {sizes}: {name} is not what was read"
