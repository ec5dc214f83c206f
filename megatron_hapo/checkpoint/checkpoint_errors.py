"""Failures of reading and writing weights, as one line that names the folder."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


_write_failures: list[BaseException] = []
"""What Megatron's writer has caught in this process since the last `explain_write_errors` began."""


def keep_write_failures() -> None:
    """Patch Megatron's writer (0.19) to keep the errors that it catches, of which it passes on only the class."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer

    original = Writer.write_preloaded_data
    if hasattr(original, "keeps_failures"):
        return

    @functools.wraps(original)
    def write(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if isinstance(result, tuple) and isinstance(result[1], Exception):
            _write_failures.append(result[1])
            if options.get("results_queue") is None:  # the caller's own thread: this error reaches the other ranks
                raise result[1]
        return result

    write.keeps_failures = True  # type: ignore[attr-defined]
    Writer.write_preloaded_data = staticmethod(write)  # type: ignore[method-assign]


@contextlib.contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Wraps code that writes weights into the folder.

    Raises:
        HapoError: instead of the operating system's error, which safetensors and Megatron pass on in their own ways.
    """
    _write_failures.clear()
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, str(error)) from error
    except (AssertionError, CheckpointException) as error:
        # Only rank 0's caller gets to see what other ranks raised.
        failures = " ".join(map(str, _write_failures)) or _failures(error)
        failed_elsewhere = isinstance(error, CheckpointException) and not failures
        reason = "another rank could not write" if failed_elsewhere else failures or str(error)
        if isinstance(error, AssertionError) and not _write_failures and "OSError" not in reason:
            raise
        raise _write_error(folder, reason) from error


def _failures(error: BaseException) -> str:
    """What the ranks raised, from torch's collected failures; empty for any other error."""
    return " ".join(str(failure[0]) for failure in getattr(error, "failures", {}).values())


def _write_error(folder: Path, reason: str) -> HapoError:
    # The rank that made the folder may have removed it already.
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    if "PytorchStreamWriter" in reason:  # torch's text is pages long, and does not say more
        reason = "a file could not be written completely"
    reason = re.sub(r"<class '(\w+)'>", r"\1", " ".join(reason.split()))[:500]
    return HapoError(f"{folder}: cannot be written, {free:.1f} GB are free on its disk: {reason}")
