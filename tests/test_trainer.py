"""One trainer rank group on real Megatron over gloo: every layout gives what transformers and a single process give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.config import Config
from megatron_hapo.types import TrainBatch, merge_scores
from tests.distributed import run_ranks
from tests.tiny_model import write_tiny_qwen3

LAYOUTS = {
    1: [{"tp": 1}],
    2: [
        {"tp": 2, "sequence_parallel": False},
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2},
        {"dp": 2},
    ],
    4: [{"tp": 2, "pp": 2, "sequence_parallel": True}],
}
TEMPERATURE = 1.25


def make_config(model: Path, layout: dict[str, Any], **optimizer: Any) -> Config:
    return Config.model_validate(
        {
            "name": "test",
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "parallel": layout,
            # Two or three sequences a micro-batch, so that accumulation over micro-batches is exercised.
            "trainer": {"dtype": "float32", "max_tokens_per_microbatch": 64},
            "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0, **optimizer},
            "rollout": {"temperature": TEMPERATURE, "dtype": "float32"},
            "weight_sync": {"bucket_bytes": 20_000},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )


def make_batch() -> TrainBatch:
    """Uneven sequences, one with a single response token; advantages of both signs."""
    generator = np.random.default_rng(0)
    lengths = np.array([20, 13, 33, 9, 25, 40, 2])
    responses = np.array([10, 5, 20, 8, 1, 30, 1])
    return TrainBatch(
        token_ids=generator.integers(0, 259, lengths.sum()).astype(np.int32),
        sequence_lengths=lengths,
        response_lengths=responses,
        temperatures=generator.uniform(0.9, 1.6, responses.sum()).astype(np.float32),
        rollout_log_probs=np.zeros(responses.sum(), np.float32),
        advantages=np.array([1.0, -1, 0.5, -0.5, 2, -2, 1], np.float32),
    )


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    """Whole HF tensors of the rank's pipeline stage."""
    from megatron_hapo.checkpoint.hf import hf_tensors

    tensors = hf_tensors(trainer.model, trainer.shape, trainer.layout)
    return {name: tensor.clone().numpy() for name, tensor in tensors}


