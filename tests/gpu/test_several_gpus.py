"""Two GPUs: trainer ranks over NCCL, an engine of two ranks, and a weight sync by NCCL messages."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.resharding.process_group import open_store
from megatron_hapo.resharding.transfer import Rendezvous
from megatron_hapo.types import merge_scores
from tests.gpu.test_engine import run_engine
from tests.gpu.test_trainer import config_for, in_own_process
from tests.gpu.test_transfer import make, transfer_in, value_of
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch

pytestmark = pytest.mark.needs("megatron.core", gpus=2)


def on_two_ranks(function: Any, *arguments: Any) -> list[Any]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        futures = [executor.submit(function, rank, *arguments) for rank in range(2)]
        return [future.result(timeout=600) for future in futures]


def train_rank(rank: int, config: Config, rendezvous: str) -> dict[str, Any]:
    import os

    os.environ["LOCAL_RANK"] = str(rank)
    import torch.distributed as dist

    from megatron_hapo.trainer.rank_process import start_rank

    trainer = start_rank(config, device="cuda", rank=rank, world_size=2, init_method=rendezvous)
    batch = make_batch()
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, trainer.log_probs(batch))
    scores = merge_scores(parts, batch)
    scored = replace(batch, old_log_probs=scores.log_probs, token_data={"modulation": np.zeros_like(scores.log_probs)})
    return {"scores": scores, "update": trainer.update(scored, step=1)}


@pytest.mark.parametrize("layout", [{"cp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_two_ranks_score_and_update_as_one_does(tmp_path: Path, layout: dict[str, int]) -> None:
    """The local layers' attention over sequences of any length, with the pieces of context parallelism."""
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    single = config_for(model, dtype="bfloat16", spec="local")
    values = {**single.model_dump(), "parallel": layout}
    config = Config.model_validate(values)
    alone = in_own_process(single, tmp_path)
    first, last = on_two_ranks(train_rank, config, f"file://{tmp_path / 'two'}")
    difference = np.abs(first["scores"].log_probs - alone["before"].log_probs)
    assert difference.mean() < 0.03
    update = last["update"] or first["update"]
    assert update["grad_norm"] == pytest.approx(alone["updates"][0]["grad_norm"], rel=0.1)


@pytest.mark.needs("sglang", "sgl_kernel")
def test_an_engine_of_two_ranks_passes_its_self_test(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", hidden=256, heads=4, kv_heads=2, head_dim=64)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        rollouts = executor.submit(run_engine, model, 2).result(timeout=900)
    assert all(len(rollout.response_ids) for rollout in rollouts["adaptive"])


def one_end(rank: int, folder: str, rendezvous: Rendezvous) -> list[float]:
    """Two transfers: rank 0 sends, and rank 1 receives what must be the values of each sync."""
    import torch

    from megatron_hapo.resharding.transports import Receiver, Sender

    torch.cuda.set_device(rank)
    held, wanted, channel = make()
    sender, receiver, seen = Sender(0), Receiver(), []
    for sync in range(2):
        transfer = replace(transfer_in(folder, sync), rendezvous=rendezvous)
        if rank == 0:
            matrices = {
                p.name: torch.full((p.rows, p.columns), value_of(i, sync), dtype=torch.bfloat16, device="cuda")
                for i, p in enumerate(held)
            }
            sender.send([channel], matrices, transfer)
            continue
        matrices = {p.name: torch.zeros(p.rows, p.columns, dtype=torch.bfloat16, device="cuda") for p in wanted}
        receiver.receive({0: channel.targets}, matrices, transfer, engine=0, engine_rank=0)
        names = {parameter.name: index for index, parameter in enumerate(held)}
        for source, target in zip(channel.sources, channel.targets, strict=True):
            rows = matrices[target.parameter][target.row : target.row + target.rows]
            place = rows[:, target.column : target.column + target.columns]
            seen.append(float((place - value_of(names[source.parameter], sync)).abs().max()))
    return seen


@pytest.mark.parametrize("hosts", [(0, 1), (0, 0)], ids=["NCCL", "shared memory between GPUs"])
def test_weights_go_from_one_gpu_to_another(tmp_path: Path, hosts: tuple[int, int]) -> None:
    store, port = open_store("127.0.0.1")
    rendezvous = Rendezvous(
        host="127.0.0.1", port=port, generation=0, trainer_ranks=1, engine_ranks=1, ranks_per_engine=1,
        backend="nccl", hosts=hosts,
    )  # fmt: skip
    _, differences = on_two_ranks(one_end, str(tmp_path), rendezvous)
    assert differences
    assert max(differences) == 0
    del store
