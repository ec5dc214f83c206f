"""Quantization-aware training on real ranks: forward pass and exports use float8 values, the optimizer exact ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hapo.config import Config
from megatron_hapo.types import merge_scores
from tests.distributed import run_ranks
from tests.tiny_families import expected_tensors, write_family
from tests.trainer.test_trainer import make_batch, make_config, make_grid

CASES = {"qwen3": {"tp": 2}, "qwen3_moe": {"tp": 2, "ep": 2}, "qwen3_moe_mixed": {"tp": 2, "etp": 2}}


def make_quantized_config(model: Path, layout: dict[str, Any]) -> Config:
    values = make_config(model, layout).model_dump()
    values["trainer"] |= {"dtype": "bfloat16", "quantization": "fp8"}
    return Config.model_validate(values)


def train_one_step(rank: int, folder: Path) -> None:
    """One update of each case; saves the weights that engines get, and the master weights, before and after it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo.checkpoint.hf_weights import hf_tensors
    from megatron_hapo.model.fake_quantization import round_to_float8
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    for case, layout in CASES.items():
        config = make_quantized_config(folder / case, layout)
        trainer = TrainerRank(config, make_grid(config))

        def whole(masters: bool, trainer: Any = trainer) -> dict[str, Tensor]:
            """Whole HF tensors of this rank's stage: the weights, or the optimizer's master weights."""
            (chunk,) = trainer.model
            shown = {name: p.main_param.view(p.shape) if masters else p for name, p in chunk.named_parameters()}
            model: Any = SimpleNamespace(named_parameters=shown.items, config=chunk.config, vp_stage=None)
            return {name: tensor.clone() for name, tensor in hf_tensors([model], trainer.shape, trainer.layout)}

        states = {"start": (whole(masters=False), whole(masters=True))}
        round_to_float8(trainer.model, trainer.layout)
        states["again"] = (whole(masters=False), whole(masters=True))
        batch = make_batch()
        scores: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(scores, trainer.log_probs(batch))
        merged = merge_scores(scores, batch)
        no_modulation = {"modulation": np.zeros_like(merged.log_probs)}
        scored = replace(batch, old_log_probs=merged.log_probs, token_data=no_modulation)
        metrics = trainer.update(scored, step=1)
        assert metrics is not None
        assert metrics["grad_norm"] > 0
        states["end"] = (whole(masters=False), whole(masters=True))
        checkpoint = folder / f"{case}_checkpoint"
        if rank == 0:
            checkpoint.mkdir()
        dist.barrier()
        trainer.save_checkpoint(checkpoint)
        trainer.update(scored, step=2)
        trainer.load_checkpoint(checkpoint)
        states["resumed"] = (whole(masters=False), whole(masters=True))
        torch.save(states, folder / f"{case}_{rank}.pt")
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[dict, dict]]]:
    """The whole model's weights and master weights, by case and moment."""
    folder = tmp_path_factory.mktemp("quantization_aware")
    for case in CASES:
        write_family(folder / case, case, dtype="bfloat16")
    run_ranks(2, train_one_step, folder, timeout_seconds=240)
    merged: dict[str, Any] = {}
    for case in CASES:
        ranks = [torch.load(folder / f"{case}_{rank}.pt") for rank in range(2)]
        merged[case] = {
            moment: tuple({k: v for rank in ranks for k, v in rank[moment][part].items()} for part in range(2))
            for moment in ranks[0]
        }
        merged[case]["original"] = expected_tensors(folder / case, case)
    return merged


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bfloat16 weights that these master weights imply, computed on whole HF tensors."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        stack = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        if kind.endswith("_proj"):
            groups.setdefault(f"{stem}.{stack.get(kind, kind)}", []).append(name)
    result = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    for names in groups.values():
        scale = max(result[name].abs().max().float() for name in names) / 448
        for name in names:
            result[name] = ((result[name].float() / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
    return result


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_engines_get_rounded_weights_and_the_optimizer_exact_ones(states: dict[str, Any], case: str) -> None:
    original = states[case]["original"]
    for moment in ("start", "again", "end", "resumed"):
        weights, masters = states[case][moment]
        assert_equal(weights, rounded(masters))
        if moment in ("start", "again"):
            assert_equal(masters, {name: value.float() for name, value in original.items()})
    weights, masters = states[case]["end"]
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(masters[name], original[name].float())
    assert len(weights[name].float().unique()) < 256 < len(masters[name].unique())
    assert_equal(states[case]["resumed"][0], weights)
    assert_equal(states[case]["resumed"][1], masters)
