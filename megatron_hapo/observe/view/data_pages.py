"""The data of the viewer's pages, as JavaScript files that the pages load one by one.

A page opened from disk may load scripts but not fetch files, so each data file calls `hapo.receive(name, data)`.
Strings are JSON, escaped to ASCII. Arrays of token values are base64 of little-endian float32 or int32: exact, and fast
to read.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from megatron_hapo.observe.view.record_files import TOKEN_VALUES, RecordedRun, RecordFile
from megatron_hapo.observe.view.token_statistics import measures, response_means, scales, token_statistics

PREVIEW = 160
TEXT_CHUNK = 2_000_000
"""Characters of responses in one file for the search."""
GROUPS_AT_ONCE = 64
OVERVIEWS = 16
"""Files about whole runs and steps that stay in memory: every page needs some of them."""


class DataPages:
    """All data files of a viewer, by name: `index`, `0/prompts`, `0/step_00000012/summary`, `.../group_5` and so on."""

    def __init__(self, runs: Sequence[RecordedRun]):
        self._runs = runs
        self._files = {(str(i), file.name): file for i, run in enumerate(runs) for file in run.files}
        self._overview = lru_cache(maxsize=OVERVIEWS)(self._new_text)

    def all(self) -> Iterator[tuple[str, str]]:
        """Name and text of every data file."""
        yield "index", self.text("index")
        for number in range(len(self._runs)):
            yield f"{number}/prompts", self.text(f"{number}/prompts")
        for (number, file_name), file in self._files.items():
            prefix = f"{number}/{file_name}"
            for name in ("summary", "tokens", *(f"text_{i}" for i in range(len(_text_chunks(file))))):
                yield f"{prefix}/{name}", self.text(f"{prefix}/{name}")
            groups = sorted(set(file.column("group")))
            for start in range(0, len(groups), GROUPS_AT_ONCE):
                some = groups[start : start + GROUPS_AT_ONCE]
                for group, rows in groupby(file.responses(some[0], some[-1]), key=lambda row: row["group"]):
                    yield f"{prefix}/group_{group}", _script(f"{prefix}/group_{group}", _group(list(rows)))

    def text(self, name: str) -> str:
        """The JavaScript of one data file.

        Raises:
            KeyError: there is no such file.
        """
        is_large = name.rpartition("/")[2].startswith(("group_", "text_"))
        return self._new_text(name) if is_large else self._overview(name)

    def _new_text(self, name: str) -> str:
        match name.split("/"):
            case ["index"]:
                return _script(name, {"runs": [_run(run) for run in self._runs]})
            case [number, "prompts"] if number in map(str, range(len(self._runs))):
                return _script(name, _prompts(self._runs[int(number)]))
            case [number, file_name, part]:
                return _script(name, self._part(self._files[number, file_name], part))
        raise KeyError(name)

    def _part(self, file: RecordFile, part: str) -> Any:
        kind, _, number = part.partition("_")
        if kind in ("group", "text") and not (number.isascii() and number.isdigit() and len(number) < 10):
            raise KeyError(part)
        match kind:
            case "summary":
                return _summary(file)
            case "tokens":
                return token_statistics(file)
            case "text":
                chunks = _text_chunks(file)
                if int(number) >= len(chunks):
                    raise KeyError(part)
                first, last = chunks[int(number)]
                return {"first": first, "responses": file.column("response")[first:last]}
            case "group":
                rows = file.responses(int(number), int(number))
                if not rows:
                    raise KeyError(part)
                return _group(rows)
        raise KeyError(part)


def _script(name: str, data: Any) -> str:
    return f"hapo.receive({json.dumps(name)}, {json.dumps(data, allow_nan=False, separators=(',', ':'))});\n"


def _run(run: RecordedRun) -> dict[str, Any]:
    return {"name": run.name, "files": list(map(_file, run.files))}


def _file(file: RecordFile) -> dict[str, Any]:
    """What the list of steps says of a file; means over its responses."""
    groups, rewards, correctness = map(file.column, ("group", "reward", "correctness"))
    correct = [value >= 1 for value in correctness if value is not None]
    return {
        "name": file.name, "step": file.step, "evaluation": file.is_evaluation, "job": _plain(file.job),
        "responses": len(groups), "groups": len(set(groups)), "tokens": _mean(file.lengths.tolist()),
        "reward": _mean([value for value in map(_number, rewards) if value is not None]), "correct": _mean(correct),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _plain(value: Any) -> Any:
    """The JSON value without the numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _prompts(run: RecordedRun) -> dict[str, list[list[Any]]]:
    """Where each prompt of a run occurs: `source uid` -> name of a file and group."""
    places: dict[str, list[list[Any]]] = {}
    for file in run.files:
        keys = zip(file.column("data_source"), file.column("uid"), file.column("group"), strict=True)
        for source, uid, group in dict.fromkeys(keys):
            places.setdefault(f"{source} {uid}", []).append([file.name, group])
    return places


