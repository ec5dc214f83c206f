"""Records of a run that never was: hostile text, any script, byte-level tokens, missing updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_hapo.observe.record_tables import row_groups, write_row_groups

FLOATS = (
    "temperatures", "rollout_log_probs", "old_log_probs", "rollout_temperature_log_probs", "entropies", "h",
    "token_advantages", "importance_ratios", "clip_low", "clip_high",
)  # fmt: skip
TRAINER = ("policy_versions", *FLOATS[2:])
SCHEMA = pa.schema(
    [
        *[(name, pa.int32()) for name in ("step", "group", "sample")],
        *[(name, pa.string()) for name in ("uid", "data_source", "prompt", "response", "ground_truth", "answer")],
        *[(name, pa.list_(pa.int32())) for name in ("prompt_ids", "response_ids", "token_ends")],
        *[(name, pa.float64()) for name in ("reward", "earned", "correctness")],
        ("reward_parts", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        ("finish_reason", pa.string()), ("failure", pa.string()), ("advantage", pa.float32()),
        ("policy_versions", pa.list_(pa.int32())), *[(name, pa.list_(pa.float32())) for name in FLOATS],
        *[(name, pa.list_(pa.int32())) for name in ("kept_lengths", "kept_ids")],
    ],
    metadata={"megatron_hapo.schema": "2", "megatron_hapo.job": json.dumps({"name": "fixture"})},
)  # fmt: skip
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"


def response(pieces: list[str], *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """One row; each piece is the text that one token completes, empty within a character."""
    draw, count = np.random.default_rng(seed), len(pieces)
    signed = {name: draw.normal(size=count).astype(np.float32) for name in ("h", "token_advantages")}
    log_probs = -draw.exponential(size=count).astype(np.float32)
    values = {
        **signed,
        "temperatures": (1 + 0.2 * np.tanh(signed["h"])).astype(np.float32),
        "entropies": draw.exponential(size=count).astype(np.float32),
        "rollout_log_probs": log_probs,
        "rollout_temperature_log_probs": log_probs + draw.normal(scale=1e-3, size=count).astype(np.float32),
        "old_log_probs": log_probs - np.float32(0.01),
        "importance_ratios": np.exp(draw.normal(scale=0.2, size=count)).astype(np.float32),
        "clip_low": np.full(count, 0.2, np.float32),
        "clip_high": np.full(count, 0.28, np.float32),
    }
    row = {
        "step": 1, "group": 0, "sample": 0, "uid": "p0", "data_source": "arithmetic", "prompt": "1 + 1 =",
        "response": "".join(pieces), "ground_truth": "2", "answer": "2", "earned": None, "prompt_ids": [1, 2],
        "response_ids": [sum(piece.encode()) % 5000 for piece in pieces],
        "token_ends": np.cumsum([len(piece) for piece in pieces]).tolist(), "reward": 1.0, "correctness": 1.0,
        "reward_parts": [{"name": "exact", "value": 1.0}], "finish_reason": "stop", "failure": None, "advantage": 0.5,
        "policy_versions": [0] * count, **{name: array.tolist() for name, array in values.items()},
    }  # fmt: skip
    return {"kept_lengths": None, "kept_ids": None} | row | changes


def write_records(run_dir: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A file of records in a run's folder."""
    path = run_dir / "rollouts" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    tokens = [len(row["response_ids"] or ()) for row in rows]
    write_row_groups(path, [table.slice(first, last - first) for first, last in row_groups(tokens)])
    return path


def some_rows(step: int = 1) -> list[dict[str, Any]]:
    """Three groups: arithmetic with a cut and a failed response, hostile text, and text of several scripts."""
    words = ["So", " 1", " +", " 1", "\n", " is", " 2", "."]
    scripts = ["日本", "語", " العر", "بية", " हिन्", "दी", "", "", "", "😀", " é", "\u202e", "ab", "\t", "\x07"]
    rows = [response(words, seed=step * 10 + i, sample=i) for i in range(4)]
    rows[1] |= {"finish_reason": "length", "reward": -0.5, "correctness": 0.0}
    rows[2] |= {"failure": "timeout", "reward": 0.0, "correctness": 0.0}
    rows[3] |= dict.fromkeys(FLOATS[5:])  # no update saw it
    rows += [response([HOSTILE, " and", " so"], seed=4, group=1, uid="p1", data_source="strings", prompt=HOSTILE)]
    rows += [response(scripts, seed=5 + i, group=2, sample=i, uid="p2", data_source="strings") for i in range(2)]
    return [row | {"step": step} for row in rows]
