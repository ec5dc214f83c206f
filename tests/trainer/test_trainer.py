"""Trainer ranks on real Megatron over gloo: every layout agrees with transformers and with a single process."""

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
from megatron_hapo.observe.running_stages import WorkCount
from megatron_hapo.resharding.layouts import (
    engine_parameters,
    matrix_size,
    matrix_sizes,
    shards_of_ranks,
)
from megatron_hapo.resharding.plan import make_plan
from megatron_hapo.resharding.transfer import as_matrix
from megatron_hapo.types import KeptTokens, TokenScores, TrainBatch, merge_scores
from tests.distributed import run_ranks
from tests.host_syncs import HostSyncs
from tests.resharding.planned_grid import trainer_shards
from tests.resharding.test_plan import carry_out, cut
from tests.tiny_families import write_family
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.small_batches import TEMPERATURE, make_batch, make_config

MODELS = ("untied", "tied", "moe")
SINGLE: dict[str, Any] = {"tp": 1}
LAYOUTS: dict[int, dict[str, list[dict[str, Any]]]] = {
    # World size, model, layouts. Two or three sequences a micro-batch unless the layout says otherwise, so that
    # micro-batches accumulate.
    1: {
        "untied": [SINGLE, {"max_tokens": 1}, {"max_tokens": 10_000}, {"recompute": "full"}, {"output_head": "fused"}],
        "tied": [SINGLE, {"recompute": "selective"}, {"output_head": "fused"}],
        "moe": [SINGLE],
    },
    2: {
        "untied": [
            {"tp": 2, "sequence_parallel": False},
            {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
            {"pp": 2},
            {"pp": 2, "vpp": 2},
            {"pp": 2, "first_stage_layers": 3, "recompute": "full"},
            {"dp": 2, "distributed_optimizer": False},
            {"dp": 2, "overlap": True, "output_head": "fused"},
            {"cp": 2},
            {"cp": 2, "output_head": "fused"},
            {"tp": 2, "sequence_parallel": False, "output_head": "fused"},
            # In float32 the same numbers by another product.
            {"tp": 2, "sequence_parallel": False, "float32_logits": True},
        ],
        "tied": [
            {"tp": 2, "sequence_parallel": True, "float32_logits": True},
            {"pp": 2},
            {"pp": 2, "vpp": 2, "recompute": "full", "output_head": "fused"},
            {"dp": 2},
            {"tp": 2, "sequence_parallel": True, "output_head": "fused"},
            {"pp": 2, "output_head": "fused"},
        ],
        "moe": [
            {"dp": 2, "ep": 2, "overlap": True, "output_head": "fused"},
            {"tp": 2, "ep": 2, "sequence_parallel": True, "recompute": "selective"},
            {"tp": 2, "sequence_parallel": True},
            {"tp": 2, "etp": 2, "sequence_parallel": True},
        ],
    },
    4: {
        "untied": [
            {"tp": 2, "pp": 2, "sequence_parallel": True},
            {"pp": 2, "vpp": 2, "dp": 2, "overlap": True, "float32_logits": True},
            {"pp": 4, "max_tokens": 1},
        ],
        "moe": [{"pp": 2, "dp": 2, "ep": 2}, {"tp": 2, "etp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}],
    },
}
RESUMED: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    # Model, layout that wrote a checkpoint, layout that goes on from it.
    "untied": [
        ({"tp": 2, "sequence_parallel": True, "recompute": "selective"}, {"pp": 2, "vpp": 2}),
        ({"pp": 2, "vpp": 2}, {"pp": 2, "first_stage_layers": 3}),
    ],
    "tied": [({"pp": 2, "vpp": 2, "recompute": "full", "output_head": "fused"}, {"dp": 2})],
    "moe": [
        ({"dp": 2, "ep": 2, "overlap": True, "output_head": "fused"}, {"tp": 2, "etp": 2, "sequence_parallel": True}),
        ({"tp": 2, "etp": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True}),
    ],
}
ADAM_EPS = 1e-2
"""Large, so that Adam does not amplify the rounding of tiny gradients to a visible share of the learning rate."""


def make_grid(config: Config) -> Any:
    from megatron_hapo.model import parallel_layout

    return parallel_layout.initialize(config.parallel, device=torch.device("cpu"), seed=0, timeout_seconds=60)


def make_kept(batch: TrainBatch) -> KeptTokens:
    """Each response token, and up to 5 others as a cut might have kept them."""
    generator = np.random.default_rng(2)
    ends = np.cumsum(batch.sequence_lengths)
    spans = zip(ends, batch.response_lengths, strict=True)
    targets = np.concatenate([batch.token_ids[end - length : end] for end, length in spans])
    sets = [np.unique([target, *generator.integers(0, 259, generator.integers(0, 6))]) for target in targets]
    return KeptTokens(np.concatenate(sets).astype(np.int32), np.array([len(kept) for kept in sets], dtype=np.int32))


def with_everything(batch: TrainBatch, scores: TokenScores) -> TrainBatch:
    """The batch with every field that some method's loss reads."""
    generator, num_tokens = np.random.default_rng(1), len(scores.log_probs)
    # Off the current policy, so that ratios, clipping and the neutral zone all act.
    old_log_probs = scores.log_probs + generator.normal(0, 0.2, num_tokens).astype(np.float32)
    modulation = generator.uniform(-1, 1, num_tokens).astype(np.float32)
    weights = generator.uniform(0, 2, num_tokens).astype(np.float32)
    return replace(
        batch,
        old_log_probs=old_log_probs,
        token_data={"modulation": modulation, "reasoning": generator.uniform(size=num_tokens) < 0.3},
        weights=weights,
        stats=entropy_stats(torch.from_numpy(scores.entropies)),
    )


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    """Whole HF tensors of the rank's pipeline stage."""
    from megatron_hapo.checkpoint.hf_weights import hf_tensors
    from megatron_hapo.trainer.optimizer import wait_for_weights

    wait_for_weights(trainer._chunks)
    tensors = hf_tensors(trainer.model, trainer.shape, trainer.layout)
    return {name: tensor.clone().numpy() for name, tensor in tensors}


def reduced_gradients(trainer: Any) -> dict[str, np.ndarray]:
    """Whole HF tensors of the stage's gradients, as the optimizer is about to use them."""
    import torch.distributed as dist

    from megatron_hapo.checkpoint.hf_weights import hf_tensors

    buffers = [buffer for chunk in trainer._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    for buffer in buffers if trainer.config.trainer.distributed_optimizer else ():
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            # The distributed optimizer reduces only the shard of its own rank.
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    parameters = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    try:
        tensors = hf_tensors(trainer.model, trainer.shape, trainer.layout)
        return {name: tensor.clone().numpy() for name, tensor in tensors}
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data = value


def update_with_gradients(trainer: Any, batch: TrainBatch, *, step: int) -> tuple[Any, dict[str, np.ndarray]]:
    """An update's metrics, and its gradients."""
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
        # Reads more of a micro-batch than the default does: whole responses, current entropies, token kinds.
        "ratio": "sequence",
        "entropy": {"source": "current"},
        "dual_constraint": {"enabled": True, "kl": 0.1},
    }
)


class ReadCount(WorkCount):
    """Notes how far it was at the beginning of each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def begin_next(self) -> None:
        super().begin_next()
        self.seen.append(self.read())


def train_on(rank: int, folder: Path, cases: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """One rank's results of each model and layout: see `train_once`."""
    from functools import partial

    from megatron.core import parallel_state

    from megatron_hapo.trainer import optimizer

    # Buckets of one or two parameters, so that with overlap there are several.
    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=5000)
    seen: dict[str, list[dict[str, Any]]] = {}
    for model, layouts in cases.items():
        for layout in layouts:
            saved = [number for number, (source, _) in enumerate(RESUMED[model]) if source == layout]
            checkpoint = folder / f"{model}_{saved[0]}" if saved else None
            seen.setdefault(model, []).append(train_once(rank, folder / model, layout, checkpoint))
            parallel_state.destroy_model_parallel()
    return seen


