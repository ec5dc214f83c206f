"""The experts that an engine returns are those of transformers' routers with the weights that sampled each token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.model.families import read_model_config, shape_of
from megatron_hapo.types import Rollout, RouteFormat, Sampling
from tests.sglang_ext.engine_process import RemoteEngine, running_engine
from tests.sglang_ext.test_engine import advance_until, load, load_reference, make_prompts
from tests.tiny_families import expected_tensors, write_family

EXPERTS = {"num_experts": 8, "num_hidden_layers": 3}
SAMPLING = Sampling(samples=3, temperature=1.0, max_response_tokens=24, seed=1, keep_routes=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of the same sizes with different weights."""
    folder = tmp_path_factory.mktemp("routes")
    old = write_family(folder / "old", "qwen3_moe", **EXPERTS)
    new = write_family(folder / "new", "qwen3_moe", **EXPERTS, initializer_range=0.12)
    return old, new


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path]) -> Iterator[RemoteEngine]:
    # Fewer cache tokens than the requests need, so that some are retracted and computed anew.
    with running_engine(folders[0], kv_cache_tokens=1024, context_tokens=256, returns_routes=True) as running:
        yield running


def routes_by(model: Any, rollout: Rollout) -> np.ndarray:
    """The experts that this model of transformers chooses, sorted. [positions, layers, top_k]"""
    gates = [module.gate for module in model.modules() if type(module).__name__ == "Qwen3MoeSparseMoeBlock"]
    seen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda _gate, _args, output: seen.append(output[2])) for gate in gates]
    tokens = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
    with torch.no_grad():
        model(torch.from_numpy(tokens).long()[None])
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack(seen, 1).numpy()[:-1], -1)


def agreement(routes: np.ndarray, expected: np.ndarray) -> float:
    assert routes.shape == expected.shape
    return float((np.sort(routes, -1) == expected).all(-1).mean()) if routes.size else 1.0


def test_experts_are_those_of_the_model(engine: RemoteEngine, folders: tuple[Path, Path]) -> None:
    model = load_reference(folders[0])
    # Together they need more than the cache holds.
    groups = engine.generate(make_prompts(12), replace(SAMPLING, max_response_tokens=60))
    for rollout in (rollout for group in groups for rollout in group):
        assert rollout.routes is not None
        assert rollout.routes.dtype == np.uint8
        assert rollout.routes.shape == (8 + len(rollout.response_ids) - 1, 3, 2)
        # Float32 rounds differently here and there, which a close choice shows.
        assert agreement(rollout.routes, routes_by(model, rollout)) > 0.98
    [[rollout]] = engine.generate(make_prompts(1), replace(SAMPLING, samples=1, keep_routes=False))
    assert rollout.routes is None


def test_tokens_of_a_paused_response_keep_the_experts_of_their_weights(
    engine: RemoteEngine, folders: tuple[Path, Path]
) -> None:
    """The prefix is computed anew with the new weights, whose experts are those of later tokens alone."""
    old, new = (load_reference(folder) for folder in folders)
    sampling = replace(SAMPLING, samples=4, max_response_tokens=150, stop_token_ids=(7, 77, 177))
    rollouts: dict[tuple[int, int], Rollout] = {}
    advance_until(engine, rollouts, 1, sampling, prompts=make_prompts(6))
    time.sleep(0.2)
    engine.begin_weight_update("pause")
    load(engine, expected_tensors(folders[1], "qwen3_moe"))
    engine.end_weight_update(1)
    engine.resume()
    advance_until(engine, rollouts, 24, sampling)
    mixed = [rollout for rollout in rollouts.values() if len(set(rollout.policy_versions.tolist())) == 2]
    assert mixed
    for rollout in mixed:
        assert rollout.routes is not None
        start = len(rollout.prompt.token_ids) - 1
        # A position's experts are those that sampled its next token; those of the prompt, the first one's.
        switch = start + int(np.searchsorted(rollout.policy_versions, 1))
        by_old, by_new = (routes_by(model, rollout) for model in (old, new))
        assert agreement(rollout.routes[:switch], by_old[:switch]) > 0.98
        assert agreement(rollout.routes[switch:], by_new[switch:]) > 0.98
        assert agreement(by_old[:switch], by_new[:switch]) < 0.9, "the models choose the same experts"
    load_back(engine, folders[0])


def load_back(engine: RemoteEngine, folder: Path) -> None:
    engine.begin_weight_update()
    load(engine, expected_tensors(folder, "qwen3_moe"))
    engine.end_weight_update(0)


def test_the_format_says_what_a_token_costs() -> None:
    """Qwen3-30B-A3B and Qwen3-235B-A22B: one byte for each of 8 experts in 48 and 94 layers."""
    fixtures = Path(__file__).parents[1] / "fixtures" / "hf_configs"
    for name, expected in (("Qwen--Qwen3-30B-A3B", 384), ("Qwen--Qwen3-235B-A22B", 752)):
        routes = shape_of(read_model_config(fixtures / f"{name}.json")).routes
        assert routes is not None
        assert routes.bytes_per_token == expected
    many = RouteFormat(num_layers=2, expert_layers=(1,), num_experts=256, top_k=4)
    assert many.bytes_per_token == 8  # 255 marks an unknown expert, so that 256 experts need two bytes
