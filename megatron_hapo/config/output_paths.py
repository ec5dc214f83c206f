"""Whether files and folders can be written, tried before any work starts; nothing is left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path


def folder_fault(folder: Path) -> str | None:
    """Why files cannot be written into a folder, which need not exist yet; None if they can."""
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        if not existing.is_dir():
            return f"cannot be written: {existing} is not a folder"
        with tempfile.TemporaryDirectory(prefix=".megatron-hapo-", dir=existing):
            return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of symbolic links
        return f"cannot be written: {getattr(error, 'strerror', None) or 'not a usable path'}"


def _is_there(path: Path) -> bool:
    """Whether something has this name; a symbolic link to nothing counts, since no folder can be made there."""
    return path.is_symlink() or path.exists()


def content_faults(folder: Path, *, files: tuple[str, ...], folders: tuple[str, ...]) -> list[str]:
    """Entries of a folder that are in the way of the files and folders of these names.

    The folder itself must pass `folder_fault`.
    """
    wrong = [(name, "file") for name in files if (folder / name).exists() and not (folder / name).is_file()]
    wrong += [(name, "folder") for name in folders if (folder / name).exists() and not (folder / name).is_dir()]
    return [f"cannot be written: {folder / name} is in the way: it is not a {kind}" for name, kind in wrong]
