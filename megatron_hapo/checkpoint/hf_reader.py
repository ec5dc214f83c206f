"""A safetensors folder, read slice by slice; every fault of it told in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hapo.checkpoint.folder import INDEX
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import FusedExpert, Placement, Run, Shape, fused_expert, hf_tensor_shapes

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Old checkpoints keep what is computed from the config, and tied ones their head.
_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq|lm_head\.weight")


class HfReader:
    """The tensors of a model folder, read slice by slice; only one file is open at a time.

    Args:
        folder: with safetensors files, and an index where there are several.
        shape: the model that config.json describes.
    Raises:
        ConfigError: a file or a tensor is missing, or the folder holds one that the model has not. Later, when a tensor
            is read: its shape or dtype is wrong, or its file cannot be read.
    """

    def __init__(self, folder: Path, shape: Shape):
        self.folder, self._shape = folder, shape
        self._expected = hf_tensor_shapes(shape)
        self._open_name, self._open_file = "", None
        self._files = self._read_index()
        self._stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in self._files)
        self._check_names()

    def read(self, place: Placement) -> Tensor:
        """The tensor of these runs, as it stands in the folder (dtype included)."""
        parts = [self._read_run(run, place.axis) for run in place.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, place.axis or 0)

    def check(self) -> None:
        """Look at every tensor's shape, dtype and place in its file, without reading it."""
        for tensor in sorted(self._expected, key=lambda name: self._files[self._stored_name(name)]):
            self._checked_slice(tensor)

    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for the model."""
        return _DTYPES[str(self._checked_slice("model.embed_tokens.weight").get_dtype())]

    def _read_run(self, run: Run, axis: int | None) -> Tensor:
        fused = self._fused(run.tensor)
        view = self._checked_slice(run.tensor)
        try:
            start, stop = (fused.start, fused.stop) if fused else (0, None)
            rows = slice(start + run.start, start + run.stop) if axis == 0 else slice(start, stop)
            index = (rows, slice(run.start, run.stop)) if axis == 1 else (rows,)
            return view[(fused.expert, *index) if fused else index]
        except SafetensorError as error:
            raise self._fault(f"cannot read {run.tensor} in {self.folder / self._open_name}: {error}") from error

    def _checked_slice(self, tensor: str) -> Any:
        """The tensor that holds `tensor`, not read yet, once its shape and dtype have proved right."""
        fused = self._fused(tensor)
        name, expected = (fused.tensor, fused.shape) if fused else (tensor, self._expected[tensor])
        try:
            view = self._file(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise self._fault(f"{INDEX} says that {name} is in {self._files[name]}: {error}") from error
        found, dtype = tuple(view.get_shape()), str(view.get_dtype())
        if found != expected:
            raise self._fault(f"{name} has shape {found}, config.json says {expected}")
        if dtype not in _DTYPES:
            raise self._fault(f"{name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
        return view

    def _fused(self, tensor: str) -> FusedExpert | None:
        return fused_expert(tensor, self._shape) if self._stacked else None

    def _stored_name(self, tensor: str) -> str:
        """Of the tensor in the folder that holds `tensor`."""
        fused = self._fused(tensor)
        return fused.tensor if fused else tensor

    def _file(self, name: str) -> Any:
        if name != self._open_name:
            path = self.folder / name
            try:
                self._open_file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._fault(f"cannot read {path} (incomplete download or copy?): {error}") from error
            self._open_name = name
        return self._open_file

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                files = dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise self._fault(f"{index} is no index of safetensors files: {error!r}") from error
            missing = sorted(name for name in set(files.values()) if not (self.folder / name).is_file())
            if missing:
                raise self._fault(f"{index} names {_some(missing)}, which {_is_or_are(missing)} not there")
            return files
        name = "model.safetensors"
        if not (self.folder / name).is_file():
            raise self._fault(f"neither {INDEX} nor {name} in {self.folder}")
        return dict.fromkeys(self._file(name).keys(), name)

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


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def _is_or_are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
