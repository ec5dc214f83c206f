"""The headers of a model folder's safetensors files, and whether they agree with its config.json. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_hapo.model.families import Shape, fused_expert, hf_tensor_shapes

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (https://github.com/huggingface/safetensors#format)."""


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """dtype, shape and data_offsets of each tensor of a safetensors file, and the byte from which the offsets count.

    Raises:
        OSError, ValueError: the file cannot be read, or has no such header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    header.pop("__metadata__", None)
    return header, 8 + length


def shape_faults(folder: Path, shape: Shape) -> list[str]:
    """Tensors whose shape is not the one that config.json implies, one line for each file that has any.

    Files without a valid header, and tensors that are missing, are left to `HfReader`, which reads them.
    """
    expected = hf_tensor_shapes(shape)
    for name in [*expected]:  # some folders hold all experts of a layer in one tensor
        if (fused := fused_expert(name, shape)) is not None:
            expected[fused.tensor] = fused.shape
    faults = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = {name: entry["shape"] for name, entry in read_header(path)[0].items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        wrong = [name for name in found if name in expected and found[name] != [*expected[name]]]
        if wrong:
            more = f" (and {len(wrong) - 1} more tensors differ)" if wrong[1:] else ""
            faults.append(
                f"{path}: {wrong[0]} has shape {tuple(found[wrong[0]])}, but config.json implies "
                f"{expected[wrong[0]]}{more}"
            )
    return faults
