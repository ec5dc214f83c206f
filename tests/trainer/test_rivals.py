"""Updates of every rival do not depend on the layout or on the size of micro-batches, and no method's loss waits for
the device.

Metrics, sums for controllers and gradients of two updates on one batch, whose weights, per-token data and controls are
those that the driver computes from a single rank's scores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.algorithm.controllers import next_state, step_controls
from megatron_hapo.algorithm.step_statistics import step_statistics
from megatron_hapo.algorithm.training_batch import with_token_data
from megatron_hapo.config import AlgorithmConfig, load_config
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores
from tests.distributed import run_ranks
from tests.host_syncs import HostSyncs
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config, make_grid, update_with_gradients

OFF = {"enabled": False}
DAPO: dict[str, Any] = {
    "advantage": "group_mean", "clip_high": 0.28, "adaptive_temperature": OFF, "adaptive_clip": OFF,
    "redistribution": OFF,
}  # fmt: skip
RIVALS: dict[str, dict[str, Any]] = {
    "entropy_bonus": {"entropy_bonus": {"enabled": True, "coefficient": 0.01}},
    "adaptive_entropy": {"entropy_bonus": {"enabled": True, "coefficient": 0.1, "target": 9.0, "max_coefficient": 1.0}},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    "sapo": {"surrogate": "sapo"},
    "ce_gppo": {"surrogate": "ce_gppo"},
    "clip_cov": {"clip_cov": {"enabled": True, "share": 0.2, "lower": 0.1}},
    "kl_cov": {"surrogate": "unclipped", "kl_cov": {"enabled": True, "share": 0.2}},
    "entropic": {"entropic": {"enabled": True, "target": 4.0, "probability": 0.01}},
    "repo": {"repo": {"enabled": True, "zeta": 0.05, "target": 1.0}},
    "repo_subtracted": {"repo": {"enabled": True, "form": "subtracted", "zeta": 0.05, "target": 1.0}},
    "bapo": {"bapo": {"enabled": True, "target": 1.2}},
    "adapo": {"adapo": {"enabled": True, "target": 9.0}},
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
LAYOUTS: list[dict[str, Any]] = [
    {"cp": 2, "max_tokens": 64},
    {"dp": 2, "max_tokens": 1, "output_head": "fused"},
    {"tp": 2, "sequence_parallel": False},
    {"pp": 2, "max_tokens": 64},
]


def settings_of(rival: str) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(DAPO | RIVALS[rival])


def prepared(scores: TokenScores, algorithm: AlgorithmConfig, state: dict[str, float]) -> TrainBatch:
    """The batch as the driver hands it to the trainer; the old log-probs are off the policy, so that ratios act."""
    noise = np.random.default_rng(1).normal(0, 0.3, len(scores.log_probs)).astype(np.float32)
    old = replace(scores, log_probs=scores.log_probs + noise, reference_log_probs=scores.log_probs)
    batch = replace(
        make_batch(), old_log_probs=old.log_probs, stats=step_statistics(old, algorithm),
        controls=step_controls(state, old, algorithm),
    )  # fmt: skip
    return with_token_data(batch, old, algorithm)


def update_with_every_rival(rank: int, model: Path, layouts: list[dict[str, Any]], scores: TokenScores | None) -> Any:
    """The scores, and a rank's results for each layout: metrics, gradients and state of each rival's second update."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    seen = []
    for layout in layouts:
        config = make_config(model, layout, lr=1e-6)
        config = config.model_copy(update={"algorithm": settings_of("entropy_bonus")})  # entropies with gradient
        trainer = TrainerRank(config, make_grid(config))
        if scores is None:
            scores = merge_scores([trainer.log_probs(make_batch())], make_batch())
        results = {}
        for rival in RIVALS:
            trainer.config = config.model_copy(update={"algorithm": settings_of(rival)})
            state: dict[str, float] = {}
            for step in (1, 2):
                batch = prepared(scores, settings_of(rival), state)
                metrics, gradients = update_with_gradients(trainer, batch, step=step)
                state = next_state(state, scores, [metrics], trainer.config.algorithm) if metrics is not None else {}
            results[rival] = (metrics, gradients, state)
        seen.append(results)
        parallel_state.destroy_model_parallel()
    return scores, seen


