"""Damaged records, for the commands that read them: the viewer and a replay."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.checkpoint.model_folder import model_fingerprint
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.observe.record_schema import vocabulary_fingerprint
from tests.observe.recorded import HOSTILE, SCHEMA, response, write_records

COMMANDS = (
    ("view", "runs/old"),
    ("view", "runs/old", "runs/old", "--out", "pages"),
    ("train", "run.yaml", "replay=runs/old/rollouts", "steps=1", "batch.prompts_per_step=2",
     "batch.samples_per_prompt=2", "batch.prompts_per_minibatch=2", "name=again"),
)  # fmt: skip
NO_PARQUET = {"empty": b"", "text": b"x", "magic": b"PAR1PAR1", "zeros": b"PAR1" + bytes(64) + b"PAR1"}
"""Files that only look like parquet."""
FILE = "runs/old/rollouts/step_00000001.parquet"
SCHEMA_KEY, JOB_KEY = "megatron_hapo.schema", "megatron_hapo.job"
_SOME_VALUES = {
    pa.string(): "x", pa.int64(): 1, pa.bool_(): True, pa.list_(pa.string()): ["x"], pa.list_(pa.float64()): [1.5],
    pa.null(): None,
}  # fmt: skip
_JSON_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 0.5, 1e30, float("inf"), float("nan"), 10**30, "", "x", [], {}, [1], {"a": 1}, {"a": None},
)  # fmt: skip
_VOCABULARIES: dict[str, str] = {}
"""Of model folders, by their fingerprints."""
Damage = Callable[[Path], object]


def record_inputs() -> Iterator[tuple[str, tuple[str, ...], Damage]]:
    """Name, command and damage of each input, drawn for each alone: a new column leaves the others as they are."""
    for name, damage in _damages():
        command = random.Random(name).choice(COMMANDS)
        yield f"records {name} {command[0]}", command, damage
    for key in ("step", "num_groups", "temperature", "origin", "origin.model", "collection", "collection.kept_share",
                "collection.metrics", "collection.prompts"):  # fmt: skip
        for value in random.Random(key).sample(_JSON_VALUES, 4):
            yield (
                f"job {key}={json.dumps(value)}",
                COMMANDS[2],
                lambda folder, key=key, value=value: _write(folder, {key: value}),
            )
    for command in COMMANDS:
        yield f"records sound {command[0]} {len(command)}", command, _write
    for folder in ("none", "train.jsonl", "loop.yaml", "model", "\0", "a" * 5000, "/dev/zero", "''"):
        shown = ascii(folder[:20])
        yield f"view of {shown}", ("view", folder), _write
        yield f"view into {shown}", ("view", "runs/old", "--out", folder), _write
        yield f"replay of {shown}", ("train", "run.yaml", f"replay={folder}"), _write
    yield "view of nothing", ("view",), _write
    yield "view served and written", ("view", "runs/old", "--serve", "--out", "x"), _write
    yield "report page", ("report", "runs/old", "--html"), _with_metrics
    yield "report page of nothing", ("report", "model", "--html"), _write


def _damages() -> Iterator[tuple[str, Damage]]:
    for name, content in NO_PARQUET.items():
        yield name, lambda folder, content=content: _damaged_bytes(folder, lambda _: content)
    for number in range(12):
        share = random.Random(f"cut {number}").random()
        yield (
            f"cut {number}",
            lambda folder, share=share: _damaged_bytes(folder, lambda data: data[: int(share * len(data))]),
        )
    for number in range(12):
        seed = random.Random(f"noise {number}").random()
        yield f"noise {number}", lambda folder, seed=seed: _damaged_bytes(folder, lambda data: _noise(data, seed))
    for column in SCHEMA.names:
        yield f"without {column}", lambda folder, column=column: _changed(folder, lambda t: t.drop_columns([column]))
        kind = random.Random(column).choice([kind for kind in _SOME_VALUES if kind != SCHEMA.field(column).type])
        yield (
            f"{column} as {kind}",
            lambda folder, column=column, kind=kind: _changed(folder, lambda table: _as(table, column, kind)),
        )
        yield (
            f"{column} null",
            lambda folder, column=column: _changed(folder, lambda table: _as(table, column, SCHEMA.field(column).type)),
        )
    for number, job in enumerate(("", "[", "1", "null", "[" * 20_000, '{"step": "x"}', "\xff", '{"step": NaN}')):
        yield f"job {number}", lambda folder, job=job: _changed(folder, lambda t: _labelled(t, {JOB_KEY: job}))
    for version in ("", "0", "3", "x" * 5000, "\xff\n"):
        yield (
            f"schema {version[:5]!a}",
            lambda folder, version=version: _changed(folder, lambda table: _labelled(table, {SCHEMA_KEY: version})),
        )
    yield "no metadata", lambda folder: _changed(folder, lambda table: table.replace_schema_metadata(None))
    yield "no rows", lambda folder: _changed(folder, lambda table: table.slice(0, 0))
    yield "lengths", lambda folder: write_records(folder / "runs/old", "step_00000001", [response(["a"], h=[1.0, 2.0])])
    yield (
        "ends beyond",
        lambda folder: write_records(
            folder / "runs/old", "step_00000001", [response(["a", "b"], token_ends=[-5, 2**31 - 1])]
        ),
    )
    yield "huge numbers", lambda folder: write_records(
        folder / "runs/old", "step_00000001",
        [response(["a"], group=2**31 - 1, sample=-(2**31), entropies=[float("inf")], h=[float("nan")], reward=1e308)],
    )  # fmt: skip
    yield "a folder", lambda folder: (folder / FILE).mkdir(parents=True)


def _write(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """Sound records of a step of two groups, with which a replay can train the model in `model`.

    Args:
        changes: of the metadata, by dotted keys.
    """
    pieces = ["So", " 1", "\n"], [HOSTILE, " and"], ["日", "", "😀"], ["x"]
    rows = [
        response(line, seed=i, group=i // 2, sample=i % 2, uid=f"p{i // 2}", response_ids=list(range(len(line))))
        for i, line in enumerate(pieces)
    ]
    model = model_fingerprint(folder / "model")
    if model not in _VOCABULARIES:
        _VOCABULARIES[model] = vocabulary_fingerprint(load_tokenizer(folder / "model"))
    job = {
        "name": "old", "step": 1, "num_groups": 2, "temperature": 1.0,
        "origin": {"model": model, "vocabulary": _VOCABULARIES[model]},
        "collection": {"kept_share": 1.0, "metrics": {}, "prompts": 1},
    }  # fmt: skip
    path = write_records(folder / "runs/old", "step_00000001", rows)
    pq.write_table(_labelled(pq.read_table(path), {JOB_KEY: json.dumps(_put(job, changes or {}))}), path)


def _put(job: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The job with other values under dotted keys."""
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (job[section] if section else job)[last] = value
    return job


