"""Replayed experts: the scores of transformers with the same experts, and equal updates at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.model.families import read_shape
from megatron_hapo.types import RouteFormat, TrainBatch, merge_scores, unknown_route
from tests.distributed import run_ranks
from tests.tiny_families import write_family
from tests.trainer.test_trainer import (
    ADAM_EPS,
    TEMPERATURE,
    assert_close,
    first_report,
    make_batch,
    make_config,
    make_grid,
    update_with_gradients,
    weights_of,
    whole,
    with_everything,
)

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4}
MODELS = {"qwen3_moe": EXPERTS, "qwen3_moe_mixed": EXPERTS}
"""The second has a dense layer, and does not normalise the weights of the chosen experts."""
SINGLE: dict[str, Any] = {"tp": 1}
LAYOUTS: dict[int, dict[str, list[dict[str, Any]]]] = {
    1: {
        "qwen3_moe": [SINGLE, {"max_tokens": 10_000}, {"recompute": "selective"}, {"recompute": "full"}],
        "qwen3_moe_mixed": [SINGLE, {"recompute": "selective"}],
    },
    2: {
        "qwen3_moe": [
            # With a pipeline the forward passes of several micro-batches precede the first backward pass.
            {"pp": 2, "recompute": "selective"},
            {"pp": 2, "vpp": 2, "recompute": "full"},
            {"pp": 2, "vpp": 2, "recompute": "selective"},
            {"cp": 2},
            {"dp": 2, "ep": 2},
            {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
            {"tp": 2, "etp": 2, "sequence_parallel": True},
            {"tp": 2, "ep": 2, "sequence_parallel": True, "output_head": "fused"},
        ],
        "qwen3_moe_mixed": [{"pp": 2, "vpp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}],
    },
    4: {
        "qwen3_moe": [
            {"tp": 2, "cp": 2, "sequence_parallel": True},
            {"pp": 2, "dp": 2, "ep": 2, "recompute": "selective"},
        ]
    },
}


def make_routes(batch: TrainBatch, routes: RouteFormat) -> np.ndarray:
    """Different experts of each token and layer, at random; unknown at the end of each sequence."""
    generator = np.random.default_rng(3)
    scores = generator.random((len(batch.token_ids), len(routes.expert_layers), routes.num_experts))
    chosen = scores.argsort(-1)[..., : routes.top_k].astype(routes.dtype)
    chosen[np.cumsum(batch.sequence_lengths) - 1] = unknown_route(routes.dtype)
    return chosen


def train_on(rank: int, folder: Path, cases: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """One rank's results of each model and layout: scores with and without replay, and an update with it."""
    from megatron.core import parallel_state

    seen: dict[str, list[dict[str, Any]]] = {}
    for model, layouts in cases.items():
        for layout in layouts:
            seen.setdefault(model, []).append(train_once(folder / model, layout))
            parallel_state.destroy_model_parallel()
    return seen


