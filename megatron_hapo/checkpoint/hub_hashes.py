"""Compares a folder from the Hugging Face Hub with the hashes that the Hub stated when it was downloaded.

`hf download --local-dir` records each file's etag in `.cache/huggingface/download/FILE.metadata` (commit, etag, time).
In the Hub's cache a file is a link to a blob that is named by its etag. The etag is the SHA-256 of a large file, and
git's SHA-1 of any other. See https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_RECORDS = Path(".cache") / "huggingface" / "download"
_THREADS = 8
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def hub_differences(folder: Path) -> tuple[int, list[Path]]:
    """The number of files whose hash the Hub stated, and those of them that differ from it.

    Reads these files, at about 1 GB/s and core.
    """
    stated = dict(_stated(folder))
    with ThreadPoolExecutor(_THREADS) as threads:
        agree = threads.map(_agrees, stated, stated.values())
        return len(stated), sorted(path for path, same in zip(stated, agree, strict=True) if not same)


def _stated(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file with its etag."""
    for path in folder.rglob("*"):
        if _RECORDS.parts[0] in path.relative_to(folder).parts or not path.is_file():
            continue
        record = folder / _RECORDS / f"{path.relative_to(folder)}.metadata"
        if record.is_file():
            lines = record.read_text(errors="replace").splitlines()
            etag = lines[1].strip() if len(lines) > 1 else ""
        else:
            target = path.resolve()
            etag = target.name if target.parent.name == "blobs" else ""
        if _ETAG.fullmatch(etag):
            yield path, etag


def _agrees(path: Path, etag: str) -> bool:
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest() == etag
