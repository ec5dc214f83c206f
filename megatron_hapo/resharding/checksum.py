"""Checksums of weights, and the slice of each Hugging Face tensor that each engine rank holds. Pure.

This is the trainer's side of `sglang_ext.verify.verify`. Each side derives the layout independently, so an error in
either of them shows up as a mismatch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements that are processed at once; the work space is 16 bytes per element."""
_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, which is odd, as a signed integer
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Signed 64-bit checksum of the tensor's bits in row-major order, computed on the tensor's own device.

    The bits of each element are multiplied by an odd number that depends on its position, and summed modulo 2^64, so
    both a changed bit and a permutation change the sum. It does not depend on device, strides or `chunk_elements`.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for chunk in _flat_chunks(tensor.detach(), chunk_elements):
        bits = chunk.view(_BITS[chunk.element_size()]).to(torch.int64)
        positions = torch.arange(start, start + bits.numel(), device=tensor.device)
        # + 1: zeros must count too, so that tensors of different lengths differ
        total += (bits + 1).mul_(positions.mul_(_MULTIPLIER).bitwise_or_(1)).sum()
        start += bits.numel()
    return int(total)


def block_checksum(block: Tensor, *, row: int, column: int, columns: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """What a block at (row, column) of a row-major matrix contributes to the matrix's `tensor_checksum`.

    The contributions of blocks that cover the matrix exactly once add up to its checksum (`add_checksums`), so no rank
    needs the whole matrix.

    Args:
        block: [rows of the block, columns of the block], any dtype and device.
        columns: number of columns of the whole matrix.
    """
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    across = torch.arange(column, column + block.shape[1], device=block.device)
    rows_at_once = max(1, chunk_elements // max(1, block.shape[1]))
    for start in range(0, block.shape[0], rows_at_once):
        part = block.detach()[start : start + rows_at_once]
        bits = part.contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        down = torch.arange(row + start, row + start + len(part), device=block.device)
        positions = (down * columns)[:, None] + across
        total += (bits + 1).mul_(positions.mul_(_MULTIPLIER).bitwise_or_(1)).sum()
    return int(total)


def add_checksums(sums: Iterable[int]) -> int:
    """The sum modulo 2^64, as a signed 64-bit number."""
    return (sum(sums) + (1 << 63)) % (1 << 64) - (1 << 63)


def engine_slices(
    name: str, tensor: Tensor, *, tp: int, num_heads: int, num_kv_heads: int, ep: int = 1, num_experts: int = 0
) -> list[Tensor]:
    """What each of an engine's `tp` ranks holds of a Hugging Face tensor: `tp` views, possibly without rows.

    Args:
        name: e.g. model.layers.3.self_attn.k_proj.weight.
        tensor: the whole tensor.
        num_heads: attention heads of the model.
        num_kv_heads: key/value heads of the model, which are replicated if `tp` is larger.
        ep: 1, or equal to `tp` if each rank holds num_experts / ep whole experts.
        num_experts: experts per layer; used if `ep` is greater than 1.
    Raises:
        ValueError: the tensor does not split over tp or ep.
    """
    if tp == 1:
        return [tensor]
    expert = _EXPERT.search(name)
    if expert is not None and ep > 1:
        owner = int(expert[1]) // _part(name, num_experts, "experts", f"ep={ep}", ep)
        return [tensor if rank == owner else tensor[:0] for rank in range(tp)]
    match name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]:
        case "k_proj" | "v_proj" if tp > num_kv_heads:
            replicas = _part(name, tp, "engine ranks", f"{num_kv_heads} key/value heads", num_kv_heads)
            return [part for part in tensor.chunk(num_kv_heads) for _ in range(replicas)]
        case "q_proj":
            _part(name, num_heads, "attention heads", f"tp={tp}", tp)
            return _row_slices(name, tensor, tp)
        case "k_proj" | "v_proj":
            _part(name, num_kv_heads, "key/value heads", f"tp={tp}", tp)
            return _row_slices(name, tensor, tp)
        case "gate_proj" | "up_proj":
            return _row_slices(name, tensor, tp)
        case "o_proj" | "down_proj" if name.endswith(".weight"):
            return list(tensor.split(_part(name, tensor.shape[1], "columns", f"tp={tp}", tp), dim=1))
        case "embed_tokens" | "lm_head":
            rows = _padded_vocab_rows(tensor.shape[0], tp)
            return [tensor[rank * rows : (rank + 1) * rows] for rank in range(tp)]
        case _:
            return [tensor] * tp


def _row_slices(name: str, tensor: Tensor, tp: int) -> list[Tensor]:
    return list(tensor.split(_part(name, tensor.shape[0], "rows", f"tp={tp}", tp)))


def _flat_chunks(tensor: Tensor, chunk_elements: int) -> Iterator[Tensor]:
    """Yields the elements in row-major order, as one-dimensional tensors of at most `chunk_elements`."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(chunk_elements)
    else:  # a slice of columns: a few rows at a time, to avoid a copy of the whole tensor
        rows = max(1, chunk_elements // max(1, tensor[0].numel()))
        for block in tensor.split(rows):
            yield from block.reshape(-1).split(chunk_elements)


def _padded_vocab_rows(vocab_size: int, tp: int) -> int:
    """Vocabulary rows per rank after SGLang's padding: to a multiple of 64, or of 64 * tp if that does not split."""
    padded = -(-vocab_size // 64) * 64
    if padded % tp:
        padded = -(-vocab_size // (64 * tp)) * 64 * tp
    return padded // tp


def _part(name: str, size: int, what: str, over: str, parts: int) -> int:
    """size / parts, which must be a whole number."""
    if size % parts:
        raise ValueError(f"{name}: {size} {what} do not split over {over}")
    return size // parts
