"""A disk that refuses to be written to, told in one line by whatever was writing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hapo.errors import HapoError


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around code that writes weights into the folder.

    Raises:
        HapoError: in the place of what the operating system said, be it as safetensors or Megatron pass it on.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _told(folder, str(error)) from error
    except (AssertionError, CheckpointException) as error:
        # Megatron's writer (0.19) keeps of the error its class only, and rank 0 alone tells it to the caller.
        failures = [str(failure[0]) for failure in getattr(error, "failures", {}).values()]
        told_elsewhere = isinstance(error, CheckpointException) and not failures
        reason = "another rank could not write" if told_elsewhere else " ".join(failures) or str(error)
        if isinstance(error, AssertionError) and "OSError" not in reason:
            raise
        raise _told(folder, reason) from error


def _told(folder: Path, reason: str) -> HapoError:
    # The rank that made the folder may have removed it already.
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    return HapoError(f"{folder}: cannot be written, {free:.1f} GB are free on its disk: {' '.join(reason.split())}")
