"""Progress bars for reading and writing weights, on stderr."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[int], None]
"""Called with the number of bytes that have been moved since the last call."""


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, *, show: bool) -> Iterator[Progress]:
    """A progress bar over `total` bytes; None shows only that work goes on."""
    if not show:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
        bar.update(task, total=total or 1, completed=total or 1)


@contextlib.contextmanager
def folder_growth_bar(folder: Path, what: str, total: int, *, show: bool) -> Iterator[None]:
    """A progress bar over the growth of a folder to `total` bytes, for a writer that reports nothing itself."""
    if not show:
        yield
        return
    end = threading.Event()

    def watch(progress: Progress) -> None:
        seen = 0
        while not end.wait(0.5):
            size = 0
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # renamed just now
                    size += path.stat().st_size
            progress(size - seen)
            seen = size

    with progress_bar(what, total, show=True) as progress:
        thread = threading.Thread(target=watch, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
