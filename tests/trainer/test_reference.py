"""The reference model on real ranks: its log-probs, its loss against transformers, exchanges and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.methods.reference_kl import kl_estimate
from megatron_hapo.algorithm.training_batch import with_token_data
from megatron_hapo.checkpoint.disk_space import checkpoint_bytes
from megatron_hapo.config import AlgorithmConfig, Config
from megatron_hapo.entropy import entropy_stats
from megatron_hapo.model.families import num_parameters, read_shape
from megatron_hapo.observe.step_metrics import reference_metrics
from megatron_hapo.sizing.from_config import layout_of
from megatron_hapo.sizing.memory import trainer_memory
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores, merge_tokens
from tests.distributed import run_ranks
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import (
    TEMPERATURE,
    assert_close,
    first_report,
    make_batch,
    make_config,
    make_grid,
    update_with_gradients,
    weights_of,
    whole,
)

SINGLE: dict[str, Any] = {"tp": 1}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [SINGLE, {"max_tokens": 1}],
    2: [{"cp": 2}, {"dp": 2, "overlap": True}, {"pp": 2, "vpp": 2}, {"tp": 2, "sequence_parallel": True}],
}
COEFFICIENT = 0.5
OFF = {"enabled": False}
PLAIN = {"advantage": "group_mean", "adaptive_temperature": OFF, "adaptive_clip": OFF, "redistribution": OFF}


def config_with_kl(model: Path, layout: dict[str, Any], *, dtype: str = "float32", **kl: Any) -> Config:
    config = make_config(model, layout, lr=1e-2, eps=1e-2)
    settings = {"enabled": True, "coefficient": COEFFICIENT, **kl}
    trainer = config.trainer.model_copy(update={"dtype": dtype})
    algorithm = AlgorithmConfig.model_validate({**PLAIN, "kl": settings})
    return config.model_copy(update={"algorithm": algorithm, "trainer": trainer})


def gathered(part: Any) -> list[Any]:
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [part for part in parts if part is not None]


def scores_of(trainer: Any, batch: TrainBatch) -> TokenScores:
    return merge_scores(gathered(trainer.log_probs(batch)), batch)


def scores_with_reference(trainer: Any, batch: TrainBatch) -> TokenScores:
    scores = scores_of(trainer, batch)
    parts = [(rows, {"x": values}) for rows, values in gathered(trainer.reference_log_probs(batch))]
    return replace(scores, reference_log_probs=merge_tokens(parts, batch.response_lengths)["x"])


def with_kl(
    batch: TrainBatch, scores: TokenScores, algorithm: AlgorithmConfig, state: Mapping[str, float] | None = None
) -> TrainBatch:
    """The batch for an update; the advantages are kept."""
    controls = step_controls(state or {}, scores, algorithm)
    stats = entropy_stats(torch.from_numpy(scores.entropies))
    scored = replace(batch, old_log_probs=scores.log_probs, stats=stats, controls=controls)
    return with_token_data(scored, scores, algorithm)


def assert_same_weights(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def use_reference(rank: int, folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout: log-probs, an update towards the rewards, and one on the KL alone with its gradient."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    seen = []
    for layout in layouts:
        config = config_with_kl(folder / "model", layout)
        trainer = TrainerRank(config, make_grid(config))
        batch = make_batch()
        before = scores_with_reference(trainer, batch)
        np.testing.assert_array_equal(before.reference_log_probs, before.log_probs)
        trainer.update(with_kl(batch, before, config.algorithm), step=1)
        moved = weights_of(trainer)
        scores = scores_with_reference(trainer, batch)
        np.testing.assert_array_equal(scores.reference_log_probs, before.reference_log_probs)
        assert np.abs(scores.log_probs - before.log_probs).max() > 1e-2
        assert_same_weights(weights_of(trainer), moved)
        still = replace(batch, advantages=np.zeros_like(batch.advantages))
        metrics, gradients = update_with_gradients(trainer, with_kl(still, scores, config.algorithm), step=2)
        seen.append(
            {"moved": moved, "reference": scores.reference_log_probs, "metrics": metrics, "gradients": gradients}
            | {"after": scores_of(trainer, batch).log_probs, "log_probs": scores.log_probs}
        )
        parallel_state.destroy_model_parallel()
    return seen


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reference")
    write_tiny_qwen3(folder / "model", tied=False, vocab_size=263, layers=4)
    ranks = {size: run_ranks(size, use_reference, folder, layouts) for size, layouts in LAYOUTS.items()}
    return {"model": folder / "model", "ranks": ranks, "single": ranks[1][0][0]}


def other_layouts(used: dict[str, Any]):
    for size, ranks in used["ranks"].items():
        for number, layout in enumerate(LAYOUTS[size]):
            if layout != SINGLE:
                yield layout, [rank[number] for rank in ranks]


def response_log_probs(model: Any, batch: TrainBatch) -> torch.Tensor:
    """transformers' log-probs of the response tokens at the base temperature, differentiable. [N]"""
    parts = []
    starts = np.cumsum(batch.sequence_lengths) - batch.sequence_lengths
    for start, length, response in zip(starts, batch.sequence_lengths, batch.response_lengths, strict=True):
        tokens = torch.from_numpy(batch.token_ids[start : start + length].astype(np.int64))
        log_probs = torch.log_softmax(model(tokens[None]).logits[0, -response - 1 : -1] / TEMPERATURE, -1)
        parts.append(log_probs.gather(1, tokens[-response:, None])[:, 0])
    return torch.cat(parts)


