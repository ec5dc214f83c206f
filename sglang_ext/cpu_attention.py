"""Attention of SGLang's `torch_native` backend on a CPU, for all sequences of a batch at once.

SGLang (0.5.23) calls torch's attention once per sequence in every layer: with 256 running requests that is most of a
decode step. Here sequences of similar length form a padded rectangle, and each rectangle is one call; the rectangles
of a forward pass serve all of its layers. What a rectangle cannot express (cross attention, sliding windows, encoders)
goes to SGLang's own code.

Shape letters: `R` requests of a rectangle, `Q` its longest query, `K` its longest sequence, `H` heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_ext import batch_invariance

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend."
AFTER = {f"{_BACKEND}init_forward_metadata": "plan_rectangles"}
AROUND = {
    f"{_BACKEND}_run_sdpa_forward_decode": "attend_decode",
    f"{_BACKEND}_run_sdpa_forward_extend": "attend_extend",
}
"""SGLang's functions and the hooks of this module that stand after or around them."""

_EXACT_PLACES = 1 << 16
"""Most keys of an exact rectangle, in which each query has its own copies."""


@dataclass(frozen=True)
class Rectangle:
    """Requests of similar length, padded to the longest."""

    query_rows: Tensor
    """[R * Q] row of each query token in the forward pass; padding repeats its request's first."""
    real_queries: Tensor | None
    """[R * Q] bool, which of them are not padding; None where all are real."""
    cache_rows: Tensor
    """[R * K] place of each token in the KV cache; padding points at place 0."""
    visible: Tensor | None
    """[R, 1, Q, K] bool, which tokens a query attends to; None where it attends to all."""
    num_requests: int


def rectangles(
    req_to_token: Tensor, requests: Tensor, lengths: Sequence[int], query_lengths: Sequence[int]
) -> list[Rectangle]:
    """The rectangles of a forward pass; lengths share a power of two, so that padding at most doubles the work.

    Args:
        req_to_token: [requests, context] places in the KV cache.
        requests: [requests of the pass] row of each in req_to_token.
        lengths: tokens of each, new ones included.
        query_lengths: new tokens of each, laid end to end in the pass.
    """
    table = req_to_token[:, : max(lengths, default=0)]  # rows are copied below, and may be of a long context
    starts = [0, *itertools.accumulate(query_lengths)]
    classes: dict[tuple[int, int], list[int]] = {}
    for row, (length, query_length) in enumerate(zip(lengths, query_lengths, strict=True)):
        classes.setdefault((length.bit_length(), query_length.bit_length()), []).append(row)
    return [
        _rectangle(
            table[requests[rows]],
            torch.tensor([lengths[row] for row in rows])[:, None],
            torch.tensor([query_lengths[row] for row in rows])[:, None],
            torch.tensor([starts[row] for row in rows])[:, None],
        )
        for rows in classes.values()
    ]


