"""What makes a folder of weights a Hugging Face model: index, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

INDEX = "model.safetensors.index.json"
# What makes the folder usable by others: tokenizer, chat template, generation settings.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json")
_COMPANIONS += ("merges.txt", "chat_template*", "added_tokens.json")


def start_folder(folder: Path) -> None:
    """An empty folder to write into; what an earlier export left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def finish_folder(folder: Path, source: Path, weight_map: dict[str, str], dtype: str) -> None:
    """Index, config and tokenizer beside the weight files: after this the folder loads in transformers."""
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy2(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