def train_on(rank: int, model: Path, layouts: list[dict[str, Any]], checkpoint: Path) -> list[dict[str, Any]]:
    """What one rank sees of each layout: scores, two updates, scores again, weights; and a checkpoint's round trip."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo import parallel
    from megatron_hapo.trainer import TrainerRank

    seen = []
    for number, layout in enumerate(layouts):
        config = make_config(model, layout)
        sizes = {"tp": config.parallel.tp, "pp": config.parallel.pp, "ep": config.parallel.ep}
        grid = parallel.initialize(**sizes, device=torch.device("cpu"), seed=0, timeout_seconds=60)
        trainer = TrainerRank(config, grid)
        batch = make_batch()
        before = trainer.log_probs(batch)
        scores = [None] * dist.get_world_size()
        dist.all_gather_object(scores, before)
        merged = merge_scores(scores, batch)
        generator = np.random.default_rng(1)
        scored = replace(
            batch,
            # Off the current policy, so that ratios, clipping and the neutral zone all act.
            old_log_probs=merged.log_probs + generator.normal(0, 0.2, len(merged.log_probs)).astype(np.float32),
            modulation=generator.uniform(-1, 1, len(merged.log_probs)).astype(np.float32),
        )
        updates = [trainer.update(scored, step=1), trainer.update(scored, step=2)]
        weights = weights_of(trainer)
        buckets = list(trainer.weight_buckets(verify=True))
        folder = checkpoint / f"world{dist.get_world_size()}_{number}"
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        trainer.save_checkpoint(folder)
        third = trainer.update(scored, step=3)
        seen.append({"scores": merged, "updates": updates, "weights": weights, "third": third, "buckets": buckets})
        parallel_state.destroy_model_parallel()
    return seen


def resume_and_update(rank: int, model: Path, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load a checkpoint of another layout, then repeat the third update."""
    from megatron_hapo import parallel
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, layout)
    grid = parallel.initialize(
        tp=config.parallel.tp, pp=config.parallel.pp, device=torch.device("cpu"), seed=0, timeout_seconds=60
    )
    trainer = TrainerRank(config, grid)
    batch = make_batch()
    trainer.load_checkpoint(folder)
    weights = weights_of(trainer)
    generator = np.random.default_rng(1)
    old = np.load(folder.parent / "old_log_probs.npy")
    noise = generator.normal(0, 0.2, len(old)).astype(np.float32)
    modulation = generator.uniform(-1, 1, len(old)).astype(np.float32)
    third = trainer.update(replace(batch, old_log_probs=old + noise, modulation=modulation), step=3)
    return {"weights": weights, "third": third}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all layouts on one model: {world size: [[rank's view of a layout]]}."""
    folder = tmp_path_factory.mktemp("trained")
    model = write_tiny_qwen3(folder / "model", tied=request.param, vocab_size=263)
    world_sizes = (1, 2) if request.param else (1, 2, 4)
    results = {
        world_size: run_ranks(world_size, train_on, model, LAYOUTS[world_size], folder, timeout_seconds=240)
        for world_size in world_sizes
    }
    np.save(folder / "old_log_probs.npy", results[1][0][0]["scores"].log_probs)
    return {"folder": folder, "model": model, "results": results}


def layouts_of(trained: dict[str, Any]):
    """(layout, views of its ranks) of every layout but the single process."""
    for world_size, ranks in trained["results"].items():
        if world_size > 1:
            for number, layout in enumerate(LAYOUTS[world_size]):
                yield layout, [rank[number] for rank in ranks]


def all_weights(views: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: value for view in views for name, value in view["weights"].items()}


def first_report(views: list[dict[str, Any]], key: str) -> Any:
    return next(view[key] for view in views if (view[key][0] if isinstance(view[key], list) else view[key]) is not None)


def test_scores_equal_transformers(trained: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained["model"], dtype=torch.float32)
    batch, scores = make_batch(), trained["results"][1][0][0]["scores"]
    starts = np.cumsum(batch.sequence_lengths) - batch.sequence_lengths
    logits = []
    for start, length, response in zip(starts, batch.sequence_lengths, batch.response_lengths, strict=True):
        tokens = torch.from_numpy(batch.token_ids[start : start + length].astype(np.int64))
        with torch.no_grad():
            row_logits = model(tokens[None]).logits[0, -response - 1 : -1]
        logits.append((row_logits, tokens[-response:]))
    logits_NV = torch.cat([z for z, _ in logits])
    targets = torch.cat([t for _, t in logits])[:, None]
    base = torch.log_softmax(logits_NV / TEMPERATURE, -1)
    per_token = torch.log_softmax(logits_NV / torch.from_numpy(batch.temperatures)[:, None], -1)
    np.testing.assert_allclose(scores.log_probs, base.gather(1, targets)[:, 0], atol=2e-5)
    np.testing.assert_allclose(scores.rollout_temperature_log_probs, per_token.gather(1, targets)[:, 0], atol=2e-5)
    np.testing.assert_allclose(scores.entropies, -(base.exp() * base).sum(-1), atol=2e-5)


def test_every_layout_scores_alike(trained: dict[str, Any]) -> None:
    reference = trained["results"][1][0][0]["scores"]
    for layout, views in layouts_of(trained):
        for name in ("log_probs", "rollout_temperature_log_probs", "entropies"):
            got, want = getattr(views[0]["scores"], name), getattr(reference, name)
            np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{layout} {name}")


def test_every_layout_updates_alike(trained: dict[str, Any]) -> None:
    single = trained["results"][1][0][0]
    for layout, views in layouts_of(trained):
        for got, want in zip(first_report(views, "updates"), single["updates"], strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6), layout
        weights = all_weights(views)
        assert weights.keys() == single["weights"].keys(), layout
        for name, want in single["weights"].items():
            # Adam turns rounding in tiny gradients into steps of a share of the learning rate (1e-3).
            np.testing.assert_allclose(weights[name], want, atol=1e-4, err_msg=f"{layout} {name}")


def test_metrics_are_on_reporting_ranks_only(trained: dict[str, Any]) -> None:
    pipeline = [rank[LAYOUTS[2].index({"pp": 2})] for rank in trained["results"][2]]
    assert pipeline[0]["updates"] == [None, None]
    assert pipeline[1]["updates"][0] is not None


def test_weights_are_whole_tensors_under_their_hf_names(trained: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    original = load_file(trained["model"] / "model.safetensors")
    weights = trained["results"][1][0][0]["weights"]
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        name: tuple(value.shape) for name, value in original.items()
    }


def test_buckets_hold_every_weight_once(trained: dict[str, Any]) -> None:
    for layout, views in layouts_of(trained):
        weights = all_weights(views)
        seen: dict[str, np.ndarray] = {}
        for bucket in (bucket for view in views for bucket in view["buckets"]):
            assert len(bucket.data) <= 20_000 or len(bucket.names) == 1, layout
            assert set(bucket.checksums) == set(bucket.names)
            start = 0
            for name, shape in zip(bucket.names, bucket.shapes, strict=True):
                assert name not in seen, f"{layout}: {name} comes twice"
                size = int(np.prod(shape)) * 4
                seen[name] = bucket.data[start : start + size].view(np.float32).reshape(shape)
                start += -(-size // 16) * 16
        assert seen.keys() == weights.keys(), layout
        for name, value in seen.items():
            np.testing.assert_array_equal(value, weights[name], err_msg=f"{layout} {name}")


def test_a_checkpoint_resumes_at_another_layout(trained: dict[str, Any]) -> None:
    saved_at, folder = LAYOUTS[2].index({"tp": 2, "sequence_parallel": True}), trained["folder"]
    checkpoint = folder / f"world2_{saved_at}"
    views = run_ranks(2, resume_and_update, trained["model"], {"pp": 2}, checkpoint, timeout_seconds=120)
    saved = [rank[saved_at] for rank in trained["results"][2]]
    weights = all_weights(views)
    for name, want in all_weights(saved).items():
        np.testing.assert_array_equal(weights[name], want, err_msg=name)
    assert first_report(views, "third") == pytest.approx(first_report(saved, "third"), rel=1e-4, abs=1e-6)


def learn(rank: int, model: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from megatron_hapo import parallel
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, {"tp": 1})
    grid = parallel.initialize(tp=1, pp=1, device=torch.device("cpu"), seed=0, timeout_seconds=60)
    trainer = TrainerRank(config, grid)
    batch = make_batch()

    def score() -> np.ndarray:
        part = trainer.log_probs(batch)
        return merge_scores([part], batch).log_probs

    before = score()
    scored = replace(batch, old_log_probs=before, modulation=np.zeros_like(before))
    for step in range(5):
        trainer.update(scored, step=step + 1)
    return before, score(), np.repeat(batch.advantages, batch.response_lengths)


def test_an_update_raises_responses_with_positive_advantage(tiny_qwen3: Path) -> None:
    """Catches a flipped sign or a mix-up of rows, which equal layouts would not show."""
    before, after, advantages = run_ranks(1, learn, tiny_qwen3)[0]
    change = after - before
    for sign in (1, -1):
        assert (sign * change[np.sign(advantages) == sign]).mean() > 0.01


def diverge(rank: int, model: Path) -> tuple[str, bool]:
    from megatron_hapo import parallel
    from megatron_hapo.errors import TrainingError
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, {"tp": 1})
    grid = parallel.initialize(tp=1, pp=1, device=torch.device("cpu"), seed=0, timeout_seconds=60)
    trainer = TrainerRank(config, grid)
    before = weights_of(trainer)
    batch = make_batch()
    zeros = np.zeros(batch.num_response_tokens, np.float32)
    broken = replace(batch, advantages=batch.advantages * np.nan, old_log_probs=zeros, modulation=zeros)
    try:
        trainer.update(broken, step=7)
        message = ""
    except TrainingError as error:
        message = str(error)
    after = weights_of(trainer)
    return message, all(np.array_equal(before[name], after[name]) for name in before)


def test_a_non_finite_gradient_stops_before_the_optimizer(tiny_qwen3: Path) -> None:
    message, unchanged = run_ranks(1, diverge, tiny_qwen3)[0]
    assert "step 7" in message
    assert "nan" in message
    assert unchanged
