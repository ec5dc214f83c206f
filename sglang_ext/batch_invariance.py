"""Deterministic mode on a CPU: each token's numbers depend on the tokens before it and the weights, to the last bit.

Neither the other rows of a forward pass matter then, nor whether a position was computed by a prefill, in a chunk of
one, by a decode step or before a restart: a prefix cache and a request that was retracted change nothing.

Matrix libraries choose their kernels by the number of rows, and so the order in which they add. Products are therefore
computed in blocks of one size; in such a block, as measured with MKL and oneDNN in float32 and bfloat16, a row's result
depends neither on its place nor on the other rows. Attention is computed for each query by itself
(`cpu_attention.exact_rectangles`). What is left in SGLang's models works on each row by itself, provided that there is
one thread: with several, torch cuts tensors where vector code gives way to scalar code that rounds differently.
`self_test.check_exact` proves all this on the model itself. Never used on a GPU, where SGLang has kernels of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ENVIRONMENT = {
    "HAPO_BATCH_INVARIANT": "1",
    "OMP_NUM_THREADS": "1",
    # The result of MKL's kernels would otherwise depend on the addresses of their operands as well.
    "MKL_CBWR": "AUTO,STRICT",
}
"""Variables of an engine's scheduler processes in this mode, set before they start."""
AROUND = {
    "torch.nn.functional.linear": "linear_in_blocks",
    "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head": "lm_head_in_blocks",
}
"""Functions of torch and SGLang (0.5.23), and the hooks of this module around them."""
_ROWS = 32


def requested() -> bool:
    """Whether this process computes in this mode."""
    return os.environ.get("HAPO_BATCH_INVARIANT") == "1"


def linear_in_blocks(
    original: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """torch's linear layer, in blocks of rows."""
    rows = input.reshape(-1, input.shape[-1])
    return in_blocks(lambda block: original(block, weight, bias), rows).view(*input.shape[:-1], weight.shape[0])


def lm_head_in_blocks(
    original: Callable[..., Tensor], processor: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """SGLang's output layer, in blocks of rows. Its buffer for the result (`out`) is for a GPU."""
    return in_blocks(lambda block: original(processor, block, *args, **kwargs), hidden_states)


def in_blocks(compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`compute` of all rows, the last block filled up with zeros. [rows, result of `compute`]"""
    count = len(rows)
    if missing := -count % _ROWS:
        rows = F.pad(rows, (0, 0, 0, missing))
    blocks = [compute(block) for block in rows.split(_ROWS)] if count else [compute(rows)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[:count]
