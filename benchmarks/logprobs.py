"""Time and memory of log-probs and entropies over a sharded vocabulary, compared with plain float32 autograd.

    python benchmarks/logprobs.py [--tokens 256] [--vocab 151936] [--hidden 256] [--chunk-tokens 32] [--repeats 3]

Makes two comparisons, each on one rank and on two gloo ranks with one thread each: from logits, and from hidden states
including the output projection, where the fused head takes part. Every version runs a forward pass, and the backward
pass of both outputs; "both" is forward plus backward. Bytes are those of live tensors at the peak, per logit of the
rank. They include the logits in the first table. In the second they exclude the inputs common to all versions: hidden
states, weight, and the float32 buffer for the weight's gradient. Prints two tables, and all rows as JSON in the last
line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from megatron_hapo.logprobs.fused_head import fused_log_probs_and_entropy
from tests.distributed import run_ranks
from tests.storage import PeakStorage

Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The command line's options."""

    tokens: int
    vocab: int
    hidden: int
    chunk_tokens: int
    repeats: int


# ----- versions


def in_place(logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> Outputs:
    """The project's version: log-probs and entropies [N] of this rank's logits [N, V / tp]; reuses their memory."""
    return vocab_parallel_log_probs_and_entropy(logits_NV, targets_N, tp_group=tp_group)


def naive(logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> Outputs:
    """The straightforward version: everything in float32, differentiated by autograd."""
    if tp_group is None:
        log_p_NV = torch.log_softmax(logits_NV.float(), -1)
        return log_p_NV.gather(1, targets_N[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(-1)
    z_NV = logits_NV.float()
    maximum_N = z_NV.detach().amax(-1)
    dist.all_reduce(maximum_N, dist.ReduceOp.MAX, group=tp_group)
    x_NV = z_NV - maximum_N[:, None]
    exp_NV = x_NV.exp()
    local_N = targets_N - tp_group.rank() * logits_NV.shape[1]
    here_N = (local_N >= 0) & (local_N < logits_NV.shape[1])
    target_N = x_NV.gather(1, local_N.clamp(0, logits_NV.shape[1] - 1)[:, None])[:, 0].where(here_N, 0)
    sums_3N = _SumOverRanks.apply(torch.stack([exp_NV.sum(-1), (exp_NV * x_NV).sum(-1), target_N]), tp_group)
    log_sum_N = sums_3N[0].log()
    return sums_3N[2] - log_sum_N, log_sum_N - sums_3N[1] / sums_3N[0]


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks. Each rank computes the same loss from the sum, so a summand has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tp_group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=tp_group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _ToEveryRank(torch.autograd.Function):
    """Hidden states that every rank uses for its part of the logits; their gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, tp_group: Any) -> Tensor:
        ctx.tp_group = tp_group
        return hidden_NH.view_as(hidden_NH)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.tp_group is not None:
            dist.all_reduce(gradient, group=ctx.tp_group)
        return gradient, None


FROM_LOGITS: dict[str, Callable[[Tensor, Tensor, Any], Outputs]] = {"in place": in_place, "naive float32": naive}


@dataclass
class Attempt:
    """One forward and backward pass of a version, with inputs of its own."""

    inputs: list[Tensor]
    forward: Callable[[], Outputs]
    finish: Callable[[], None]
    """Runs after the backward pass, and counts as part of it."""


def from_logits(name: str, logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> Attempt:
    """An attempt that starts from this rank's logits, [N, V / tp]."""
    leaf_NV = logits_NV.clone().requires_grad_()
    return Attempt([leaf_NV], lambda: FROM_LOGITS[name](leaf_NV, targets_N, tp_group), lambda: None)


def from_hidden(
    name: str, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, tp_group: Any, *, chunk_bytes: int
) -> Attempt:
    """An attempt that starts from hidden states [N, H] and this rank's rows of the output weight, [V / tp, H].

    The weight has a float32 gradient buffer, as in Megatron, to which autograd's gradient is added at the end.
    """
    hidden_NH = hidden_NH.clone().requires_grad_()
    weight: Any = torch.nn.Parameter(weight_VH)
    weight.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    inputs = [hidden_NH, weight, weight.main_grad]

    def fused() -> Outputs:
        return fused_log_probs_and_entropy(hidden_NH, weight, targets_N, tp_group=tp_group, chunk_bytes=chunk_bytes)

    def whole() -> Outputs:
        logits_NV = _ToEveryRank.apply(hidden_NH, tp_group) @ weight.t()
        return FROM_LOGITS[name](logits_NV, targets_N, tp_group)

    def add_gradient() -> None:
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)

    return Attempt(inputs, fused if name == "fused" else whole, add_gradient)


# ----- measuring


def measure(rank: int, world_size: int, sizes: Sizes) -> list[dict[str, Any]]:
    """This rank's rows of both comparisons."""
    tp_group = dist.group.WORLD if world_size > 1 else None
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        about = {"dtype": str(dtype).removeprefix("torch."), "tp": world_size}
        rows += measure_from_logits(rank, dtype, sizes, tp_group, about | {"from": "logits"})
        rows += measure_from_hidden(rank, dtype, sizes, tp_group, about | {"from": "hidden states"})
    return rows


def measure_from_logits(
    rank: int, dtype: torch.dtype, sizes: Sizes, tp_group: Any, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """This rank's rows for versions that start from logits; `about` has the columns that they share."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(sizes.tokens, sizes.vocab, generator=generator).mul_(3).to(dtype)
    logits_NV = logits_NV.chunk(about["tp"], 1)[rank].clone()
    targets_N = torch.randint(0, sizes.vocab, (sizes.tokens,), generator=generator)
    versions = {name: partial(from_logits, name, logits_NV, targets_N, tp_group) for name in FROM_LOGITS}
    return compare(versions, about, sizes, tp_group)


def measure_from_hidden(
    rank: int, dtype: torch.dtype, sizes: Sizes, tp_group: Any, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """This rank's rows for versions that start from hidden states; `about` has the columns that they share."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(sizes.tokens, sizes.hidden, generator=generator).to(dtype)
    weight_VH = torch.randn(sizes.vocab, sizes.hidden, generator=generator).mul_(3 / sizes.hidden**0.5)
    weight_VH = weight_VH.chunk(about["tp"])[rank].to(dtype).clone()
    targets_N = torch.randint(0, sizes.vocab, (sizes.tokens,), generator=generator)
    chunk_bytes = sizes.chunk_tokens * len(weight_VH) * dtype.itemsize
    versions = {
        name: partial(from_hidden, name, hidden_NH, weight_VH, targets_N, tp_group, chunk_bytes=chunk_bytes)
        for name in ("fused", *FROM_LOGITS)
    }
    about = about | {"hidden": sizes.hidden, "fused_chunk_tokens": sizes.chunk_tokens}
    return compare(versions, about, sizes, tp_group)


def compare(
    versions: dict[str, Callable[[], Attempt]], about: dict[str, Any], sizes: Sizes, tp_group: Any
) -> list[dict[str, Any]]:
    """A row per version with its best times. The versions alternate, so that other load affects all of them alike."""
    rows = {
        name: {
            "version": name,
            **about,
            "tokens": sizes.tokens,
            "vocab": sizes.vocab,
            "forward_seconds": float("inf"),
            "total_seconds": float("inf"),
            "cpu_seconds": float("inf"),
        }
        for name in versions
    }
    elements = sizes.tokens * sizes.vocab // about["tp"]
    for attempt in range(sizes.repeats + 1):
        for name, make in versions.items():
            row = rows[name]
            if attempt == 0:  # counting bytes takes time, so this attempt is not timed
                row["peak_bytes_per_element"] = round(peak_bytes(make(), about["from"] == "logits") / elements, 3)
                continue
            for key, value in seconds(make(), tp_group).items():
                row[key] = min(row[key], value)
    return list(rows.values())


def seconds(attempt: Attempt, tp_group: Any) -> dict[str, float]:
    """Seconds of the forward pass and of both passes; processor seconds of both, which depend less on other load."""
    if tp_group is not None:
        dist.barrier(tp_group)
    start, cpu_start = time.perf_counter(), time.process_time()
    log_probs_N, entropies_N = attempt.forward()
    forward = time.perf_counter() - start
    (log_probs_N.sum() + entropies_N.sum()).backward()
    attempt.finish()
    return {
        "forward_seconds": forward,
        "total_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }


def peak_bytes(attempt: Attempt, count_inputs: bool) -> int:
    """Bytes of all live tensors at the peak of both passes, with or without the attempt's inputs."""
    with PeakStorage() as storage:
        storage.include(*attempt.inputs)
        excluded = 0 if count_inputs else storage.live_bytes
        log_probs_N, entropies_N = attempt.forward()
        (log_probs_N.sum() + entropies_N.sum()).backward()
        attempt.finish()
    return storage.peak_bytes - excluded


def slower_rank(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One set of rows for all ranks, with the largest time and memory of any rank."""
    measured = ("forward_seconds", "total_seconds", "cpu_seconds", "peak_bytes_per_element")
    return [rows[0] | {key: max(row[key] for row in rows) for key in measured} for rows in zip(*ranks, strict=True)]


# ----- printing


def as_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table to print."""
    table = Table(title=title)
    for name in ("version", "dtype", "TP", "forward s", "both s", "CPU s", "CPU ns / logit", "peak bytes / logit"):
        table.add_column(name, justify="left" if name in ("version", "dtype") else "right")
    for row in rows:
        elements = row["tokens"] * row["vocab"] / row["tp"]
        table.add_row(
            row["version"],
            row["dtype"],
            str(row["tp"]),
            f"{row['forward_seconds']:.2f}",
            f"{row['total_seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['cpu_seconds'] / elements * 1e9:.1f}",
            f"{row['peak_bytes_per_element']:.2f}",
        )
    return table


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=32, help="tokens per chunk of the fused head")
    parser.add_argument("--repeats", type=int, default=3)
    sizes = Sizes(**vars(parser.parse_args()))
    console, rows = Console(width=120), []
    for world_size in (1, 2):
        rows += slower_rank(run_ranks(world_size, measure, world_size, sizes, timeout_seconds=1800))
    for source in ("logits", "hidden states"):
        title = f"from {source}: {sizes.tokens} tokens, vocabulary {sizes.vocab:,}"
        if source == "hidden states":
            title += f", hidden size {sizes.hidden}, fused in chunks of {sizes.chunk_tokens} tokens"
        console.print(as_table([row for row in rows if row["from"] == source], title))
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
