"""One trainer rank group on real Megatron over gloo: every layout gives what transformers and a single process give."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hapo.config import AlgorithmConfig, Config
from megatron_hapo.entropy import entropy_stats
from megatron_hapo.model.families import read_shape
from megatron_hapo.resharding.layouts import trainer_shards
from megatron_hapo.types import TokenScores, TrainBatch, merge_scores
from tests.distributed import run_ranks
from tests.tiny_model import write_tiny_qwen3

SINGLE = {"tp": 1}
LAYOUTS = {
    # Two or three sequences a micro-batch unless the layout says otherwise, so that micro-batches accumulate.
    1: [SINGLE, {"max_tokens": 1}, {"max_tokens": 10_000}],
    2: [
        {"tp": 2, "sequence_parallel": False},
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2},
        {"dp": 2},
        {"cp": 2},
    ],
    4: [{"tp": 2, "pp": 2, "sequence_parallel": True}],
}
TEMPERATURE = 1.25
ADAM_EPS = 1e-2
"""Large, so that Adam does not turn rounding in tiny gradients into steps of a share of the learning rate."""


def make_config(model: Path, layout: dict[str, Any], **optimizer: Any) -> Config:
    layout = dict(layout)
    max_tokens = layout.pop("max_tokens", 64)
    return Config.model_validate(
        {
            "name": "test",
            "steps": 1,
            "device": "cpu",
            "model": {"path": model},
            "parallel": layout,
            "trainer": {"dtype": "float32", "max_tokens_per_microbatch": max_tokens},
            "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0, **optimizer},
            "rollout": {"temperature": TEMPERATURE, "dtype": "float32"},
            "weight_sync": {"bucket_bytes": 20_000},
            "data": {"train": {"type": "arithmetic", "size": 1}},
        }
    )


def make_grid(config: Config) -> Any:
    from megatron_hapo import parallel

    sizes = config.parallel
    return parallel.initialize(
        tp=sizes.tp, pp=sizes.pp, cp=sizes.cp, ep=sizes.ep, device=torch.device("cpu"), seed=0, timeout_seconds=60
    )


def make_batch() -> TrainBatch:
    """Uneven sequences, one with a single response token; advantages of both signs."""
    generator = np.random.default_rng(0)
    lengths = np.array([20, 13, 33, 9, 25, 40, 2, 17, 5, 12, 31, 8, 22, 3, 14, 11])
    responses = np.array([10, 5, 20, 8, 1, 30, 1, 9, 2, 11, 16, 4, 21, 1, 7, 6])
    return TrainBatch(
        token_ids=generator.integers(0, 259, lengths.sum()).astype(np.int32),
        sequence_lengths=lengths,
        response_lengths=responses,
        temperatures=generator.uniform(0.9, 1.6, responses.sum()).astype(np.float32),
        rollout_log_probs=np.zeros(responses.sum(), np.float32),
        advantages=np.array([1.0, -1, 0.5, -0.5, 2, -2, 1, -1, 1, 0.3, -0.7, 1, -1, 0.5, -0.2, 1.5], np.float32),
    )


def with_everything(batch: TrainBatch, scores: TokenScores) -> TrainBatch:
    """The batch with all that any method's loss reads."""
    generator, num_tokens = np.random.default_rng(1), len(scores.log_probs)
    return replace(
        batch,
        # Off the current policy, so that ratios, clipping and the neutral zone all act.
        old_log_probs=scores.log_probs + generator.normal(0, 0.2, num_tokens).astype(np.float32),
        modulation=generator.uniform(-1, 1, num_tokens).astype(np.float32),
        weights=generator.uniform(0, 2, num_tokens).astype(np.float32),
        reasoning=generator.uniform(size=num_tokens) < 0.3,
        stats=entropy_stats(torch.from_numpy(scores.entropies)),
    )


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    """Whole HF tensors of the rank's pipeline stage."""
    from megatron_hapo.checkpoint.hf import hf_tensors

    tensors = hf_tensors(trainer.model, trainer.shape, trainer.layout)
    return {name: tensor.clone().numpy() for name, tensor in tensors}


