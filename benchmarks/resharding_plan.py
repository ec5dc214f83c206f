"""What the resharding plan would move between GPUs, and how long the busiest link takes; no weights, no GPU.

Trainer and engines are on GPUs of their own. A GPU sends and receives over one link at a time each; the seconds are
those of the busiest GPU at the link's full speed, a lower bound.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_hapo.model.families import Shape
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes, trainer_shards
from megatron_hapo.resharding.plan import Block, Parameter, Shard, make_plan

NVLINK, NIC = 450e9, 50e9  # bytes a second and direction
QWEN3_8B = Shape(
    family="qwen3", num_layers=36, hidden_size=4096, ffn_size=12288, num_heads=32, num_kv_heads=8, head_dim=128,
    vocab_size=151936, tied_embeddings=False, qk_norm=True, qkv_bias=False, norm_eps=1e-6, rope_base=1e6,
    max_positions=40960,
)  # fmt: skip
QWEN3_32B = replace(QWEN3_8B, num_layers=64, hidden_size=5120, ffn_size=25600, num_heads=64)
QWEN3_30B_A3B = replace(QWEN3_8B, num_layers=48, hidden_size=2048, num_kv_heads=4)
QWEN3_235B_A22B = replace(QWEN3_8B, num_layers=94, num_heads=64, num_kv_heads=4)


def main() -> None:
    table = Table("model", "trainer", "engines", "plan s", "GB moved", "links", "GB a link", "send max/mean",
                  "s NVLink", "s NIC")  # fmt: skip
    results = []
    for name, shape, (tp, pp, dp), engines, engine_tp, experts, expert_ffn in (
        ("Qwen3-8B", QWEN3_8B, (4, 2, 8), 8, 2, 0, 0),
        ("Qwen3-8B", QWEN3_8B, (4, 2, 8), 32, 2, 0, 0),
        ("Qwen3-32B", QWEN3_32B, (8, 4, 4), 16, 4, 0, 0),
        ("Qwen3-30B-A3B", QWEN3_30B_A3B, (4, 1, 16), 8, 4, 128, 768),
        ("Qwen3-235B-A22B", QWEN3_235B_A22B, (4, 8, 16), 16, 8, 128, 1536),
    ):
        start = time.process_time()
        parts = dense(shape, tp, pp, dp, engine_tp) if not experts else moe(
            shape, tp, pp, dp, engine_tp, experts, expert_ffn
        )  # fmt: skip
        plan = make_plan(*parts, engines=engines, itemsize=2, max_copy_bytes=64 << 20)
        traffic = plan.traffic()
        seconds = time.process_time() - start
        sent, received = traffic.sum((1, 2)), traffic.sum(0)
        busiest = max(sent.max(), received.max())
        row = {
            "model": name,
            "trainer_gpus": tp * pp * dp,
            "engines": engines,
            "engine_tp": engine_tp,
            "plan_seconds": round(seconds, 2),
            "gigabytes": round(traffic.sum() / 1e9, 1),
            "links": int((traffic > 0).sum()),
            "link_gigabytes_max": round(traffic.max() / 1e9, 3),
            "send_imbalance": round(float(sent.max() / np.mean(sent)), 3),
            "seconds_nvlink": round(busiest / NVLINK, 4),
            "seconds_nic": round(busiest / NIC, 3),
        }
        results.append(row)
        table.add_row(name, f"tp{tp} pp{pp} dp{dp}" + (", ep = tp dp up to 32" if experts else ""),
                      f"{engines} x tp{engine_tp}", *(str(value) for value in list(row.values())[4:]))  # fmt: skip
    Console(width=160).print(table)
    print(json.dumps({"benchmark": "resharding_plan", "results": results}))


Parts = tuple[list[Shard], list[tuple[Parameter, ...]], dict[str, tuple[int, int]]]


def dense(shape: Shape, tp: int, pp: int, dp: int, engine_tp: int) -> Parts:
    return trainer_shards(shape, tp=tp, pp=pp, dp=dp), engine_parameters(shape, engine_tp), matrix_sizes(shape)


def moe(shape: Shape, tp: int, pp: int, dp: int, engine_tp: int, experts: int, ffn: int) -> Parts:
    """Every MLP in experts: the trainer's whole, spread over ep ranks; the engine cuts them over its ranks."""
    ep, hidden = min(tp * dp, 32), shape.hidden_size
    stages = [len(part) for part in np.array_split(np.arange(shape.num_layers), pp)]
    padded = replace(shape, num_layers=max(stages) * pp)  # equal stages for the dense part; the surplus goes below
    shards, engine, tensors = dense(padded, tp, pp, dp, engine_tp)
    layers = [
        layer for stage, count in enumerate(stages) for layer in range(stage * max(stages), stage * max(stages) + count)
    ]
    kept = {f"model.layers.{layer}." for layer in layers}

    def keeps(name: str) -> bool:
        layer = ".".join(name.split(".")[:3]) + "."
        return ".mlp." not in name and (not name.startswith("model.layers.") or layer in kept)

    tensors = {name: size for name, size in tensors.items() if keeps(name)}
    shards = [Shard(s.ranks, tuple(p for p in s.parameters if keeps(p.blocks[0].tensor))) for s in shards]
    engine = [tuple(p for p in parameters if keeps(p.name)) for parameters in engine]
    for layer in layers:
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            tensors |= {prefix + "gate": (ffn, hidden), prefix + "up": (ffn, hidden), prefix + "down": (hidden, ffn)}
        tensors[f"model.layers.{layer}.mlp.gate"] = (experts, hidden)
    for stage, count in enumerate(stages):
        own = layers[sum(stages[:stage]) : sum(stages[:stage]) + count]
        for ep_rank in range(ep):
            ranks = tuple(range(stage * tp * dp + ep_rank, (stage + 1) * tp * dp, ep))
            mine = range(ep_rank * experts // ep, (ep_rank + 1) * experts // ep)
            held = [p for layer in own for expert in mine for p in trainer_expert(layer, expert, ffn, hidden)]
            shards.append(Shard(ranks, tuple(held)))
        routers = (f"model.layers.{layer}.mlp.gate" for layer in own)
        whole = tuple(Parameter(n, experts, hidden, (Block(n, 0, 0, experts, hidden, 0, 0),)) for n in routers)
        shards.append(Shard(tuple(range(stage * tp * dp, (stage + 1) * tp * dp)), whole))
    for rank in range(engine_tp):
        engine[rank] += tuple(p for n in layers for p in engine_experts(n, experts, ffn, hidden, engine_tp, rank))
    return shards, engine, tensors


def trainer_expert(layer: int, expert: int, ffn: int, hidden: int) -> list[Parameter]:
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    up = (Block(prefix + "gate", 0, 0, ffn, hidden, 0, 0), Block(prefix + "up", 0, 0, ffn, hidden, ffn, 0))
    down = (Block(prefix + "down", 0, 0, hidden, ffn, 0, 0),)
    return [Parameter(prefix + "fc1", 2 * ffn, hidden, up), Parameter(prefix + "fc2", hidden, ffn, down)]


def engine_experts(layer: int, experts: int, ffn: int, hidden: int, tp: int, rank: int) -> list[Parameter]:
    """SGLang's w13 [experts, 2 ffn / tp, hidden] and w2 [experts, hidden, ffn / tp], and the router."""
    part, prefix = ffn // tp, f"model.layers.{layer}.mlp."
    w13, w2 = [], []
    for expert in range(experts):
        name, at = f"{prefix}experts.{expert}.", 2 * expert * part
        w13.append(Block(name + "gate", rank * part, 0, part, hidden, at, 0))
        w13.append(Block(name + "up", rank * part, 0, part, hidden, at + part, 0))
        w2.append(Block(name + "down", 0, rank * part, hidden, part, expert * hidden, 0))
    return [
        Parameter(prefix + "experts.w13_weight", experts * 2 * part, hidden, tuple(w13)),
        Parameter(prefix + "experts.w2_weight", experts * hidden, part, tuple(w2)),
        Parameter(prefix + "gate", experts, hidden, (Block(prefix + "gate", 0, 0, experts, hidden, 0, 0),)),
    ]


if __name__ == "__main__":
    main()
