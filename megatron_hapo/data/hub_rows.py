"""Data sets of the Hugging Face Hub, read by the `datasets` library. Nothing in them is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from megatron_hapo.data.rows import ARROW_ROWS, RowFile, batch_rows, nested_columns
from megatron_hapo.errors import DataError, one_line

_ON_HUB = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.+-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[^:@/]+))?"
)
_FOLDER = re.compile(r"hf:(?P<name>\.{0,2}/[^:@]+|\.{1,2})(:(?P<split>[^:@/]+))?")
_FORM = "must have the form hf:ORG/NAME, hf:ORG/NAME/CONFIG@REVISION:SPLIT or hf:./FOLDER:SPLIT"


@dataclass(frozen=True)
class HubName:
    """A data set and its split, as a config names them."""

    name: str
    """ORG/NAME, or a folder."""
    config: str | None
    revision: str | None
    split: str

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.name.startswith((".", "/"))

    @property
    def stem(self) -> str:
        """What the uids of its prompts begin with."""
        return f"{Path(self.name).name}:{self.split}"


def is_hub_name(path: Path) -> bool:
    """Whether a path is the name of a data set instead."""
    return path.parts[:1] != () and path.parts[0].startswith("hf:")


def parse_hub_name(path: Path) -> HubName:
    """The parts of a name.

    Raises:
        DataError: it has another form.
    """
    text = str(path)
    found = _FOLDER.fullmatch(text) or _ON_HUB.fullmatch(text)
    if found is None:
        raise DataError(f"{text} {_FORM}")
    parts = found.groupdict()
    return HubName(parts["name"], parts.get("config"), parts.get("revision"), parts["split"] or "train")


def open_hub_rows(path: Path) -> RowFile:
    """Columns and rows of a data set, which is downloaded into the library's cache if it is not there.

    Raises:
        DataError: there is no such data set or split, or it is not in the cache and the Hub cannot be reached.
    """
    name = parse_hub_name(path)
    if name.is_folder and not Path(name.name).is_dir():
        raise DataError(f"{path}: no such folder: {name.name}")
    import datasets  # takes a second
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # else it warns of every attempt to reach the Hub
    try:
        table = datasets.load_dataset(name.name, name.config, revision=name.revision, split=name.split)
    # The library raises what its parsers, its cache and the network raise.
    except Exception as error:
        raise DataError(f"{path}: {_reason(error, name)}") from error
    assert isinstance(table, datasets.Dataset)

    def batches() -> Iterator[pa.Table]:
        yield from table.with_format("arrow").iter(batch_size=ARROW_ROWS)  # pyright: ignore[reportReturnType]

    return RowFile(nested_columns(table.features.arrow_schema), len(table) > 0, lambda: batch_rows(batches()))


def _reason(error: Exception, name: HubName) -> str:
    """Why the data set cannot be loaded, in one line, with what to do if the Hub cannot be reached."""
    said = one_line(error).rstrip(".")[:300] or type(error).__name__
    if not isinstance(error, OSError) or name.is_folder or isinstance(error, FileNotFoundError | PermissionError):
        return f"cannot be loaded: {said}"
    local = f"data/{Path(name.name).name}"
    return (
        f"the Hub cannot be reached ({type(error).__name__}), and the data set is not in the cache; where there is a "
        f"network: hf download --repo-type dataset {name.name} --local-dir {local}, then path=hf:./{local}:{name.split}"
    )
