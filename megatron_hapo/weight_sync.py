"""The trainer's weights into the engines, without a checkpoint: whole tensors, gathered and sent in buckets."""

from __future__ import annotations

from megatron_hapo.protocols import RolloutPool, Trainer


class GatherSync:
    """Every tensor is gathered from its tensor-parallel shards and loaded under its Hugging Face name.

    The engines' parameters are compared with the trainer's checksums on the first and every `verify_every`-th sync.
    """

    def __init__(self, trainer: Trainer, pool: RolloutPool, *, verify_every: int):
        self._trainer, self._pool, self._verify_every = trainer, pool, verify_every
        self._num_syncs = 0

    def sync(self, *, policy_version: int) -> None:
        verify = self._num_syncs % self._verify_every == 0
        self._pool.update_weights(self._trainer.weight_buckets(verify=verify), policy_version=policy_version)
        self._num_syncs += 1