def _with_metrics(folder: Path) -> None:
    _write(folder)
    (folder / "runs/old/metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    (folder / "runs/old/view/data/0/step_<script>").mkdir(parents=True)
    (folder / "runs/old/view/index.html").write_text("")


def _damaged_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    _write(folder)
    (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def _noise(data: bytes, seed: float) -> bytes:
    """A tenth of the bytes replaced."""
    draw, noisy = random.Random(seed), bytearray(data)
    start = draw.randrange(len(data) * 9 // 10)
    length = len(data) // 10
    noisy[start : start + length] = draw.randbytes(length)
    return bytes(noisy)


def _changed(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    _write(folder)
    pq.write_table(change(pq.read_table(folder / FILE)), folder / FILE)


def _as(table: pa.Table, column: str, kind: pa.DataType) -> pa.Table:
    """The table with a column of this type; of nulls only if it is the column's own type."""
    values = [None if kind == table.schema.field(column).type else _SOME_VALUES[kind]] * len(table)
    return table.set_column(table.schema.get_field_index(column), column, pa.array(values, kind))


def _labelled(table: pa.Table, changes: dict[str, str]) -> pa.Table:
    metadata = {key.decode(): value for key, value in table.schema.metadata.items()}
    return table.replace_schema_metadata(metadata | changes)
