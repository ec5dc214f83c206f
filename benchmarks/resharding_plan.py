"""How much the resharding plan moves between GPUs, and how long the busiest link needs. Uses no weights and no GPU.

    python benchmarks/resharding_plan.py

Trainer and engines have separate GPUs. A GPU sends to one peer at a time and receives from one at a time. The seconds
are those of the busiest GPU at the link's full speed, which is a lower bound. The last column lists published times of
whole syncs of the same model by other projects, on their own hardware and layouts. Prints a table, and the same as JSON
in the last line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hapo.config import ParallelConfig, load_config
from megatron_hapo.model.families import read_model_config, shape_of
from megatron_hapo.resharding.layouts import engine_parameters, matrix_sizes
from megatron_hapo.resharding.plan import make_plan
from tests.resharding.planned_grid import traffic, trainer_shards

NVLINK, NIC = 450e9, 50e9  # bytes per second in each direction
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the layouts of trainer and engines, and published times of others."""

    model: str
    parallel: ParallelConfig
    engines: int
    engine_tp: int
    engine_ep: int = 1
    published: str = ""

    @classmethod
    def shipped(cls, recipe: str, published: str = "") -> Case:
        """The model and layouts of `configs/<recipe>.yaml`."""
        config = load_config(ROOT / f"configs/{recipe}.yaml")
        return cls(
            model=Path(config.model.path).name, parallel=config.parallel, engines=config.rollout.engines,
            engine_tp=config.rollout.tp, engine_ep=config.rollout.ep, published=published,
        )  # fmt: skip

    def trainer(self) -> str:
        """Number of trainer ranks and the parallel sizes above 1, for the table."""
        sizes = {name: getattr(self.parallel, name) for name in ("tp", "pp", "cp", "dp", "ep")}
        named = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        return f"{self.parallel.world_size}: {named}"

    def engine(self) -> str:
        """Number of engines and their parallel sizes, for the table."""
        return f"{self.engines} x tp{self.engine_tp}" + (f" ep{self.engine_ep}" if self.engine_ep > 1 else "")


_8B = "verl, 2+2 H100 nodes: 10.2-38.6 s NCCL, 2.2-3.4 s deltas only [1]"
_30B = "slime, 8 H100 colocated: 7 s [2]; miles, H100: 2.7 s NCCL, 2.2 s RDMA [3]"
_235B = "miles, H100: 10.8 s NCCL, 3.2 s RDMA [3]; Perplexity, 128 to 32 GPUs, fp8: 2 s [4]"
SOURCES = (
    "[1] verl docs/advance/delta_weight_sync.md  [2] hebiao064.github.io/rl-weight-sync  "
    "[3] lmsys.org/blog/2026-04-29-p2p-update  [4] le.qun.ch/en/blog/2025/09/07/rl-weight-transfer"
)
_8B_ON_64 = ParallelConfig(tp=4, pp=2, dp=8)
_235B_ON_512 = ParallelConfig(tp=4, pp=8, dp=16, ep=32, first_stage_layers=10)
CASES = (
    Case(model="Qwen3-8B", parallel=_8B_ON_64, engines=8, engine_tp=2, published=_8B),
    Case(model="Qwen3-8B", parallel=_8B_ON_64, engines=32, engine_tp=2, published=_8B),
    Case.shipped("large/qwen3_32b_hapo"),
    Case.shipped("large/qwen3_30b_a3b_hapo", _30B),
    Case.shipped("large/qwen3_235b_a22b_hapo", _235B),
    Case(model="Qwen3-235B-A22B", parallel=_235B_ON_512, engines=16, engine_tp=8, published=_235B),
    Case(model="Qwen3-235B-A22B", parallel=_235B_ON_512, engines=16, engine_tp=8, engine_ep=8, published=_235B),
)


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    table = Table("model", "trainer", "engines", "plan s", "GB moved", "links", "GB, largest link", "send max/mean",
                  "s NVLink", "s NIC", "published")  # fmt: skip
    results = []
    for case in CASES:
        row = {"model": case.model, "trainer": case.trainer(), "engines": case.engine(), **figures(case)}
        results.append({**row, "published": case.published})
        table.add_row(*(str(value) for value in row.values()), case.published)
    Console(width=200).print(table)
    print(SOURCES)
    print(json.dumps({"benchmark": "resharding_plan", "results": results}))


def figures(case: Case) -> dict[str, float]:
    """The numeric columns of the case's row."""
    start = time.process_time()
    shape = shape_of(read_model_config(ROOT / f"tests/fixtures/hf_configs/Qwen--{case.model}.json"))
    plan = make_plan(
        trainer_shards(shape, case.parallel),
        engine_parameters(shape, case.engine_tp, case.engine_ep),
        matrix_sizes(shape),
        engines=case.engines,
        itemsize=2,
        max_copy_bytes=64 << 20,
    )
    num_bytes = traffic(plan)
    seconds = time.process_time() - start
    sent, received = num_bytes.sum((1, 2)), num_bytes.sum(0)
    busiest = max(sent.max(), received.max())
    return {
        "plan_seconds": round(seconds, 2),
        "gigabytes": round(num_bytes.sum() / 1e9, 1),
        "links": int((num_bytes > 0).sum()),
        "link_gigabytes_max": round(num_bytes.max() / 1e9, 3),
        "send_imbalance": round(float(sent.max() / np.mean(sent)), 3),
        "seconds_nvlink": round(busiest / NVLINK, 4),
        "seconds_nic": round(busiest / NIC, 3),
    }


if __name__ == "__main__":
    main()