def train_once(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    config = make_config(model, layout, eps=ADAM_EPS)
    trainer = TrainerRank(config, make_grid(config))
    batch = make_batch(shared_prompts=True)
    assert trainer.shape.routes is not None
    replayed = replace(batch, routes=make_routes(batch, trainer.shape.routes))

    def scores(of: TrainBatch) -> Any:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, trainer.log_probs(of))
        return merge_scores(parts, of)

    before, own = scores(replayed), scores(batch)
    agreement = trainer.route_agreement()
    assert trainer.route_agreement() == (0, 0)
    first, gradients = update_with_gradients(trainer, with_everything(replayed, own), step=1)
    return {
        "scores": before,
        "own": own,
        "agreement": agreement,
        "update": first,
        "gradients": gradients,
        "weights": weights_of(trainer),
        "after_own": scores(batch),  # no routes are left over from the update
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("routes")
    for model, sizes in MODELS.items():
        write_family(folder / model, model, **sizes)
    results = {
        world_size: run_ranks(world_size, train_on, folder, cases, timeout_seconds=400)
        for world_size, cases in LAYOUTS.items()
    }
    return {"folder": folder, "results": results}


def layouts_of(trained: dict[str, Any], model: str):
    for world_size, cases in LAYOUTS.items():
        for number, layout in enumerate(cases.get(model, [])):
            if layout != SINGLE:
                yield layout, [rank[model][number] for rank in trained["results"][world_size]]


def transformers_log_probs(folder: Path, batch: TrainBatch, routes: np.ndarray) -> np.ndarray:
    """The log-probs of transformers' model, whose routers are made to choose these experts where they are known."""
    import types

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gates = [module.gate for module in model.modules() if type(module).__name__ == "Qwen3MoeSparseMoeBlock"]
    assert len(gates) == routes.shape[1]
    current: dict[str, np.ndarray] = {}

    def forward(self: Any, hidden: torch.Tensor):
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        p = torch.softmax(logits, -1)
        given = torch.from_numpy(current["routes"][:, gates.index(self)].astype(np.int64))
        chosen = torch.where(given == unknown_route(routes.dtype), p.topk(self.top_k).indices, given)
        weights = p.gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, chosen

    for gate in gates:
        gate.forward = types.MethodType(forward, gate)
    log_probs, ends = [], np.cumsum(batch.sequence_lengths)
    for end, length, response in zip(ends, batch.sequence_lengths, batch.response_lengths, strict=True):
        current["routes"] = routes[end - length : end]
        tokens = torch.from_numpy(batch.token_ids[end - length : end].astype(np.int64))
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens[None]).logits[0, -response - 1 : -1] / TEMPERATURE, -1)
        log_probs.append(log_p.gather(1, tokens[-response:, None])[:, 0].numpy())
    return np.concatenate(log_probs)


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_transformers_with_the_same_experts(trained: dict[str, Any], model: str) -> None:
    batch, single = make_batch(shared_prompts=True), trained["results"][1][0][model][0]
    routes = read_shape(trained["folder"] / model).routes
    assert routes is not None
    expected = transformers_log_probs(trained["folder"] / model, batch, make_routes(batch, routes))
    np.testing.assert_allclose(single["scores"].log_probs, expected, atol=2e-5)
    assert np.abs(single["scores"].log_probs - single["own"].log_probs).mean() > 0.01, "replay changed nothing"


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_replays_the_same(trained: dict[str, Any], model: str) -> None:
    single = trained["results"][1][0][model][0]
    for layout, views in layouts_of(trained, model):
        for key in ("scores", "own"):
            want = single[key].log_probs
            np.testing.assert_allclose(views[0][key].log_probs, want, atol=1e-5, err_msg=f"{layout} {key}")
        assert first_report(views, "update") == pytest.approx(single["update"], rel=1e-5, abs=1e-7), layout
        assert_close(whole(views, "gradients"), single["gradients"], layout)
        assert_close(whole(views, "weights"), single["weights"], layout)
        # The routers choose again: weights that differ by rounding may choose other experts of a token.
        after = np.abs(views[0]["after_own"].log_probs - single["after_own"].log_probs)
        assert np.quantile(after, 0.9) < 1e-4, layout


@pytest.mark.parametrize("model", MODELS)
def test_agreement_counts_every_known_expert_once(trained: dict[str, Any], model: str) -> None:
    batch, routes = make_batch(shared_prompts=True), read_shape(trained["folder"] / model).routes
    assert routes is not None
    known = (len(batch.token_ids) - len(batch)) * len(routes.expert_layers) * routes.top_k
    agreeing, total = trained["results"][1][0][model][0]["agreement"]
    assert total == known
    # At random two of eight experts agree in a quarter of the cases.
    assert 0.2 < agreeing / total < 0.3
    for layout, views in layouts_of(trained, model):
        counts = np.array([view["agreement"] for view in views]).sum(0)
        assert counts.tolist() == [agreeing, known], layout