def test_log_probs_loss_and_gradient_are_those_of_transformers(used: dict[str, Any]) -> None:
    """The reference has the initial weights, the policy those of one update, whose KL is differentiated."""
    from transformers import AutoModelForCausalLM

    batch, view = make_batch(), used["single"]
    models = [AutoModelForCausalLM.from_pretrained(used["model"], dtype=torch.float32) for _ in range(2)]
    initial, policy = models
    policy.load_state_dict({name: torch.from_numpy(value) for name, value in view["moved"].items()})
    with torch.no_grad():
        reference_N = response_log_probs(initial, batch)
    log_probs_N = response_log_probs(policy, batch)
    np.testing.assert_allclose(view["reference"], reference_N, atol=2e-5)
    np.testing.assert_allclose(view["log_probs"], log_probs_N.detach(), atol=2e-5)
    difference_N = log_probs_N - reference_N
    loss = COEFFICIENT * (torch.exp(-difference_N) - 1 + difference_N).mean()
    loss.backward()
    assert view["metrics"]["loss/policy"] == pytest.approx(float(loss.detach()), rel=1e-4)
    gradients = {name: parameter.grad.numpy() for name, parameter in policy.named_parameters()}
    assert_close(view["gradients"], gradients, SINGLE, share=1e-4)


def test_an_update_on_the_kl_alone_brings_the_policy_back(used: dict[str, Any]) -> None:
    view = used["single"]

    def kl(log_probs: np.ndarray) -> float:
        pair = (torch.from_numpy(values).double() for values in (log_probs, view["reference"]))
        return float(kl_estimate(*pair, estimator="k3").mean())

    assert kl(view["after"]) < 0.9 * kl(view["log_probs"])


def test_every_layout_and_micro_batch_size_gives_the_same(used: dict[str, Any]) -> None:
    single = used["single"]
    for layout, views in other_layouts(used):
        np.testing.assert_allclose(views[0]["reference"], single["reference"], atol=1e-5, err_msg=str(layout))
        assert first_report(views, "metrics") == pytest.approx(single["metrics"], rel=1e-4, abs=1e-6), layout
        assert_close(whole(views, "moved"), single["moved"], layout)
        assert_close(whole(views, "gradients"), single["gradients"], layout, share=1e-4)


# ----- host memory


