"""The learning rate of each step: a linear warm-up, then Megatron's curve down to the end of the run."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_hapo.config import Config

_MEGATRON_STYLES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "wsd": "WSD"}


class LearningRate(OptimizerParamScheduler):
    """Megatron's scheduler, with our warm-up, and for the learning rate alone.

    As in Megatron the curve is a function of the steps that have been made, so the step after the warm-up still has the
    peak rate, and `optimizer.min_lr` is what the curve reaches once all steps have been made: with a minimum of 0 the
    last step still changes the weights. The rate depends on the step's number and the settings only; a checkpoint holds
    no state of it.

    Megatron's scheduler also sets the weight decay of every parameter group, to 0 for norms and biases. Here it does
    not: `optimizer.weight_decay` holds for all parameters.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: Config):
        settings = config.optimizer
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            # A constant rate has no horizon, but Megatron requires one beyond the warm-up.
            lr_decay_steps=max(config.steps, settings.warmup_steps + 1),
            lr_decay_style=_MEGATRON_STYLES[settings.schedule],
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=settings.num_decay_steps(config.steps),
            lr_wsd_decay_style="linear",
        )

    def set(self, *, step: int) -> float:
        """Set, and return, the learning rate of a step, which counts from 1."""
        self.num_steps = step - 1
        self.step(0)
        return self.get_lr({})

    def get_lr(self, param_group: dict) -> float:
        """The rate of a parameter group after `num_steps` steps; the first step of the warm-up has more than zero."""
        if self.num_steps <= self.lr_warmup_steps:
            return param_group.get("max_lr", self.max_lr) * min(
                1.0, (self.num_steps + 1) / max(1, self.lr_warmup_steps)
            )
        return super().get_lr(param_group)

    def step(self, increment: int) -> None:
        """Count steps as made, and set every group's learning rate."""
        self.num_steps += increment
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(group)
