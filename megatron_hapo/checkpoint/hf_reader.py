"""Reads a safetensors folder slice by slice; each fault of the folder is reported in one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hapo.checkpoint.mapped_file import MappedFile
from megatron_hapo.checkpoint.model_folder import INDEX
from megatron_hapo.checkpoint.plausible import check_plausible
from megatron_hapo.checkpoint.safetensors_header import read_header
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import FusedExpert, Placement, Shape, fused_expert, hf_tensor_shapes

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Tensors that some checkpoints contain without need: what the config determines, and a tied output head.
_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq|lm_head\.weight")


@dataclass(frozen=True)
class _File:
    """A safetensors file (https://github.com/huggingface/safetensors#format)."""

    name: str
    header: dict[str, Any]
    """dtype, shape and data_offsets of each tensor."""
    start: int
    """The byte from which the offsets count."""
    content: MappedFile

    @classmethod
    def open(cls, folder: Path, name: str) -> _File:
        path = folder / name
        with safe_open(path, framework="pt"):  # validates the header, and the file's length against it
            pass
        header, start = read_header(path)
        return cls(name, header, start, MappedFile(path))


@dataclass(frozen=True)
class _Block:
    """A contiguous range of a file: a whole tensor, or rows of it."""

    file: str
    dtype: torch.dtype
    start: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> _Block:
        row_bytes = self.num_bytes // self.shape[0]
        return replace(self, start=self.start + start * row_bytes, shape=(stop - start, *self.shape[1:]))

    def select(self, index: int) -> _Block:
        """Entry `index` of the first axis, without that axis."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])

    def followed_by(self, other: _Block) -> _Block | None:
        """The union of both if the other's rows come next in the file, as those of gate and up projection mostly do."""
        next_one = (self.file, self.dtype, self.start + self.num_bytes, self.shape[1:])
        if next_one != (other.file, other.dtype, other.start, other.shape[1:]):
            return None
        return replace(self, shape=(self.shape[0] + other.shape[0], *self.shape[1:]))


class HfReader:
    """The tensors of a model folder, read slice by slice; a file stays mapped as long as a view of it exists.

    Args:
        folder: contains safetensors files, and an index if there are several.
        shape: of the model that config.json describes.
    Raises:
        ConfigError: a file or a tensor is missing, or the folder holds a tensor that the model does not have. When a
            tensor is read: its shape or dtype is wrong, or its file is damaged.
    """

    def __init__(self, folder: Path, shape: Shape):
        self.folder, self._shape = folder, shape
        self._expected = hf_tensor_shapes(shape)
        self._last: _File | None = None
        self._files = self._read_index()
        self._stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in self._files)
        self._check_names()

    def read(self, place: Placement) -> Tensor:
        """The concatenation of these runs, in the folder's dtype.

        If the runs are contiguous in a file, it is a private view of the file: writing to it does not change the file.
        """
        if place.axis == 1:
            parts = [self._view(self._block(run.tensor))[:, run.start : run.stop] for run in place.runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        blocks: list[_Block] = []
        for run in place.runs:
            block = self._block(run.tensor)
            if place.axis == 0:
                block = block.rows(run.start, run.stop)
            joined = blocks[-1].followed_by(block) if blocks else None
            if joined is None:
                blocks.append(block)
            else:
                blocks[-1] = joined
        parts = [self._view(block) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check(self, *, values: bool = False) -> None:
        """Check every tensor's shape, dtype and position in its file.

        Args:
            values: read the tensors, too, which must be finite and plausible.
        """
        for tensor in sorted(self._expected, key=lambda name: self._files[self._stored_name(name)]):
            block = self._block(tensor)
            if values:
                check_plausible(self._view(block), f"{self.path_of(tensor)}: {tensor}")

    def path_of(self, tensor: str) -> Path:
        """The file that contains the tensor."""
        return self.folder / self._files[self._stored_name(tensor)]

    def _view(self, block: _Block) -> Tensor:
        values = self._file(block.file).content.tensor(block.start, block.dtype, math.prod(block.shape))
        return values.view(block.shape)

    def _block(self, tensor: str) -> _Block:
        """The position of a tensor, after checking its shape and dtype."""
        fused = self._fused(tensor)
        name, expected = (fused.tensor, fused.shape) if fused else (tensor, self._expected[tensor])
        file = self._file(self._files[name])
        if name not in file.header:
            raise self._fault(f"{INDEX} says that {name} is in {file.name}, which does not hold it")
        found, dtype = tuple(file.header[name]["shape"]), file.header[name]["dtype"]
        if found != expected:
            raise self._fault(f"{name} has shape {found}, but config.json implies {expected}")
        if dtype not in _DTYPES:
            raise self._fault(f"{name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
        start, _ = file.header[name]["data_offsets"]
        block = _Block(file.name, _DTYPES[dtype], file.start + start, expected)
        return block.select(fused.expert).rows(fused.start, fused.stop) if fused else block

    def _fused(self, tensor: str) -> FusedExpert | None:
        return fused_expert(tensor, self._shape) if self._stacked else None

    def _stored_name(self, tensor: str) -> str:
        """The name of the stored tensor that contains `tensor`."""
        fused = self._fused(tensor)
        return fused.tensor if fused else tensor

    def _file(self, name: str) -> _File:
        if self._last is None or self._last.name != name:
            try:
                self._last = _File.open(self.folder, name)
            except (SafetensorError, OSError) as error:
                raise self._fault(
                    f"cannot read {self.folder / name} (incomplete download or copy?): {error}"
                ) from error
        return self._last

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                files = json.loads(index.read_text())["weight_map"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise self._fault(f"{index} is not an index of safetensors files: {error!r}") from error
            if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
                raise self._fault(
                    f"{index} is not an index of safetensors files: weight_map must give each tensor the name of a "
                    "file in the folder"
                )
            missing = sorted(name for name in set(files.values()) if not (self.folder / name).is_file())
            if missing:
                raise self._fault(f"{index} names {_some(missing)}, which {_is_or_are(missing)} missing")
            return files
        name = "model.safetensors"
        if not (self.folder / name).is_file():
            raise self._fault(f"{self.folder} contains neither {INDEX} nor {name}")
        return dict.fromkeys(self._file(name).header, name)

    def _check_names(self) -> None:
        needed = {self._stored_name(name) for name in self._expected}
        missing = sorted(needed - self._files.keys())
        if missing:
            raise self._fault(f"{self.folder} has no tensor {_some(missing)}")
        unknown = sorted(name for name in self._files.keys() - needed if not _NOT_WEIGHTS.fullmatch(name))
        if unknown:
            raise self._fault(f"{self.folder} has {_some(unknown)}, which a {self._shape.family} model does not have")

    def _fault(self, message: str) -> ConfigError:
        return ConfigError([f"model.path: {' '.join(message.split())}"])


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def _is_or_are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
