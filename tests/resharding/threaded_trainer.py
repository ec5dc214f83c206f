"""A trainer for weight syncs that holds the shards of a checkpoint; its ranks are threads of the test process."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model.families import hf_tensor_shapes, linear_tensors, read_shape
from megatron_hapo.resharding.channel_ends import BucketHook, ChannelId
from megatron_hapo.resharding.expected import float8_checksums, partial_checksums
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.resharding.layouts import matrix_sizes
from megatron_hapo.resharding.plan import Parameter, SendingTask
from megatron_hapo.resharding.transfer import Transfer
from megatron_hapo.resharding.transports import Sender
from megatron_hapo.resharding.weight_buckets import engine_cut
from tests.resharding.planned_grid import trainer_shards
from tests.resharding.test_plan import cut


class ThreadedTrainer:
    """The part of `protocols.Trainer` that a weight sync needs, over the shards of a checkpoint.

    Tests may set `on_bucket` to inject faults into the senders, and change `tasks`: ranks without a task do not send.

    Args:
        quantized: whether the engines serve float8, which their checksums must be of.
    """

    on_bucket: BucketHook | None = None

    def __init__(
        self,
        folder: Path,
        *,
        engine_tp: int,
        tp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        dp: int = 1,
        ep: int = 1,
        quantized: bool = False,
    ):
        self.shape = read_shape(folder)
        self._cut = engine_cut(self.shape, tp=engine_tp, ep=1)
        sizes = matrix_sizes(self.shape)
        state = load_file(folder / "model.safetensors")
        self._quantized = {name: state[name] for name in sizes} if quantized else None
        whole = {name: state[name].numpy().reshape(size) for name, size in sizes.items()}
        self._parameters: dict[int, tuple[Parameter, ...]] = defaultdict(tuple)
        self.matrices: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for shard in trainer_shards(self.shape, ParallelSizes(tp=tp, pp=pp, vpp=vpp, dp=dp, ep=ep)):
            for rank in shard.ranks:
                self._parameters[rank] += shard.parameters
                held = cut(whole, shard.parameters)
                self.matrices[rank] |= {name: torch.tensor(value, dtype=torch.float32) for name, value in held.items()}

    def broadcast(self, verb: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        return getattr(self, verb.__name__)(*arguments, **options)

    def scatter(self, verb: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
        return self.broadcast(verb, arguments)

    def own_parameters(self) -> list[tuple[Parameter, ...]]:
        return [self._parameters[rank] for rank in sorted(self._parameters)]

    def host(self) -> list[str]:
        return [this_host() for _ in self._parameters]

    def prepare_sending(self, tasks: Sequence[SendingTask]) -> list[None]:
        self.tasks = list(tasks)
        self._senders = [Sender(rank, on_bucket=self._inject) for rank in range(len(tasks))]
        return [None for _ in tasks]

    def _inject(self, channel: ChannelId, number: int, data: torch.Tensor) -> None:
        if self.on_bucket is not None:
            self.on_bucket(channel, number, data)

    def send_weights(self, transfer: Transfer, *, verify: bool) -> list[dict[str, list[int]]]:
        errors: list[Exception] = []

        def one(rank: int, task: SendingTask) -> None:
            try:
                self._senders[rank].send(task.channels, self.matrices[rank], transfer)
            except Exception as error:
                errors.append(error)

        ranks = [threading.Thread(target=one, args=(rank, task)) for rank, task in enumerate(self.tasks)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        if errors:
            raise errors[0]
        if self._quantized is not None:
            linear, dtype = linear_tensors(self.shape), getattr(torch, transfer.dtype)
            return [float8_checksums(self._quantized.items(), linear=linear, cut=self._cut, dtype=dtype)]
        return [
            partial_checksums(
                task.owned_blocks, self.matrices[rank], shapes=hf_tensor_shapes(self.shape), cut=self._cut,
                dtype=getattr(torch, transfer.dtype),
            )
            for rank, task in enumerate(self.tasks)
        ]  # fmt: skip
