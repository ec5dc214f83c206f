"""Checksums of weights, and the slice of each Hugging Face tensor that one engine rank holds; pure.

The trainer's side of `sglang_ext.verify.verify`: both sides know the layout by themselves, so that an error in one of
them shows as a mismatch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements; the work space is 16 bytes an element
_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed integer
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: Tensor) -> int:
    """Signed 64-bit checksum of the tensor's bits in row-major order, on the tensor's own device.

    Each element's bits are multiplied with an odd number that depends on its position, and summed modulo 2^64: a
    changed bit and a permutation both show. The same on every device, and independent of strides.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for chunk in _flat_chunks(tensor.detach()):
        bits = chunk.view(_BITS[chunk.element_size()]).to(torch.int64)
        positions = torch.arange(start, start + bits.numel(), device=tensor.device)
        # + 1: a zero in one place and a zero in another must differ from nothing at all (lengths count)
        total += (bits + 1).mul_(positions.mul_(_MULTIPLIER).bitwise_or_(1)).sum()
        start += bits.numel()
    return int(total)


def block_checksum(block: Tensor, *, row: int, column: int, columns: int) -> int:
    """What a block at (row, column) of a row-major matrix adds to the matrix's `tensor_checksum`.

    Blocks that cover a matrix once add up to its checksum modulo 2^64 (`add_checksums`), so nobody needs the whole.

    Args:
        block: two-dimensional.
        columns: of the matrix.
    """
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    across = torch.arange(column, column + block.shape[1], device=block.device)
    rows_at_once = max(1, _CHUNK // max(1, block.shape[1]))
    for start in range(0, block.shape[0], rows_at_once):
        part = block.detach()[start : start + rows_at_once]
        bits = part.contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        down = torch.arange(row + start, row + start + len(part), device=block.device)
        positions = (down * columns)[:, None] + across
        total += (bits + 1).mul_(positions.mul_(_MULTIPLIER).bitwise_or_(1)).sum()
    return int(total)


def add_checksums(sums: Iterable[int]) -> int:
    """Sum modulo 2^64, as a signed 64-bit number."""
    return (sum(sums) + (1 << 63)) % (1 << 64) - (1 << 63)


def engine_slices(
    name: str, tensor: Tensor, *, tp: int, num_heads: int, num_kv_heads: int, ep: int = 1, num_experts: int = 0
) -> list[Tensor]:
    """What each of `tp` SGLang ranks holds of a whole tensor with this Hugging Face name, as views, maybe of no rows.

    Args:
        name: e.g. model.layers.3.self_attn.k_proj.weight.
        tensor: the whole tensor.
        num_heads, num_kv_heads: attention heads of the model; key and value heads are replicated when tp exceeds them.
        ep: 1, or tp, where each rank holds num_experts / ep whole experts.
    Raises:
        ValueError: the tensor does not split over tp or ep.
    """
    if tp == 1:
        return [tensor]
    expert = _EXPERT.search(name)
    if expert is not None and ep > 1:
        owner = int(expert[1]) // _exact(name, num_experts, ep, "experts over ep")
        return [tensor if rank == owner else tensor[:0] for rank in range(tp)]
    module = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    if module in ("k_proj", "v_proj") and tp > num_kv_heads:
        replicas = _exact(name, tp, num_kv_heads, f"tp={tp} over {num_kv_heads} key/value heads")
        return [part for part in tensor.chunk(num_kv_heads) for _ in range(replicas)]
    if module in ("q_proj", "k_proj", "v_proj"):
        _exact(name, num_heads if module == "q_proj" else num_kv_heads, tp, "attention heads over tp")
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return list(tensor.split(_exact(name, tensor.shape[0], tp, "rows over tp")))
    if module in ("o_proj", "down_proj") and name.endswith(".weight"):
        return list(tensor.split(_exact(name, tensor.shape[1], tp, "columns over tp"), dim=1))
    if module in ("embed_tokens", "lm_head"):
        rows = _padded_vocab_rows(tensor.shape[0], tp)
        return [tensor[rank * rows : (rank + 1) * rows] for rank in range(tp)]
    return [tensor] * tp


def _flat_chunks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_CHUNK)
    else:  # a slice of columns: a few rows at a time, so that no copy of the whole is made
        rows = max(1, _CHUNK // max(1, tensor[0].numel()))
        for block in tensor.split(rows):
            yield from block.reshape(-1).split(_CHUNK)


def _padded_vocab_rows(vocab_size: int, tp: int) -> int:
    """Rows of one rank after SGLang's padding: to 64, or to 64 tp where that does not split evenly."""
    padded = -(-vocab_size // 64) * 64
    if padded % tp:
        padded = -(-vocab_size // (64 * tp)) * 64 * tp
    return padded // tp


def _exact(name: str, size: int, parts: int, what: str) -> int:
    if size % parts:
        raise ValueError(f"{name}: {what}: {size} does not split over {parts}")
    return size // parts
