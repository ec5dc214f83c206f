"""Colocated placement: who holds the memory of the GPUs that trainer ranks and engines share, trainer or engines. Pure.

Only this module knows the order of both turns. One side releases its memory before the other allocates, and the weights
are synced while neither the optimizer's state nor a KV cache is allocated, so that the peak is never the sum of both:

    trainer's turn      engines release KV cache and weights; the trainer takes optimizer state and gradient buffers.
                        Scores, updates, checkpoints, exports.
    engines' turn       the trainer releases gradient buffers and optimizer state; engines take memory for weights; the
                        sync fills it; engines take memory for the KV cache. Rollouts, evaluation.

With placement=disaggregated nothing is released, and the engines' turn only begins with the sync.
"""

from __future__ import annotations

import logging
import threading

from megatron_hapo.config import Config
from megatron_hapo.errors import RolloutError
from megatron_hapo.protocols import RolloutEngine, RolloutPool, Trainer, TrainerWorker, WeightSync
from megatron_hapo.weight_sync import with_living_engines

logger = logging.getLogger(__name__)

KV_CACHE, WEIGHTS = "kv_cache", "weights"
"""What engines release, under SGLang's names."""
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
"""What trainer ranks release."""
_PATIENCE_SECONDS = 60
"""An engine that does not answer for this long counts as dead."""


def released_by_engines(config: Config) -> tuple[str, ...]:
    """What engines release in the trainer's turn, in this order; nothing if the placement is disaggregated."""
    if config.placement == "disaggregated":
        return ()
    return (KV_CACHE, WEIGHTS) if config.memory_turns.engines == "all" else (KV_CACHE,)


def released_by_trainer(config: Config) -> tuple[str, ...]:
    """What the trainer releases in the engines' turn, in this order; nothing if the placement is disaggregated."""
    if config.placement == "disaggregated":
        return ()
    return (GRADIENTS, OPTIMIZER) if config.memory_turns.trainer == "all" else (GRADIENTS,)


def make_room_for_trainer(config: Config, pool: RolloutPool, *, device: str) -> None:
    """Before the trainer is built: engines start, size their caches by the empty GPUs, and release their memory."""
    if released := released_by_engines(config):
        pool.wait_until_ready()
        pool.broadcast(RolloutEngine.release_memory, released)
        logger.info(
            "engines and trainer use the memory of the same %s in turn: engines release %s, the trainer %s",
            "GPUs" if device == "cuda" else "machine", ", ".join(released), ", ".join(released_by_trainer(config)),
        )  # fmt: skip
        if device == "cpu":
            logger.info("on a CPU SGLang cannot release memory: only the trainer's side saves any")


class MemoryTurns:
    """The two turns of a run. It begins in the trainer's turn: the trainer is built, and may load a checkpoint.

    Engines that have died are replaced before they are called. A new engine holds all of its memory, whosever turn it
    is; the next sync brings its weights.

    Args:
        config: of the run.
        trainer: holds all of its memory. Used by the thread that calls this constructor only.
        pool: has released what `released_by_engines` says.
        weight_sync: brings the trainer's weights into the pool's engines.
    """

    def __init__(self, config: Config, trainer: Trainer, pool: RolloutPool, weight_sync: WeightSync):
        self._trainer, self._pool, self._weight_sync = trainer, pool, weight_sync
        self._engine_parts, self._trainer_parts = released_by_engines(config), released_by_trainer(config)
        self._num_engines = config.rollout.engines
        self._is_trainers_turn = True
        self._thread, self._policy_version = threading.get_ident(), 0

    def to_trainer(self) -> None:
        """After this the trainer may score, update, save and load; does nothing in the trainer's turn."""
        if self._is_trainers_turn:
            return
        if self._engine_parts:
            self._pool.replace_dead_engines(patience_seconds=_PATIENCE_SECONDS)
            self._pool.broadcast(RolloutEngine.release_memory, self._engine_parts)
        if self._trainer_parts:
            self._trainer.broadcast(TrainerWorker.take_memory, self._trainer_parts[::-1])
        self._is_trainers_turn = True

    def to_engines(self, *, policy_version: int) -> None:
        """After this every engine generates with the trainer's weights, under this version."""
        assert self._is_trainers_turn, "it is the engines' turn already"
        self._is_trainers_turn, self._policy_version = False, policy_version
        if self._trainer_parts:
            self._trainer.broadcast(TrainerWorker.release_memory, self._trainer_parts)
        if WEIGHTS in self._engine_parts:
            self._pool.replace_dead_engines(patience_seconds=_PATIENCE_SECONDS)
            self._pool.broadcast(RolloutEngine.take_memory, (WEIGHTS,))
        with_living_engines(
            lambda: self._sync(policy_version),
            lambda: self._pool.replace_dead_engines(patience_seconds=_PATIENCE_SECONDS),
            num_engines=self._num_engines,
            error=RolloutError,
        )

    def _sync(self, policy_version: int) -> None:
        self._weight_sync.sync(policy_version=policy_version)
        if KV_CACHE in self._engine_parts:
            self._pool.broadcast(RolloutEngine.take_memory, (KV_CACHE,))

    def restore_engines(self) -> bool:
        """In the engines' turn: brings the current weights into engines whose predecessors have died.

        Returns:
            False, without a sync, outside of the engines' turn or in a thread that may not use the trainer.
        """
        if self._is_trainers_turn or threading.get_ident() != self._thread:
            return False
        self._weight_sync.sync(policy_version=self._policy_version)
        return True
