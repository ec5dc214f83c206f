"""Model folders: the index, config and tokenizer beside the weights, and writing a folder atomically."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from megatron_hapo.checkpoint.manifest import sync_folder, write_manifest
from megatron_hapo.errors import ConfigError

INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Files that make a folder of weights usable: config, tokenizer, chat template, generation settings.
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json")
_COMPANIONS += ("merges.txt", "chat_template*", "added_tokens.json")
_MODEL_FILES = ("*.safetensors", "*.distcp", "config.json", "tokenizer.json", "vocab.json")
_SAMPLE_BYTES = 1 << 20


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
def atomic_folder(folder: Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """An empty folder to write into, which gets a manifest and replaces `folder` at the end; an exception removes it.

    Leftovers of an earlier, killed attempt are removed first. An existing `folder` stays until the new one is complete
    and on the disk.

    Args:
        known: see `write_manifest`; may be filled until the end.
    """
    partial, replaced = partial_folder(folder), folder.with_name(folder.name + ".replaced.partial")
    for leftover in (partial, replaced):
        remove_partial(leftover)
    partial.mkdir(parents=True)
    from megatron_hapo.checkpoint.checkpoint_errors import explain_write_errors  # imports torch

    try:
        yield partial
        with explain_write_errors(partial):
            write_manifest(partial, known)
    except BaseException:
        remove_partial(partial)
        raise
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync_folder(folder.parent)
    remove_partial(replaced)


def remove_partial(folder: Path) -> None:
    """Remove an unfinished folder, into which a rank that has not noticed the failure yet may still be writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def model_fingerprint(folder: Path) -> str:
    """A hash that tells models apart: of names, sizes, beginnings and ends of weights, config and tokenizer.

    It does not depend on where the folder is, and reads no more than 2 MB of a file.
    """
    digest = xxhash.xxh3_128()
    names = sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file())
    for path in names:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_SAMPLE_BYTES)
            file.seek(max(0, size - _SAMPLE_BYTES))
            for part in (path.name.encode(), str(size).encode(), start, file.read(_SAMPLE_BYTES)):
                digest.update(xxhash.xxh3_128_digest(part))
    return digest.hexdigest()


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
