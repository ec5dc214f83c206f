"""Verifies an engine's parameters by checksums, inside each of its ranks, as one of SGLang's `custom_weight_loader`s.

`verify` is named in the engine's `custom_weight_loader` list and runs in every tensor-parallel rank for an update
with `load_format=VERIFY`. It finds the Hugging Face tensors inside SGLang's fused parameters from the layers' own
metadata, not from the formula that the trainer used to cut them (`megatron_hapo.resharding.checksum.engine_slices`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding.checksum import tensor_checksum
from megatron_hapo.resharding.float8_rows import DTYPE

VERIFY = "sglang_ext.verify.verify"
_MAX_SHOWN = 5  # mismatches in one error


def checksum_payload(checksums: dict[str, list[int]]) -> list[tuple[str, Tensor]]:
    """The checksums as named tensors, which SGLang can send; one tensor, since each needs a shared-memory file."""
    return [("checksums", torch.frombuffer(bytearray(json.dumps(checksums).encode()), dtype=torch.uint8))]


def verify(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Compares this rank's parameters with the expected checksums of its slices.

    Raises:
        WeightSyncError: names the tensors that differ, that the model lacks, or that have no checksum.
    """
    from sglang.srt.runtime_context import get_parallel

    rank = get_parallel().tp_rank
    expected: dict[str, list[int]] = json.loads(bytes(named_tensors[0][1].cpu().numpy()).decode())
    faults = []
    for name, tensor in hugging_face_slices(model):
        sums = expected.pop(name, None)
        if sums is None:
            faults.append(f"{name}: no checksum was given for it")
        elif tensor_checksum(tensor) != sums[rank]:
            faults.append(f"{name}: the engine's rank {rank} holds other values than the trainer sent")
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        expected.pop("lm_head.weight", None)
    # This rank holds no element of another rank's experts, and the checksum of nothing is 0.
    faults += [f"{name}: the engine's model has no such tensor" for name, sums in expected.items() if sums[rank]]
    if faults:
        more = f", and {len(faults) - _MAX_SHOWN} more" if len(faults) > _MAX_SHOWN else ""
        raise WeightSyncError("; ".join(faults[:_MAX_SHOWN]) + more)


def hugging_face_slices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of an SGLang model as (Hugging Face name, this rank's slice); fused parameters are split.

    A weight in float8 is followed by its scales, [rows, 1], under its name with the suffix `_scale`.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # an output head tied to the embedding
                continue
            seen.add(id(parameter))
            data = parameter.data
            if data.dtype == DTYPE and name == "weight" and "weight_scale" in module._parameters:
                data = data.t()  # SGLang holds it transposed
            yield from _parts(module_name, module, name, data)


def _parts(module_name: str, module: Any, name: str, data: Tensor) -> Iterator[tuple[str, Tensor]]:
    parent, _, leaf = module_name.rpartition(".")
    if name.removesuffix("_scale") in ("w13_weight", "w2_weight"):
        yield from _experts(module_name, module, name, data)
        return
    if leaf == "qkv_proj":
        sizes = (module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size)
        names = ("q_proj", "k_proj", "v_proj")
    elif leaf == "gate_up_proj":
        sizes = (data.shape[0] // 2,) * 2
        names = ("gate_proj", "up_proj")
    else:
        # Rows of padding in the vocabulary have no counterpart in the trainer's tensors.
        indices = getattr(module, "shard_indices", None)
        full_name = f"{module_name}.{name}" if module_name else name
        yield full_name, data if indices is None else data[: indices.num_org_elements]
        return
    if sum(sizes) != data.shape[0]:
        raise WeightSyncError(f"{module_name}: has {data.shape[0]} rows, but its parts {names} have {sizes}")
    for part_name, part in zip(names, data.split(sizes), strict=True):
        yield f"{parent}.{part_name}.{name}", part


def _experts(module_name: str, module: Any, name: str, data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors, or their scales, of a FusedMoE layer's stacked experts.

    The order of gate and up in w13 depends on the layer.
    """
    if len(data) != module.num_local_experts:
        raise WeightSyncError(
            f"{module_name}.{name}: holds {len(data)} experts, but the layer has {module.num_local_experts}"
        )
    names, suffix = ["down_proj"], "_scale" if name.endswith("_scale") else ""
    if name.startswith("w13_weight"):
        method = getattr(module, "weight_load_method", None) or module.quant_method
        up_first = getattr(method, "load_up_proj_weight_first", False)
        names = ["up_proj", "gate_proj"] if up_first else ["gate_proj", "up_proj"]
    first = module.moe_ep_rank * module.num_local_experts
    for index, expert in enumerate(data):
        for part_name, part in zip(names, expert.chunk(len(names)), strict=True):
            yield f"{module_name}.{first + index}.{part_name}.weight{suffix}", part
