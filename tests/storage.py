"""Counts the bytes of live tensor storages at every operator, and so a computation's peak memory, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakStorage(TorchDispatchMode):
    """Counts the storages that operators inside the `with` return, and those passed to `include`, while they live.

    Work space within a single operator is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, weakref.ref[Any]] = {}

    def include(self, *tensors: torch.Tensor) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor)

    def reset_peak(self) -> None:
        """Start a new measurement of the peak, from what is live now."""
        self.peak_bytes = self.live_bytes

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage.data_ptr(), storage.nbytes()
        if not num_bytes or key in self._live:
            return

        def gone(_: Any) -> None:
            del self._live[key]
            self.live_bytes -= num_bytes

        self._live[key] = weakref.ref(storage, gone)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result