def reduced_gradients(trainer: Any) -> dict[str, np.ndarray]:
    """Whole HF tensors of the stage's gradients, as the optimizer is about to see them."""
    import torch.distributed as dist

    group, parameters = trainer.layout.dp_cp_group, dict(trainer.model.named_parameters())
    for bucket in (bucket for buffer in trainer._ddp.buffers for bucket in buffer.buckets):
        # The distributed optimizer needs, and gets, the sum of its own shard only.
        shards = list(bucket.grad_data.chunk(group.size()))
        dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    kept = {name: parameter.data for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.main_grad.clone()
    try:
        return weights_of(trainer)
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def update_with_gradients(trainer: Any, batch: TrainBatch, *, step: int) -> tuple[Any, dict[str, np.ndarray]]:
    """An update's metrics and the gradient behind it."""
    seen, prepare_grads = {}, trainer._optimizer.prepare_grads

    def look() -> Any:
        seen.update(reduced_gradients(trainer))
        return prepare_grads()

    trainer._optimizer.prepare_grads = look
    try:
        return trainer.update(batch, step=step), seen
    finally:
        del trainer._optimizer.prepare_grads


OTHER_METHODS = AlgorithmConfig.model_validate(
    {
        # What reads more of a micro-batch than the default does: the whole response, current entropies, token kinds.
        "ratio": "sequence",
        "entropy": {"source": "current"},
        "dual_constraint": {"enabled": True, "kl": 0.1},
    }
)


def train_on(rank: int, model: Path, layouts: list[dict[str, Any]], checkpoint: Path) -> list[dict[str, Any]]:
    """What one rank sees of each layout: scores, two updates, scores again, weights; and a checkpoint's round trip."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo.trainer import TrainerRank

    seen = []
    for number, layout in enumerate(layouts):
        config = make_config(model, layout, eps=ADAM_EPS)
        grid = make_grid(config)
        trainer = TrainerRank(config, grid)
        batch = make_batch()
        before = trainer.log_probs(batch)
        scores = [None] * dist.get_world_size()
        dist.all_gather_object(scores, before)
        merged = merge_scores(scores, batch)
        scored = with_everything(batch, merged)
        first, gradients = update_with_gradients(trainer, scored, step=1)
        updates = [first, trainer.update(scored, step=2)]
        weights = weights_of(trainer)
        buckets = list(trainer.weight_buckets(verify=True))
        folder = checkpoint / f"world{dist.get_world_size()}_{number}"
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        trainer.save_checkpoint(folder)
        third = trainer.update(scored, step=3)
        trainer.config = config.model_copy(update={"algorithm": OTHER_METHODS})
        other, other_gradients = update_with_gradients(trainer, scored, step=4)
        seen.append(
            {
                "scores": merged,
                "updates": updates,
                "gradients": gradients,
                "weights": weights,
                "third": third,
                "other": other,
                "other_gradients": other_gradients,
                "buckets": buckets,
                "parameters": trainer.own_parameters(),
            }
        )
        parallel_state.destroy_model_parallel()
    return seen


def resume_and_update(rank: int, model: Path, layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load a checkpoint of another layout, then repeat the third update."""
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, layout, eps=ADAM_EPS)
    trainer = TrainerRank(config, make_grid(config))
    trainer.load_checkpoint(folder)
    weights = weights_of(trainer)
    scores = TokenScores(**np.load(folder.parent / "scores.npz"))
    third = trainer.update(with_everything(make_batch(), scores), step=3)
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
    np.savez(folder / "scores.npz", **vars(results[1][0][0]["scores"]))
    return {"folder": folder, "model": model, "results": results}


def layouts_of(trained: dict[str, Any]):
    """(layout, views of its ranks) of every layout but the single process."""
    for world_size, ranks in trained["results"].items():
        for number, layout in enumerate(LAYOUTS[world_size]):
            if layout != SINGLE:
                yield layout, [rank[number] for rank in ranks]


def whole(views: list[dict[str, Any]], key: str) -> dict[str, np.ndarray]:
    return {name: value for view in views for name, value in view[key].items()}


def assert_close(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], layout: dict[str, Any], share: float = 1e-5
) -> None:
    """Within this share of each tensor's largest element: float32 sums in another order."""
    assert got.keys() == want.keys(), layout
    for name, value in want.items():
        atol = share * float(np.abs(value).max())
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=f"{layout} {name}")


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
            assert got == pytest.approx(want, rel=1e-5, abs=1e-7), layout
        assert_close(whole(views, "gradients"), single["gradients"], layout)
        assert_close(whole(views, "weights"), single["weights"], layout)


def test_every_layout_updates_alike_with_every_methods_parts(trained: dict[str, Any]) -> None:
    """The sequence ratio sums over context-parallel ranks; current entropies and token kinds are cut like the rest."""
    single = trained["results"][1][0][0]
    for layout, views in layouts_of(trained):
        assert first_report(views, "other") == pytest.approx(single["other"], rel=1e-4, abs=1e-6), layout
        # Three updates on, so the gradient shows the rounding of the weights too.
        assert_close(whole(views, "other_gradients"), single["other_gradients"], layout, share=1e-4)


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
        weights = whole(views, "weights")
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


def assert_parameters_are_those_of_the_planned_grid(
    model: Path, layout: dict[str, Any], views: list[dict[str, Any]]
) -> None:
    """What every rank says it holds is what `trainer_shards` says without building the model."""
    tp, pp, ep = (layout.get(axis, 1) for axis in ("tp", "pp", "ep"))
    planned: dict[int, set[Any]] = defaultdict(set)
    shards = trainer_shards(read_shape(model), tp=tp, pp=pp, dp=len(views) // (tp * pp), ep=ep, spec="local")
    for shard in shards:
        for rank in shard.ranks:
            planned[rank] |= set(shard.parameters)
    for rank, view in enumerate(views):
        assert set(view["parameters"]) == planned[rank], (layout, rank)
        assert len(view["parameters"]) == len(planned[rank]), (layout, rank)


def test_every_layouts_parameters_are_those_of_the_planned_grid(trained: dict[str, Any]) -> None:
    for layout, views in layouts_of(trained):
        assert_parameters_are_those_of_the_planned_grid(trained["model"], layout, views)


def test_a_checkpoint_resumes_at_another_layout(trained: dict[str, Any]) -> None:
    saved_at, folder = LAYOUTS[2].index({"tp": 2, "sequence_parallel": True}), trained["folder"]
    checkpoint = folder / f"world2_{saved_at}"
    views = run_ranks(2, resume_and_update, trained["model"], {"pp": 2}, checkpoint, timeout_seconds=120)
    saved = [rank[saved_at] for rank in trained["results"][2]]
    weights = whole(views, "weights")
    for name, want in whole(saved, "weights").items():
        np.testing.assert_array_equal(weights[name], want, err_msg=name)
    assert first_report(views, "third") == pytest.approx(first_report(saved, "third"), rel=1e-4, abs=1e-6)


def learn(rank: int, model: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, {"tp": 1})
    grid = make_grid(config)
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
    from megatron_hapo.errors import TrainingError
    from megatron_hapo.trainer import TrainerRank

    config = make_config(model, {"tp": 1})
    grid = make_grid(config)
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
