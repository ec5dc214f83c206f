"""Placement colocated: whose turn it is to hold the memory of GPUs that trainer ranks and engines share. Pure.

The order of both turns stands here and nowhere else. Who gives something up does so before the other takes anything,
and the weights travel while neither the optimizer's state nor a KV cache is there, so that the peak is never the sum:

    trainer's turn      engines give back their KV cache and weights; the trainer takes optimizer state and gradient
                        buffers. Scores, updates, checkpoints, exports.
    engines' turn       the trainer gives back gradient buffers and optimizer state; engines take memory for weights;
                        the sync fills it; engines take memory for the KV cache. Rollouts, evaluation.

With placement disaggregated nobody gives anything back, and the engines' turn begins with the sync alone.
"""

from __future__ import annotations

import logging

from megatron_hapo.config import Config
from megatron_hapo.protocols import RolloutPool, Trainer, WeightSync

logger = logging.getLogger(__name__)

KV_CACHE, WEIGHTS = "kv_cache", "weights"
"""What engines give back, under SGLang's names."""
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
"""What trainer ranks give back."""


def given_back_by_engines(config: Config) -> tuple[str, ...]:
    """In their order; nothing if the placement is disaggregated."""
    if config.placement == "disaggregated":
        return ()
    return (KV_CACHE, WEIGHTS) if config.memory_turns.engines == "all" else (KV_CACHE,)


def given_back_by_trainer(config: Config) -> tuple[str, ...]:
    """In their order; nothing if the placement is disaggregated."""
    if config.placement == "disaggregated":
        return ()
    return (GRADIENTS, OPTIMIZER) if config.memory_turns.trainer == "all" else (GRADIENTS,)


def make_room_for_trainer(config: Config, pool: RolloutPool, *, device: str) -> None:
    """Before the trainer is built: engines must find empty GPUs, by which they size their cache, and give all back."""
    if given_back := given_back_by_engines(config):
        pool.wait_until_ready()
        pool.release_memory(given_back)
        logger.info(
            "engines and trainer hold the memory of the same %s in turn: engines give back %s, the trainer %s",
            "GPUs" if device == "cuda" else "machine", ", ".join(given_back), ", ".join(given_back_by_trainer(config)),
        )  # fmt: skip
        if device == "cpu":
            logger.info("on a CPU SGLang cannot give memory back: the turns save memory on the trainer's side alone")


class MemoryTurns:
    """The two turns of a run, which begins in the trainer's: it has been built, and may load a checkpoint.

    Args:
        config: of the run.
        trainer: holds all of its memory.
        pool: has given back what `given_back_by_engines` says.
    """

    def __init__(self, config: Config, trainer: Trainer, pool: RolloutPool, weight_sync: WeightSync):
        self._trainer, self._pool, self._weight_sync = trainer, pool, weight_sync
        self._of_engines, self._of_trainer = given_back_by_engines(config), given_back_by_trainer(config)
        self._trainer_holds = True

    def to_trainer(self) -> None:
        """After this the trainer may score, update, save and load; does nothing in the trainer's turn."""
        if self._trainer_holds:
            return
        if self._of_engines:
            self._pool.release_memory(self._of_engines)
        if self._of_trainer:
            self._trainer.take_memory(self._of_trainer[::-1])
        self._trainer_holds = True

    def to_engines(self, *, policy_version: int) -> None:
        """After this every engine generates with the trainer's weights, under this version."""
        assert self._trainer_holds, "engines have their turn already"
        self._trainer_holds = False
        if self._of_trainer:
            self._trainer.release_memory(self._of_trainer)
        if WEIGHTS in self._of_engines:
            self._pool.take_memory((WEIGHTS,))
        self._weight_sync.sync(policy_version=policy_version)
        if KV_CACHE in self._of_engines:
            self._pool.take_memory((KV_CACHE,))
