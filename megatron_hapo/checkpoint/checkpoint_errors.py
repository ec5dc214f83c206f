"""Failures of reading and writing weights, as one line that names the folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hapo.errors import ConfigError, HapoError


@contextlib.contextmanager
def explain_load_errors(folder: Path) -> Iterator[None]:
    """Wraps Megatron's loading of a checkpoint whose metadata has been read.

    Raises:
        ConfigError: the checkpoint holds another model.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException  # `quantize` runs without Megatron

    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, KeyError) as error:
        # torch passes on what any rank raised, with the tracebacks in its message.
        message = " ".join((_failures(error) or str(error)).split())[:500]
        raise ConfigError([f"model.path: {folder} does not hold the model of its config.json: {message}"]) from error


@contextlib.contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Wraps code that writes weights into the folder.

    Raises:
        HapoError: instead of the operating system's error, which safetensors and Megatron pass on in their own ways.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, str(error)) from error
    except (AssertionError, CheckpointException) as error:
        # Megatron's writer (0.19) keeps only the class of the error, and only rank 0's caller gets to see it.
        failures = _failures(error)
        failed_elsewhere = isinstance(error, CheckpointException) and not failures
        reason = "another rank could not write" if failed_elsewhere else failures or str(error)
        if isinstance(error, AssertionError) and "OSError" not in reason:
            raise
        raise _write_error(folder, reason) from error


def _failures(error: BaseException) -> str:
    """What the ranks raised, from torch's collected failures; empty for any other error."""
    return " ".join(str(failure[0]) for failure in getattr(error, "failures", {}).values())


def _write_error(folder: Path, reason: str) -> HapoError:
    # The rank that made the folder may have removed it already.
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    return HapoError(f"{folder}: cannot be written, {free:.1f} GB are free on its disk: {' '.join(reason.split())}")
