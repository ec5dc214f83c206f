"""TensorBoard's event file, which must never end a run: if it cannot be written, one warning says so."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes scalars; a context manager. After the first failure it does nothing more.

    Args:
        purge_step: TensorBoard hides earlier events from this step on.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        self._folder, self._purge_step = folder, purge_step
        self._writer: Any = None

    def __enter__(self) -> TensorBoard:
        from torch.utils.tensorboard import SummaryWriter  # imports torch

        self._previous_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as failure:
                self._give_up(failure)
        threading.excepthook = self._previous_hook

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write these metrics, and wait until the file has them."""
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:  # the writer's thread passes its own errors on
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("TensorBoard's curves are not written any more: %s: %s", self._folder, error.strerror or error)
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of TensorBoard's thread: `add` gets its error as well."""
        if type(arguments.thread).__module__.startswith("tensorboard."):
            return
        self._previous_hook(arguments)
