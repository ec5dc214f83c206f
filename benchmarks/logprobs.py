"""Time and memory of log-probs and entropies from vocabulary-sharded logits, against plain float32 autograd.

    python benchmarks/logprobs.py [--tokens 256] [--vocab 151936] [--repeats 3]

Every version does a forward pass and the backward pass of both outputs, on one rank and on two gloo ranks, each with
one thread. Prints a table, and as its last line the same as JSON. Bytes are those of live tensors at the peak, logits
included, for each element of the rank's logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from tests.distributed import run_ranks
from tests.storage import PeakStorage

Version = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def in_place(logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> tuple[Tensor, Tensor]:
    return vocab_parallel_log_probs_and_entropy(logits_NV, targets_N, tp_group=tp_group)


def naive(logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> tuple[Tensor, Tensor]:
    """What one writes first: everything in float32, differentiated by autograd."""
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
    """Every rank computes the same loss from the sums, so the gradient of a summand is that of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tp_group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=tp_group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


VERSIONS: dict[str, Version] = {"in place": in_place, "naive float32": naive}


def measure(rank: int, world_size: int, tokens: int, vocab: int, repeats: int) -> list[dict[str, Any]]:
    """One rank's rows. Versions take turns, so that other load meets all of them; the best time counts."""
    tp_group = dist.group.WORLD if world_size > 1 else None
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        logits_NV = torch.randn(tokens, vocab, generator=generator).mul_(3).to(dtype).chunk(world_size, 1)[rank].clone()
        targets_N = torch.randint(0, vocab, (tokens,), generator=generator)
        for attempt in range(repeats + 1):
            for name, version in VERSIONS.items():
                row = results.setdefault(
                    (name, str(dtype)),
                    {
                        "version": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tp": world_size,
                        "tokens": tokens,
                        "vocab": vocab,
                        "forward_seconds": float("inf"),
                        "total_seconds": float("inf"),
                    },
                )
                leaf_NV = logits_NV.clone().requires_grad_()
                if attempt == 0:  # counting costs time of its own
                    row["peak_bytes_per_element"] = peak_bytes(version, leaf_NV, targets_N, tp_group)
                    continue
                forward, total = seconds(version, leaf_NV, targets_N, tp_group)
                row["forward_seconds"] = min(row["forward_seconds"], forward)
                row["total_seconds"] = min(row["total_seconds"], total)
    return list(results.values())


def seconds(version: Version, logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> tuple[float, float]:
    if tp_group is not None:
        dist.barrier(tp_group)
    start = time.perf_counter()
    log_probs_N, entropies_N = version(logits_NV, targets_N, tp_group)
    forward = time.perf_counter() - start
    (log_probs_N.sum() + entropies_N.sum()).backward()
    return forward, time.perf_counter() - start


def peak_bytes(version: Version, logits_NV: Tensor, targets_N: Tensor, tp_group: Any) -> float:
    with PeakStorage() as storage:
        storage.include(logits_NV)
        log_probs_N, entropies_N = version(logits_NV, targets_N, tp_group)
        (log_probs_N.sum() + entropies_N.sum()).backward()
    return round(storage.peak_bytes / logits_NV.numel(), 3)


def slower_rank(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The ranks' rows as one: what the slowest and the largest rank needs."""
    measured = ("forward_seconds", "total_seconds", "peak_bytes_per_element")
    return [rows[0] | {key: max(row[key] for row in rows) for key in measured} for rows in zip(*ranks, strict=True)]


def as_table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(title=f"log-probs and entropies: {first['tokens']} tokens, vocabulary {first['vocab']:,}")
    for name in ("version", "dtype", "TP", "forward s", "forward + backward s", "ns / element", "peak bytes / element"):
        table.add_column(name, justify="left" if name in ("version", "dtype") else "right")
    for row in rows:
        elements = row["tokens"] * row["vocab"] / row["tp"]
        table.add_row(
            row["version"],
            row["dtype"],
            str(row["tp"]),
            f"{row['forward_seconds']:.2f}",
            f"{row['total_seconds']:.2f}",
            f"{row['total_seconds'] / elements * 1e9:.1f}",
            f"{row['peak_bytes_per_element']:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for world_size in (1, 2):
        arguments = (world_size, options.tokens, options.vocab, options.repeats)
        rows += slower_rank(run_ranks(world_size, measure, *arguments, timeout_seconds=600))
    Console(width=120).print(as_table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
