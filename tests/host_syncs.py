"""Counts, on a CPU, the operators of a block that would make the host wait for a GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::_unique2")
"""Operators whose result, or its size, the host needs."""
_COPIES = ("cpu", "tolist", "numpy", "__array__")
"""Methods that copy a tensor to the host. On a CPU they dispatch no operator."""
_FROM_HOST = ("tensor", "as_tensor")
"""Functions that copy from pageable memory of the host, which waits for the device."""


class HostSyncs:
    """Counts by kind and by the line of our own or of Megatron's code, while the block runs.

    `counts` has an entry (kind, file:line) for each place. Tensors of the CPU are taken for those of a GPU, so the code
    under test keeps what the host knows in numpy or Python.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._modes = (_Operators(self), _Functions(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def add(self, kind: str) -> None:
        """Count one."""
        self.counts[kind, _place()] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs):
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _READS:
            self._syncs.add(name)
        elif name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._syncs.add("boolean index")
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs):
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # A torch.device is a rank's own device, here the CPU as well.
        to_cpu = name == "to" and any(
            isinstance(value, str) and value == "cpu" for value in [*args[1:], *(kwargs or {}).values()]
        )
        if name in _COPIES or to_cpu:
            self._syncs.add("copy to the host")
        elif name in _FROM_HOST and (kwargs or {}).get("device") is not None:
            self._syncs.add("copy from pageable memory")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if any(f"/{part}/" in frame.filename for part in ("megatron_hapo", "megatron/core", "torch/distributed")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "elsewhere"
