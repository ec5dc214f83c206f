"""Real Megatron ranks send by the plan. The engine's parameters and the checksums equal those from whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_hapo.model.families import hf_tensor_shapes
from megatron_hapo.resharding.expected import merge_checksums
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes, shards_of_ranks
from megatron_hapo.resharding.plan import Channel, Parameter, SendingTask, make_plan
from megatron_hapo.resharding.transfer import Transfer
from megatron_hapo.resharding.transports import Receiver
from megatron_hapo.resharding.weight_buckets import engine_cut
from tests.distributed import run_ranks
from tests.resharding.test_plan import cut
from tests.time_limits import patient
from tests.tiny_families import write_family
from tests.trainer.test_trainer import make_config, make_grid

if TYPE_CHECKING:
    from megatron_hapo.trainer.trainer_rank import TrainerRank

LAYOUTS = [
    {"dp": 2, "ep": 2},
    {"tp": 2, "ep": 2, "sequence_parallel": True},
    {"tp": 2, "etp": 2, "sequence_parallel": True},
]


@pytest.mark.slow
def test_ranks_with_experts(tmp_path: Path) -> None:
    model = write_family(tmp_path / "model", "qwen3_moe")
    (tmp_path / "s").mkdir()
    run_ranks(2, send_everything, model, LAYOUTS, tmp_path / "s", timeout_seconds=400)


def prepared_channels(
    trainer: TrainerRank, engine: Sequence[Sequence[Parameter]], *, rank: int, itemsize: int
) -> list[Channel]:
    """All channels of a plan from these trainer ranks to one engine; each rank is prepared for its own."""
    import torch.distributed as dist

    own: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(own, trainer.own_parameters())
    sizes = matrix_sizes(trainer.shape)
    plan = make_plan(shards_of_ranks(own), engine, sizes, engines=1, itemsize=itemsize, max_copy_bytes=700)
    channels = list(plan.channels())
    mine = tuple(channel for channel in channels if channel.source_rank == rank)
    trainer.prepare_sending(SendingTask(mine, tuple(plan.owned_blocks().get(rank, ()))))
    return channels


def send_everything(rank: int, model: Path, layouts: list[dict[str, Any]], folder: Path) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    state = load_file(model / "model.safetensors")
    for number, layout in enumerate(layouts):
        trainer = TrainerRank(make_config(model, layout), make_grid(make_config(model, layout)))
        engine, sizes = engine_parameters(trainer.shape, 1), matrix_sizes(trainer.shape)
        channels = prepared_channels(trainer, engine, rank=rank, itemsize=4)
        held = {p.name: torch.full((p.rows, p.columns), float("nan")) for p in engine[0]}
        transfer = Transfer(
            folder=str(folder), number=number, plan="p", dtype="float32", slot_bytes=700, deadline_seconds=120
        )
        sources = {channel.source_rank: channel.targets for channel in channels}
        engine_rank = threading.Thread(
            target=Receiver().receive, args=(sources, held, transfer), kwargs={"engine": 0, "engine_rank": 0}
        )
        if rank == 0:
            engine_rank.start()
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, trainer.send_weights(transfer, verify=True))
        if rank == 0:
            engine_rank.join(patient(120))
            whole = {name: state[name].numpy().reshape(size) for name, size in sizes.items()}
            for name, want in cut(whole, engine[0]).items():
                torch.testing.assert_close(
                    held[name], torch.tensor(want).float(), rtol=0, atol=0, equal_nan=True, msg=f"{layout} {name}"
                )
            checks = engine_cut(trainer.shape, tp=1, ep=1)
            assert merge_checksums(sums) == {
                name: checks.checksums(name, state[name]) for name in hf_tensor_shapes(trainer.shape)
            }, layout
        parallel_state.destroy_model_parallel()
