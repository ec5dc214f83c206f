"""Counts, on a CPU, the operators of a block that would make the host wait for a GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::_unique2")
"""Operators whose result, or its size, the host needs."""
_COPIES = ("cpu", "tolist", "numpy", "__array__")
"""Methods that copy a tensor to the host. On a CPU they dispatch no operator."""
_FROM_HOST = ("tensor",)
"""Functions that, with a device, copy from pageable memory of the host, which waits for the device."""
_ON_THE_HOST = ("torch/optim/", "tensor_parallel/random.py")
"""Code whose scalars are on the host with a GPU as well: Adam's step counts, the state of the CPU's generator."""


class HostSyncs(TorchDispatchMode):
    """Counts by kind and by the line of our own or of Megatron's code, while the block runs.

    `counts` has an entry (kind, file:line) for each place. Tensors of the CPU are taken for those of a GPU, so the code
    under test keeps what the host knows in numpy or Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        # Not a TorchFunctionMode, under which functions that `megatron_on_cpu` has replaced would run twice.
        for name in _COPIES:
            self._count(torch.Tensor, name, "copy to the host", lambda args, kwargs: True)
        # A torch.device is the rank's own device, here the CPU as well.
        self._count(
            torch.Tensor, "to", "copy to the host", lambda args, kwargs: "cpu" in (*args[1:], kwargs.get("device"))
        )
        for name in _FROM_HOST:
            self._count(torch, name, "copy from pageable memory", lambda args, kwargs: kwargs.get("device") is not None)
        self._count(torch, "tensor", "read of a list's tensors", lambda args, kwargs: _has_tensors(args[0]))
        self._count(torch.cuda, "synchronize", "wait for all kernels", lambda args, kwargs: True)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _READS:
            self._add(name)
        elif name in ("aten::index", "aten::index_put", "aten::index_put_"):
            masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            # torch fills the places of a mask with one value directly
            if masks and (name == "aten::index" or args[2].numel() > 1):
                self._add("boolean index")
        return func(*args, **(kwargs or {}))

    def _count(self, owner: Any, name: str, kind: str, when: Callable[[Any, Any], bool]) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if when(args, kwargs):
                self._add(kind)
            return original(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, counted))

    def _add(self, kind: str) -> None:
        frames = traceback.extract_stack()
        if not any(part in frame.filename for frame in frames for part in _ON_THE_HOST):
            self.counts[kind, _place(frames)] += 1


def _has_tensors(data: Any) -> bool:
    """Whether it is a list with tensors inside, of which torch reads one after another without an operator."""
    return isinstance(data, list | tuple) and any(isinstance(item, torch.Tensor) or _has_tensors(item) for item in data)


def _place(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if any(f"/{part}/" in frame.filename for part in ("megatron_hapo", "megatron/core", "torch/distributed")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "elsewhere"