def train_once(rank: int, model: Path, layout: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Scores, two updates, weights, a checkpoint, a third update, and one with another method's loss and a cut."""
    import torch.distributed as dist

    from megatron_hapo.logprobs.output_head import FusedHead
    from megatron_hapo.trainer.trainer_rank import TrainerRank

    config = make_config(model, layout, eps=ADAM_EPS)
    grid = make_grid(config)
    trainer = TrainerRank(config, grid)
    if isinstance(trainer._output_head, FusedHead):  # several chunks in most micro-batches
        trainer._output_head = replace(trainer._output_head, chunk_bytes=8000)
    assert_layers_are_as_planned(trainer)
    batch = make_batch(shared_prompts=True)
    cut_batch = replace(batch, kept=make_kept(batch))
    before = trainer.log_probs(batch), trainer.log_probs(cut_batch)
    scores: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(scores, before)
    merged, cut_scores = (merge_scores(list(parts), batch) for parts in zip(*scores, strict=True))
    scored = with_everything(batch, merged)
    first, gradients = update_with_gradients(trainer, scored, step=1)
    updates = [first, trainer.update(scored, step=2)]
    weights = weights_of(trainer)
    buckets = list(trainer.weight_buckets(verify=True))
    held = {name: as_matrix(value).detach().clone().numpy() for name, value in trainer._named_parameters()}
    if checkpoint is not None:
        if rank == 0:
            checkpoint.mkdir()
        dist.barrier()
        trainer.save_checkpoint(checkpoint)
    trainer.count = count = ReadCount()
    with HostSyncs() as syncs:
        third = trainer.update(scored, step=3)
    counted = [*count.seen, count.read()]
    later_weights = weights_of(trainer)
    trainer.config = config.model_copy(update={"algorithm": OTHER_METHODS})
    other, other_gradients = update_with_gradients(trainer, replace(scored, kept=cut_batch.kept), step=4)
    return {
        "scores": merged,
        "cut_scores": cut_scores,
        "updates": updates,
        "gradients": gradients,
        "weights": weights,
        "third": third,
        "later_weights": later_weights,
        "layout": layout,
        "host_syncs": syncs.counts,
        "microbatches": len(trainer._microbatches(scored)),
        "counted": counted,
        "other": other,
        "other_gradients": other_gradients,
        "buckets": buckets,
        "parameters": trainer.own_parameters(),
        "held": held,
    }


def assert_layers_are_as_planned(trainer: Any) -> None:
    """`ParallelSizes.chunks` distributes the layers as Megatron does."""
    layout = trainer.layout
    planned = [list(layers) for layers in layout.sizes.chunks(trainer.shape.num_layers, layout.pp_rank)]
    assert [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in trainer.model] == planned


def resume_and_update(rank: int, folder: Path, cases: dict[str, list[tuple[Any, Any]]]) -> dict[str, list[Any]]:
    """Load checkpoints that other layouts wrote, then repeat the third update."""
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    seen: dict[str, list[Any]] = {}
    for model, pairs in cases.items():
        scores = TokenScores(**np.load(folder / f"{model}_scores.npz"))
        for number, (_, layout) in enumerate(pairs):
            config = make_config(folder / model, layout, eps=ADAM_EPS)
            trainer = TrainerRank(config, make_grid(config))
            trainer.load_checkpoint(folder / f"{model}_{number}")
            weights = weights_of(trainer)
            third = trainer.update(with_everything(make_batch(shared_prompts=True), scores), step=3)
            view = {"weights": weights, "third": third, "later_weights": weights_of(trainer)}
            seen.setdefault(model, []).append(view)
            parallel_state.destroy_model_parallel()
    return seen


@pytest.fixture(scope="module")
def all_trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all models and layouts: {world size: [{model: [a rank's view of a layout]}]}."""
    folder = tmp_path_factory.mktemp("trained")
    for tied in (False, True):
        write_tiny_qwen3(folder / ("tied" if tied else "untied"), tied=tied, vocab_size=263, layers=4)
    write_family(folder / "moe", "qwen3_moe")
    results = {
        world_size: run_ranks(world_size, train_on, folder, cases, timeout_seconds=400)
        for world_size, cases in LAYOUTS.items()
    }
    for model in MODELS:
        np.savez(folder / f"{model}_scores.npz", **arrays_of(results[1][0][model][0]["scores"]))
    return {"folder": folder, "results": results}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, all_trained: dict[str, Any]) -> dict[str, Any]:
    """Results of one model: {world size: [[a rank's view of a layout]]}."""
    name = request.param
    results = {
        size: [rank[name] for rank in ranks] for size, ranks in all_trained["results"].items() if name in ranks[0]
    }
    return {"name": name, "model": all_trained["folder"] / name, "results": results}


def arrays_of(scores: TokenScores) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(scores).items() if array is not None}


def layouts_of(trained: dict[str, Any]):
    """(layout, views of its ranks) of every layout but the single process."""
    for world_size, ranks in trained["results"].items():
        for number, layout in enumerate(LAYOUTS[world_size][trained["name"]]):
            if layout != SINGLE:
                yield layout, [rank[number] for rank in ranks]


def whole(views: list[dict[str, Any]], key: str) -> dict[str, np.ndarray]:
    return {name: value for view in views for name, value in view[key].items()}


def assert_close(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], layout: dict[str, Any], share: float = 1e-5
) -> None:
    """Equal within this fraction of each tensor's largest element, since float32 sums depend on their order."""
    assert got.keys() == want.keys(), layout
    for name, value in want.items():
        atol = share * float(np.abs(value).max())
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=f"{layout} {name}")


def first_report(views: list[dict[str, Any]], key: str) -> Any:
    return next(view[key] for view in views if (view[key][0] if isinstance(view[key], list) else view[key]) is not None)


def test_scores_equal_transformers(trained: dict[str, Any]) -> None:
    """Also where top-p and top-k have cut the choice: log-probs among the kept tokens, entropies of all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained["model"], dtype=torch.float32)
    batch, scores = make_batch(shared_prompts=True), trained["results"][1][0][0]["scores"]
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

    kept, cut = make_kept(batch), trained["results"][1][0][0]["cut_scores"]
    among = torch.full_like(logits_NV, -torch.inf)
    places = np.repeat(np.arange(len(kept.lengths)), kept.lengths), kept.token_ids
    among[places] = logits_NV[places]
    base_kept = torch.log_softmax(among / TEMPERATURE, -1).gather(1, targets)[:, 0]
    per_token_kept = torch.log_softmax(among / torch.from_numpy(batch.temperatures)[:, None], -1).gather(1, targets)
    np.testing.assert_allclose(cut.log_probs, base_kept, atol=2e-5)
    np.testing.assert_allclose(cut.rollout_temperature_log_probs, per_token_kept[:, 0], atol=2e-5)
    np.testing.assert_allclose(cut.entropies, scores.entropies, atol=1e-6)


def test_every_layout_gives_the_same_scores(trained: dict[str, Any]) -> None:
    single = trained["results"][1][0][0]
    for layout, views in layouts_of(trained):
        for key in ("scores", "cut_scores"):
            for name in ("log_probs", "rollout_temperature_log_probs", "entropies"):
                got, want = getattr(views[0][key], name), getattr(single[key], name)
                np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{layout} {key} {name}")


def test_every_layout_gives_the_same_update(trained: dict[str, Any]) -> None:
    single = trained["results"][1][0][0]
    for layout, views in layouts_of(trained):
        for got, want in zip(first_report(views, "updates"), single["updates"], strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-7), layout
        assert_close(whole(views, "gradients"), single["gradients"], layout)
        assert_close(whole(views, "weights"), single["weights"], layout)


def test_every_layout_gives_the_same_update_with_another_method(trained: dict[str, Any]) -> None:
    """The sequence ratio sums over context-parallel ranks; entropies, token kinds and kept tokens are sliced like the
    rest."""
    single = trained["results"][1][0][0]
    for layout, views in layouts_of(trained):
        assert first_report(views, "other") == pytest.approx(single["other"], rel=1e-4, abs=1e-6), layout
        # After three updates the gradient also reflects the rounding of the weights.
        assert_close(whole(views, "other_gradients"), single["other_gradients"], layout, share=1e-4)


def test_an_update_waits_for_the_device_at_most_twice_a_micro_batch(all_trained: dict[str, Any]) -> None:
    """Once, in fact, for the check of the results, and 7 times for the gradient's norm and the metrics.

    Not with experts: the host must know the number of tokens of each, in every layer.
    """
    for ranks in all_trained["results"].values():
        for view in (view for rank in ranks for model in ("untied", "tied") for view in rank.get(model, ())):
            waits = sum(view["host_syncs"].values())
            assert waits <= view["microbatches"] + 7, (view["layout"], view["host_syncs"].most_common())


def test_a_rank_counts_its_micro_batches(trained: dict[str, Any]) -> None:
    for layout, views in layouts_of(trained):
        for view in views:
            total = view["microbatches"] * layout.get("vpp", 1)
            assert view["counted"] == [*((done, total) for done in range(total)), (0, 0)], layout


def test_metrics_are_on_reporting_ranks_only(all_trained: dict[str, Any]) -> None:
    for layout in ({"pp": 2}, {"pp": 2, "vpp": 2}):
        number = LAYOUTS[2]["untied"].index(layout)
        first, last = (rank["untied"][number]["updates"] for rank in all_trained["results"][2])
        assert first == [None, None]
        assert last[0] is not None


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


def test_a_plan_moves_every_layouts_weights_into_engine_ranks(trained: dict[str, Any]) -> None:
    """From the parameters that real ranks report, bit for bit, also with interleaved chunks and uneven stages."""
    shape = read_shape(trained["model"])
    for layout, views in layouts_of(trained):
        engine = engine_parameters(shape, 2)
        shards = shards_of_ranks(view["parameters"] for view in views)
        plan = make_plan(shards, engine, matrix_sizes(shape), engines=1, itemsize=4, max_copy_bytes=4096)
        got = carry_out(plan, dict(enumerate(view["held"] for view in views)), engine)[0]
        wholes = {name: value.reshape(matrix_size(value.shape)) for name, value in whole(views, "weights").items()}
        for rank, parameters in enumerate(engine):
            for name, want in cut(wholes, parameters).items():
                np.testing.assert_array_equal(got[rank][name], want, err_msg=f"{layout} rank {rank} {name}")


def test_ranks_hold_the_parameters_of_the_planned_grid(trained: dict[str, Any]) -> None:
    """Every rank's parameters are those that `trainer_shards` computes without building the model."""
    shape = read_shape(trained["model"])
    for layout, views in layouts_of(trained):
        sizes = make_config(trained["model"], layout).parallel
        assert sizes.world_size == len(views)
        planned: dict[int, set[Any]] = defaultdict(set)
        for shard in trainer_shards(shape, sizes, spec="local"):
            for rank in shard.ranks:
                planned[rank] |= set(shard.parameters)
        for rank, view in enumerate(views):
            assert set(view["parameters"]) == planned[rank], (layout, rank)
            assert len(view["parameters"]) == len(planned[rank]), (layout, rank)


def test_a_checkpoint_resumes_at_another_layout(all_trained: dict[str, Any]) -> None:
    """The optimizer's state is restored, too: the next update gives the same weights."""
    resumed = run_ranks(2, resume_and_update, all_trained["folder"], RESUMED, timeout_seconds=240)
    for model, pairs in RESUMED.items():
        for number, (source, layout) in enumerate(pairs):
            views = [rank[model][number] for rank in resumed]
            saved_at = LAYOUTS[2][model].index(source)
            saved = [rank[model][saved_at] for rank in all_trained["results"][2]]
            weights, case = whole(saved, "weights"), f"{model}: {source} to {layout}"
            assert whole(views, "weights").keys() == weights.keys(), case
            # On each rank, since with a distributed optimizer each has overwritten its own shard.
            for name, got in (item for view in views for item in view["weights"].items()):
                np.testing.assert_array_equal(got, weights[name], err_msg=f"{case} {name}")
            assert first_report(views, "third") == pytest.approx(first_report(saved, "third"), rel=1e-4, abs=1e-6), case
            assert_close(whole(views, "later_weights"), whole(saved, "later_weights"), layout)
