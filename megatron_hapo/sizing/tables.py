"""Prints plans as tables and formats them as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_hapo.sizing.memory import GIB, Spec
from megatron_hapo.sizing.parameters import Layout
from megatron_hapo.sizing.search import Cluster, LayoutPlan, Rejection

MIN_WIDTH = 120
NAMED_SIZES = ("tp", "pp", "vpp", "cp", "etp", "ep", "dp")
"""The sizes that the tables show, in this order."""
TRAINER_PARTS = ("weights", "gradients", "optimizer", "activations", "logits_head", "sync_buckets", "reserve", "total")
ENGINE_PARTS = ("weights", "kv_cache", "runtime", "total")


def print_plans(
    plans: Sequence[LayoutPlan],
    rejections: Sequence[Rejection],
    cluster: Cluster,
    *,
    top: int,
    note: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a note, the best plans with their times and memory, and why other layouts do not fit.

    Args:
        top: largest number of plans, and of rejections, to print.
    """
    # On a narrow terminal a table of this width is more readable wrapped than truncated.
    console = console or Console(width=max(MIN_WIDTH, Console().width))
    if note is not None:
        console.print(note, highlight=False)
    console.print(_time_table(plans[:top], title(cluster)), _memory_table(plans[:top]))
    if rejections:
        console.print(f"{len(rejections)} layouts do not fit, for example:")
        for rejection in rejections[:top]:
            console.print(f"  {rejection.what}: {rejection.reason}", highlight=False)


def _time_table(plans: Sequence[LayoutPlan], heading: str) -> Table:
    table = Table(
        title=heading,
        caption="seconds per step; engines as number x tp",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("#")
    table.add_column("trainer", no_wrap=True)
    for name in ("tokens", "recomp.", "engines", "gener.", "score", "update", "step", "bubble", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, plan in enumerate(plans, 1):
        layout, time = plan.layout, plan.time
        seconds = (f"{value:.0f}" for value in (time.generate, time.log_probs, time.update, time.total))
        table.add_row(
            str(number), short(layout), str(layout.tokens_per_microbatch), layout.recompute,
            f"{plan.engines}x{plan.rollout_tp}", *seconds, f"{time.bubble_share:.0%}", f"{time.mfu:.0%}",
        )  # fmt: skip
    return table


def _memory_table(plans: Sequence[LayoutPlan]) -> Table:
    caption = "GiB on the fullest trainer rank; the total includes only the largest phase | on an engine rank"
    table = Table(caption=caption, box=SIMPLE_HEAD)
    table.add_column("#")
    for name in ("weights", "grads", "optim.", "activ.", "logits", "sync", "reserve", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("| weights", "KV", "running"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, plan in enumerate(plans, 1):
        trainer = (f"{getattr(plan.trainer, name) / GIB:.1f}" for name in TRAINER_PARTS)
        engine = (f"{getattr(plan.engine, name) / GIB:.1f}" for name in ("weights", "kv_cache"))
        table.add_row(str(number), *trainer, *engine, str(plan.running_requests))
    return table


def short(layout: Layout) -> str:
    """The sizes above 1 and optimizer offload, e.g. `tp2 dp12 offload`.

    Uneven pipelines are written with the layers of their first and last stage: `pp4[23..23]`.
    """
    sizes = {name: str(size) for name in NAMED_SIZES if (size := getattr(layout.sizes, name)) > 1}
    if layout.sizes.first_stage_layers is not None:
        sizes["pp"] += f"[{layout.sizes.first_stage_layers}..{layout.sizes.last_stage_layers}]"
    words = [f"{name}{size}" for name, size in sizes.items()] or ["dp1"]
    return " ".join([*words, "offload"] if layout.cpu_offload else words)


def title(cluster: Cluster) -> str:
    """The cluster in words, e.g. `64 x h100 of 80 GiB, disaggregated`."""
    return f"{cluster.gpus} x {cluster.gpu.name} of {cluster.gpu_bytes / GIB:.0f} GiB, {cluster.placement}"


def plans_as_json(plans: Sequence[LayoutPlan], rejections: Sequence[Rejection], *, top: int, spec: Spec) -> str:
    """The best plans and all rejections as JSON; memory in bytes, times in seconds."""
    rejected = [asdict(rejection) for rejection in rejections]
    return json.dumps(
        {"spec": spec, "plans": [_plan_dict(plan) for plan in plans[:top]], "rejected": rejected}, indent=1
    )


def _plan_dict(plan: LayoutPlan) -> dict[str, Any]:
    layout = asdict(plan.layout)
    return {
        "layout": {**layout.pop("sizes").model_dump(), **layout},
        "rollout": {
            "engines": plan.engines, "tp": plan.rollout_tp, "running_requests": plan.running_requests,
            "memory_fraction": plan.memory_fraction,
        },
        "trainer_bytes": {
            name: getattr(plan.trainer, name) for name in (*TRAINER_PARTS, "optimizer_step", "host_reference")
        },
        "engine_bytes": {name: getattr(plan.engine, name) for name in ENGINE_PARTS},
        "kv_tokens": plan.engine.kv_tokens,
        "seconds": {**asdict(plan.time), "total": plan.time.total},
    }  # fmt: skip
