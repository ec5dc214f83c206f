"""Write the initial model of a small task: python tools/make_demo_model.py OUT [--task checked_sums] [--seed N]."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megatron_hapo.data.demo_model import TASKS, make_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--task", choices=list(TASKS), default="arithmetic", help="what it is pre-trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800, help="number of pre-training updates")
    parser.add_argument("--experts", type=int, default=0, help="experts in each layer, of which a token uses two")
    args = parser.parse_args()

    disable_progress_bar()

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"pre-training {step}/{args.steps}  loss {loss:.3f}", flush=True)

    make_demo_model(
        args.out, task=TASKS[args.task], seed=args.seed, steps=args.steps, experts=args.experts, progress=report
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