def _summary(file: RecordFile) -> dict[str, Any]:
    """One value per response and per group: what the page of a step lists, sorts and filters."""
    values = measures(file)
    columns = {name: file.column(name) for name in ("group", "sample", "data_source", "finish_reason", "failure")}
    numbers = {name: list(map(_number, file.column(name))) for name in ("reward", "correctness", "advantage")}
    uids, prompts = file.column("uid"), file.column("prompt")
    firsts = [i for i, group in enumerate(columns["group"]) if i == 0 or group != columns["group"][i - 1]]
    return {
        "rows": {
            **columns,
            **numbers,
            "length": file.lengths.tolist(),
            "preview": [_preview(text) for text in file.column("response")],
            **{name: response_means(values[name], file.lengths) for name in ("entropy", "temperature", "mismatch")},
        },
        "groups": {
            "first": firsts,
            "uid": [uids[i] for i in firsts],
            "prompt": [prompts[i][-PREVIEW * 3 :] for i in firsts],
        },
        "scales": scales(values),
        "num_texts": len(_text_chunks(file)),
    }


def _preview(text: str) -> str:
    return text if len(text) <= 2 * PREVIEW else f"{text[:PREVIEW]} … {text[-PREVIEW:]}"


@lru_cache(maxsize=16)
def _text_chunks(file: RecordFile) -> list[tuple[int, int]]:
    """First and last + 1 row of each file for the search."""
    chunks, first, size = [], 0, 0
    lengths = [len(text) for text in file.column("response")]
    for row, length in enumerate(lengths):
        if size and size + length > TEXT_CHUNK:
            chunks.append((first, row))
            first, size = row, 0
        size += length
    return [*chunks, (first, len(lengths))]


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All responses to one prompt, with everything about their tokens."""
    first = rows[0]
    return {
        "uid": first["uid"], "data_source": first["data_source"], "prompt": first["prompt"],
        "ground_truth": first["ground_truth"], "samples": [_sample(row) for row in rows],
    }  # fmt: skip


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    parts = {name: _number(value) for name, value in row["reward_parts"].items()}
    return {
        **{name: row[name] for name in ("sample", "response", "finish_reason", "failure")},
        **{name: _number(row[name]) for name in ("reward", "correctness", "advantage")},
        "parts": parts,
        "ids": _encoded(row["response_ids"], "<i4"),
        "ends": _encoded(utf16_ends(row["response"], row["token_ends"]), "<i4"),
        "values": {name: _encoded(row[name], "<f4") for name in TOKEN_VALUES if row[name] is not None},
    }


def _encoded(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype)).decode()


def utf16_ends(text: str, ends: np.ndarray) -> np.ndarray:
    """The ends in UTF-16 code units, in which JavaScript counts: characters beyond U+FFFF count twice."""
    if not text or max(text) <= "\uffff":
        return ends
    wide = np.fromiter((character > "\uffff" for character in text), dtype=np.int64, count=len(text))
    before = np.concatenate([[0], np.cumsum(wide)])
    return ends + before[np.clip(ends, 0, len(text))]