def held_on_host(rank: int, model: Path, cases: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    """Bytes of the reference, and whether bfloat16 weights survive an exchange in chunks that cut parameters."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer import reference
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    reference.CHUNK_BYTES = 1000
    seen = []
    for layout, dtype in cases:
        config = config_with_kl(model, layout, dtype=dtype)
        trainer = TrainerRank(config, make_grid(config))
        held = trainer._reference
        assert held is not None
        initial = [parameter.detach().clone() for chunk in trainer.model for parameter in chunk.parameters()]
        scores = scores_with_reference(trainer, make_batch())
        trainer.update(with_kl(make_batch(), scores, config.algorithm), step=1)
        parameters = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
        moved = [parameter.detach().clone() for parameter in parameters]
        places = [parameter.data_ptr() for parameter in parameters]
        with held.in_place_of_policy():
            assert all(torch.equal(got, want) for got, want in zip(parameters, initial, strict=True))
            assert any(not torch.equal(got, want) for got, want in zip(parameters, moved, strict=True))
        assert all(torch.equal(got, want) for got, want in zip(parameters, moved, strict=True))
        assert [parameter.data_ptr() for parameter in parameters] == places
        seen.append({"bytes": held.host_bytes})
        parallel_state.destroy_model_parallel()
    return seen


def test_the_planner_knows_the_host_memory_and_an_exchange_returns_every_bit(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path, tied=True, vocab_size=263, layers=4)
    cases: list[tuple[dict[str, Any], str]] = [({"pp": 2}, "float32"), ({"tp": 2}, "bfloat16"), ({"dp": 2}, "bfloat16")]
    ranks = run_ranks(2, held_on_host, tmp_path, cases)
    for number, (layout, dtype) in enumerate(cases):
        planned = layout_of(config_with_kl(tmp_path, layout, dtype=dtype))
        memory = trainer_memory(read_shape(tmp_path), planned)
        assert max(rank[number]["bytes"] for rank in ranks) == pytest.approx(memory.host_reference, rel=0.02)
        without = replace(planned, has_reference=False)
        assert trainer_memory(read_shape(tmp_path), without).host_reference == 0
        assert trainer_memory(read_shape(tmp_path), without).total == memory.total  # the GPU holds one model


# ----- checkpoints

STEPS = 6
ADAPTIVE = {"target": 1e-3, "horizon": 5, "reset_every": 3}


def train_and_resume(rank: int, folder: Path) -> dict[str, Any]:
    """Runs of STEPS steps that save after each; then resumed ones from checkpoints before and after a reset."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    def open_trainer(layout: dict[str, Any]) -> TrainerRank:
        parallel_state.destroy_model_parallel()
        config = config_with_kl(folder / "model", layout, **ADAPTIVE)
        return TrainerRank(config, make_grid(config))

    def train(
        trainer: TrainerRank, state: dict[str, float], first: int, *, saves: bool = False
    ) -> list[dict[str, float]]:
        seen, algorithm = [], trainer.config.algorithm
        for step in range(first, STEPS + 1):
            scores = scores_with_reference(trainer, batch)
            scored = with_kl(batch, scores, algorithm, state)
            seen.append({**reference_metrics(scores), **scored.controls})
            trainer.update(scored, step=step)
            state = next_state(state, scores, [], algorithm)
            if step % algorithm.kl.reset_every == 0:
                trainer.replace_reference()
            if saves:
                checkpoint = folder / f"step_{step}"
                if rank == 0:
                    checkpoint.mkdir()
                dist.barrier()
                written[step] = sorted(trainer.save_checkpoint(checkpoint))
                states[step] = json.dumps(state)
        return seen

    batch, written, states = make_batch(), {}, {}
    trainer = open_trainer({"dp": 2})
    results: dict[str, Any] = {"whole": (train(trainer, {}, 1, saves=True), weights_of(trainer)), "written": written}
    for saved, layout in ((2, {"dp": 2}), (4, {"dp": 2}), (4, {"pp": 2})):
        resumed = open_trainer(layout)
        resumed.load_checkpoint(folder / f"step_{saved}")
        results[f"{saved} {layout}"] = train(resumed, json.loads(states[saved]), saved + 1), weights_of(resumed)
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resumed_reference")
    write_tiny_qwen3(folder / "model", tied=False, vocab_size=263, layers=4)
    return folder, run_ranks(2, train_and_resume, folder, timeout_seconds=240)


@pytest.mark.parametrize("saved", [2, 4])
def test_a_resumed_run_has_the_same_reference_and_coefficient(
    resumed: tuple[Path, list[dict[str, Any]]], saved: int
) -> None:
    """Bit for bit: after step 2 the reference is the initial model, after step 4 the policy of step 3."""
    for rank in resumed[1]:
        (metrics, weights), (rest, got) = rank["whole"], rank[f"{saved} {{'dp': 2}}"]
        assert rest == metrics[saved:]
        assert_same_weights(got, weights)
    kls = [row["kl/mean"] for row in resumed[1][0]["whole"][0]]
    assert kls[0] == kls[3] == 0  # right after the start and after a reset the policy is the reference
    assert min(*kls[1:3], *kls[4:]) > 0
    coefficients = [row["kl_coefficient"] for row in resumed[1][0]["whole"][0]]
    assert len(set(coefficients)) == STEPS


def test_a_reference_is_saved_only_once_it_was_replaced_and_loads_at_another_layout(
    resumed: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, ranks = resumed
    has = {step: (folder / f"step_{step}" / "reference").is_dir() for step in range(1, STEPS + 1)}
    assert [step for step, exists in has.items() if exists] == [3, 4, 5, 6]
    named = {name for rank in ranks for name in rank["written"][4]}
    assert named == {path.relative_to(folder / "step_4").as_posix() for path in (folder / "step_4").rglob("*.distcp")}
    assert any(name.startswith("reference/") for name in named)
    config = config_with_kl(folder / "model", {"dp": 2}, **ADAPTIVE)
    stored = sum(path.stat().st_size for path in (folder / "step_4").rglob("*.distcp"))
    # Files also have about a kilobyte per tensor, which only counts for a model as small as this.
    assert checkpoint_bytes(num_parameters(read_shape(folder / "model")), config) == pytest.approx(stored, rel=0.2)
    metrics, weights = ranks[0]["whole"]
    for got, want in zip(ranks[0]["4 {'pp': 2}"][0], metrics[4:], strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    views = [{"weights": rank["4 {'pp': 2}"][1]} for rank in ranks]
    assert_close(whole(views, "weights"), weights, {"pp": 2}, share=1e-4)
