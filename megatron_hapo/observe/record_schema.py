"""The files of records: names, columns, metadata. docs/records.md documents them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

FOLDER = "rollouts"
"""Of a run's folder."""
FILE_NAME = re.compile(r"(step|eval)_([0-9]{8})\.parquet")
SCHEMA_VERSION = "2"
READABLE_VERSIONS = ("1", "2")
"""Of files that the viewer shows; a replay needs the newest."""
VERSION_KEY, JOB_KEY = "megatron_hapo.schema", "megatron_hapo.job"
"""Keys of a file's metadata."""
MEASURES = (
    "temperatures", "rollout_log_probs", "old_log_probs", "rollout_temperature_log_probs", "entropies", "h",
    "token_advantages", "importance_ratios", "clip_low", "clip_high",
)  # fmt: skip
"""The columns that hold one float for each response token, or null."""
SCHEMA = pa.schema(
    [
        *[(name, pa.int32()) for name in ("step", "group", "sample")],
        *[(name, pa.string()) for name in ("uid", "data_source", "prompt", "response", "ground_truth", "answer")],
        *[(name, pa.list_(pa.int32())) for name in ("prompt_ids", "response_ids", "token_ends")],
        *[(name, pa.float64()) for name in ("reward", "earned", "correctness")],
        ("reward_parts", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        ("finish_reason", pa.string()),
        ("failure", pa.string()),
        ("advantage", pa.float32()),
        ("policy_versions", pa.list_(pa.int32())),
        *[(name, pa.list_(pa.float32())) for name in MEASURES],
        *[(name, pa.list_(pa.int32())) for name in ("kept_lengths", "kept_ids")],
    ]
)
SINCE_VERSION_2 = ("answer", "earned", "kept_lengths", "kept_ids")
IN_VERSION_1 = {
    **dict.fromkeys(("reward", "correctness"), pa.float32()),
    "reward_parts": pa.map_(pa.string(), pa.float32()),
}
"""Columns that version 1 had in another type."""


@dataclass(frozen=True)
class Origin:
    """The model whose responses are recorded."""

    model: str
    """Fingerprint of the model folder that the run starts from (`checkpoint.model_folder.model_fingerprint`)."""
    vocabulary: str
    """Fingerprint of its tokenizer's tokens with their ids."""


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """A hash that tells the vocabularies of transformers tokenizers apart."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number} {token}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]
