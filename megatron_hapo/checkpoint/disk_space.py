"""How much of a disk a run will need, estimated before it starts."""

from __future__ import annotations

import logging
import shutil

from megatron_hapo.checkpoint.model_folder import DTYPE_BYTES
from megatron_hapo.config import Config
from megatron_hapo.errors import ConfigError

logger = logging.getLogger(__name__)

_STATE_BYTES = 12
"""Of the optimizer, per parameter: float32 master weight and two moments."""
_GB = 1e9


def checkpoint_bytes(num_parameters: int, config: Config) -> int:
    """Size of one resumable checkpoint: weights and optimizer state, and a reference model that was replaced."""
    is_plain_float32 = config.trainer.dtype == "float32" and not config.trainer.distributed_optimizer
    state_bytes = 8 if is_plain_float32 else _STATE_BYTES  # without a second copy of the weights
    has_reference = config.algorithm.kl.enabled and config.algorithm.kl.reset_every
    return num_parameters * (DTYPE_BYTES[config.trainer.dtype] * (2 if has_reference else 1) + state_bytes)


def needed_bytes(num_parameters: int, config: Config, *, first_step: int) -> int:
    """Most that the run will have on its disk at once: one checkpoint more than it keeps, and its exports."""
    settings = config.checkpoint

    def multiples(every: int) -> int:
        """Steps to come that are multiples of an interval; 0: none."""
        return max(0, config.steps // every - first_step // every) if every else 0

    at_end = config.steps > first_step and not (settings.every and config.steps % settings.every == 0)
    written = multiples(settings.every) + at_end
    exports = multiples(settings.hf_every) + settings.hf_at_end
    export_bytes = num_parameters * DTYPE_BYTES[config.trainer.dtype]
    return min(written, settings.keep + 1) * checkpoint_bytes(num_parameters, config) + exports * export_bytes


def check_disk_space(num_parameters: int, config: Config, *, first_step: int, existing_bytes: int) -> None:
    """Log how much the run will need, as a warning if that is more than what is free.

    Args:
        first_step: the step that the run resumes from.
        existing_bytes: of checkpoints that will be replaced.
    Raises:
        ConfigError: not even one more checkpoint fits.
    """
    one, needed = checkpoint_bytes(num_parameters, config), needed_bytes(num_parameters, config, first_step=first_step)
    if not needed:
        return
    existing = next(parent for parent in (config.run_dir, *config.run_dir.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    text = (
        f"checkpoints and exports take up to {_size(needed)}: {_size(one)} per checkpoint, and room for "
        f"checkpoint.keep + 1 = {config.checkpoint.keep + 1} of them; {_size(free)} are free on the disk of "
        f"{config.run_dir}"
    )
    if free < min(one, needed) and config.steps > first_step:
        raise ConfigError([f"output_dir: {text}, which is not enough for one"])
    if free + existing_bytes < needed:
        logger.warning("%s: the run will fail unless space is made", text)
    else:
        logger.info("%s", text)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.1f} GB" if num_bytes >= _GB // 10 else f"{num_bytes / 1e6:.1f} MB"