def waits_of_every_method(rank: int, model: Path, layouts: list[dict[str, Any]], jobs: list[Path]) -> Any:
    """For each layout, and each method by its name: the host waits of an update, and its micro-batches."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    algorithms = {job.stem: load_config(job).algorithm for job in jobs}
    num_tokens = make_batch().num_response_tokens
    scores = TokenScores(
        **dict.fromkeys(
            ("log_probs", "rollout_temperature_log_probs"), np.linspace(-6, -4, num_tokens, dtype=np.float32)
        ),
        entropies=np.linspace(4, 6, num_tokens, dtype=np.float32),
    )
    seen = []
    for layout in layouts:
        config = make_config(model, layout, lr=1e-6)
        config = config.model_copy(update={"algorithm": settings_of("entropy_bonus")})  # entropies with gradient
        trainer = TrainerRank(config, make_grid(config))
        # The first update makes the optimizer's state.
        trainer.update(prepared(scores, config.algorithm, {}), step=1)
        waits = {}
        for name, algorithm in algorithms.items():
            trainer.config = config.model_copy(update={"algorithm": algorithm})
            batch = prepared(scores, algorithm, {})
            with HostSyncs() as syncs:
                trainer.update(batch, step=2)
            waits[name] = syncs.counts, len(trainer._microbatches(batch))
        seen.append(waits)
        parallel_state.destroy_model_parallel()
    return seen


def test_no_methods_loss_waits_for_the_device(tmp_path: Path) -> None:
    """Of one rank, and of two that share sequences: what follows from whole responses is known to the host, or stays
    on the device. The waits are those of any update (`test_trainer`)."""
    model, jobs = write_tiny_qwen3(tmp_path / "model"), []
    for path in METHODS:
        jobs.append(tmp_path / path.name)
        jobs[-1].write_text(f"base: [{CONFIGS}/demo_cpu.yaml, {CONFIGS}/presets/paper.yaml, {path}]\n")
    for world_size, layout in ((1, {"tp": 1}), (2, {"cp": 2, "max_tokens": 64})):
        for ranks in run_ranks(world_size, waits_of_every_method, model, [layout], jobs):
            for method, (counts, microbatches) in ranks[0].items():
                assert sum(counts.values()) <= microbatches + 7, (layout, method, counts.most_common())


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results on one rank with two micro-batch sizes, and of both ranks with each layout."""
    model = write_tiny_qwen3(tmp_path_factory.mktemp("rivals"))
    sizes: list[dict[str, Any]] = [{"tp": 1, "max_tokens": 10_000}, {"tp": 1, "max_tokens": 1}]
    ((scores, (single, small)),) = run_ranks(1, update_with_every_rival, model, sizes, None)
    pairs = run_ranks(2, update_with_every_rival, model, LAYOUTS, scores)
    others = {"one sequence a micro-batch": [small]}
    others |= {str(layout): [seen[number] for _, seen in pairs] for number, layout in enumerate(LAYOUTS)}
    return single, others


@pytest.mark.parametrize("rival", RIVALS)
def test_the_update_is_the_same_at_any_layout(updated: Any, rival: str) -> None:
    single, others = updated
    metrics, gradients, state = single[rival]
    assert metrics["grad_norm"] > 0
    for layout, ranks in others.items():
        assert any(rank[rival][0] for rank in ranks), layout
        for rank in ranks:
            got_metrics, got_gradients, got_state = rank[rival]
            if got_metrics is not None:  # a rank of the last stage
                assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6), layout
                assert got_state == pytest.approx(state, rel=1e-4), layout
            for name, gradient in got_gradients.items():
                np.testing.assert_allclose(gradient, gradients[name], rtol=2e-3, atol=2e-5, err_msg=f"{layout} {name}")
