"""Model folders: the index, config and tokenizer beside the weights, and writing a folder atomically."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_hapo.errors import ConfigError

INDEX = "model.safetensors.index.json"
# Files that make a folder of weights usable: config, tokenizer, chat template, generation settings.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json")
_COMPANIONS += ("merges.txt", "chat_template*", "added_tokens.json")


def is_megatron_folder(folder: Path) -> bool:
    """Whether the folder holds a torch_dist checkpoint: a converted model, or a checkpoint of a run."""
    try:
        return json.loads((folder / "metadata.json").read_text()).get("sharded_backend") == "torch_dist"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def partial_folder(folder: Path) -> Path:
    """The path under which a folder is written until it is complete."""
    return folder.with_name(folder.name + ".partial")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which replaces `folder` at the end; an exception removes it.

    Leftovers of an earlier, killed attempt are removed first. An existing `folder` stays until the new one is complete.
    """
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def finish_folder(folder: Path, source: Path, weight_map: dict[str, str], dtype: str) -> None:
    """Add index, config and tokenizer to the weight files, so that transformers can load the folder."""
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    copy_companions(source, folder, dtype)


def copy_companions(source: Path, folder: Path, dtype: str) -> None:
    """Copy a model's config (with this dtype), generation config, tokenizer and chat template into a folder."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy2(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def config_dtype(folder: Path) -> str:
    """The dtype that a model's config names: float32, bfloat16 or float16."""
    config = json.loads((folder / "config.json").read_text())
    dtype = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None), "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError([f"{folder / 'config.json'}: dtype {dtype!r} is not supported"])
    return dtype