def exact_rectangles(
    req_to_token: Tensor, requests: Tensor, lengths: Sequence[int], query_lengths: Sequence[int]
) -> list[Rectangle]:
    """The rectangles of a forward pass in deterministic mode (`batch_invariance`), from the arguments of `rectangles`.

    Each query is a request of its own, whose keys are padded to the next power of two: so what is computed for a
    position does not depend on the queries beside it, and is the same in a prefill and in a decode step.
    """
    ends = [
        end for length, new in zip(lengths, query_lengths, strict=True) for end in range(length - new + 1, length + 1)
    ]
    rows = requests.repeat_interleave(torch.tensor(query_lengths, device=requests.device))
    classes: dict[int, list[int]] = {}
    for token, end in enumerate(ends):
        classes.setdefault(1 << end.bit_length(), []).append(token)
    return [
        _rectangle(
            F.pad(req_to_token[rows[list(tokens)], :width], (0, max(0, width - req_to_token.shape[1]))),
            torch.tensor([ends[token] for token in tokens])[:, None],
            torch.ones(len(tokens), 1, dtype=torch.long),
            torch.tensor(tokens)[:, None],
            width=width,
        )
        for width, members in classes.items()
        for tokens in itertools.batched(members, max(1, _EXACT_PLACES // width))
    ]


def _rectangle(
    places: Tensor, length_R1: Tensor, query_length_R1: Tensor, start_R1: Tensor, *, width: int | None = None
) -> Rectangle:
    """`width`: number of keys, and `visible` is given even where a query attends to all; None: the longest's."""
    key_K, query_Q = torch.arange(width or int(length_R1.max())), torch.arange(int(query_length_R1.max()))
    position_RQ = length_R1 - query_length_R1 + query_Q
    visible_RQK = key_K <= position_RQ[:, :, None]
    real_RQ = query_Q < query_length_R1
    # Behind a request's last token the table holds what was there before.
    cache_RK = places[:, : len(key_K)].long().masked_fill(key_K >= length_R1, 0)
    return Rectangle(
        query_rows=(start_R1 + query_Q).where(real_RQ, start_R1).flatten(),
        real_queries=None if bool(real_RQ.all()) else real_RQ.flatten(),
        cache_rows=cache_RK.flatten(),
        visible=None if width is None and bool(visible_RQK.all()) else visible_RQK[:, None],
        num_requests=len(length_R1),
    )


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, planned: Sequence[Rectangle], *, scaling: float | None
) -> Tensor:
    """Attention of every query token to its request's tokens up to itself. [tokens, H, head size]

    The query heads that share a key-value head stand beside each other as queries, so that no key is repeated.

    Args:
        query: [tokens, H, head size].
        key_cache, value_cache: [places, key-value heads, head size].
    """
    output = torch.empty_like(query)
    _, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    shared = num_heads // num_kv_heads
    for part in planned:
        num_queries = len(part.query_rows) // part.num_requests
        grouped = (part.num_requests, num_queries, num_kv_heads, shared, head_size)
        q = query.index_select(0, part.query_rows).view(grouped).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (
            # Rows of one contiguous piece: many times faster than an index into three dimensions.
            cache.flatten(1).index_select(0, part.cache_rows).to(query.dtype)
            .view(part.num_requests, -1, num_kv_heads, head_size).transpose(1, 2)
            for cache in (key_cache, value_cache)
        )  # fmt: skip
        visible = part.visible
        if visible is not None and shared > 1 and num_queries > 1:
            visible = visible.repeat(1, 1, shared, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)
        rows = attended.unflatten(2, (shared, num_queries)).permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_size)
        if part.real_queries is None:
            output.index_copy_(0, part.query_rows, rows)
        else:
            output.index_copy_(0, part.query_rows[part.real_queries], rows[part.real_queries])
    return output


# --- hooks


def plan_rectangles(_result: None, backend: Any, batch: ForwardBatch) -> None:
    """Makes the rectangles of a forward pass, which its layers share."""
    lengths = batch.seq_lens.tolist()
    if batch.forward_mode.is_decode():
        new = [1] * len(lengths)
    else:
        assert batch.extend_seq_lens is not None, "a forward pass that is not a decode step extends requests"
        new = batch.extend_seq_lens.tolist()
    plan = exact_rectangles if batch_invariance.requested() else rectangles
    backend.hapo_rectangles = plan(backend.req_to_token_pool.req_to_token, batch.req_pool_indices, lengths, new)


def attend_decode(original: Callable[..., Tensor], backend: Any, *tensors: Any, **options: Any) -> Tensor:
    """In the place of SGLang's loop over requests, one new token each. SGLang passes causal=False, as each sees all."""
    return _attend(original, backend, *tensors, **options)


def attend_extend(original: Callable[..., Tensor], backend: Any, *tensors: Any, **options: Any) -> Tensor:
    """In the place of SGLang's loop over requests with several new tokens each."""
    if not options["causal"]:
        return original(backend, *tensors, **options)
    return _attend(original, backend, *tensors, **options)


def _attend(original: Callable[..., Tensor], backend: Any, *tensors: Any, **options: Any) -> Tensor:
    query, output, key_cache, value_cache, *_, encoder_lens = tensors
    window = options["sliding_window_size"]
    if encoder_lens is not None or options["is_cross_attn"] or (window is not None and window > -1):
        return original(backend, *tensors, **options)
    planned = backend.hapo_rectangles
    return output.copy_(attention(query, key_cache, value_cache, planned, scaling=options["scaling"]))
