"""What `trainer.float32_logits` saves in bfloat16, on a CPU: the error of one head, and the mismatch of two sides.

    python benchmarks/float32_logits.py [--steps 2] [--model FOLDER] [--out runs/float32_logits] [key=value ...]

First the head alone: random hidden states and weights with Qwen3's vocabulary, log-probs and entropies against float64
products of the same numbers. Then `megatron-hapo train examples/checked_sums/job.yaml` with engine and trainer in
bfloat16, once with the setting and once without, from the same model (made first, a few minutes, without --model):
`rollout/*` are differences between engine and trainer. Prints means over the steps, and the same as JSON in the last
line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_run import ROOT, train
from megatron_hapo.logprobs.fused_head import fused_scores

VOCAB, HIDDEN, ROWS = 151_936, 1024, 48
LOGIT_DEVIATIONS = (2.0, 5.0)
"""The largest of so many normal logits is about 4.5 deviations: 9 and 22."""
JOB = (
    *("trainer.dtype=bfloat16", "rollout.dtype=bfloat16", "eval.every=0"),
    *("algorithm.adaptive_temperature.enabled=false", "batch.prompts_per_step=32", "batch.prompts_per_minibatch=32"),
)
METRICS = tuple(f"rollout/{name}" for name in
                ("mismatch_kl", "mismatch_kl_p99", "logprob_abs_diff", "logprob_abs_diff_max"))  # fmt: skip


def main() -> None:
    """Measure, and print the results; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", type=Path, help="Hugging Face folder of the job's model")
    parser.add_argument("--out", type=Path, default=Path("runs/float32_logits"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for both runs")
    options = parser.parse_args()
    console = Console(width=130)
    heads = {deviation: head_errors(deviation) for deviation in LOGIT_DEVIATIONS}
    report_heads(console, heads)
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.model or options.out / "model"
    if not (model / "tokenizer.json").exists():  # the last file that is written
        command = [sys.executable, str(ROOT / "tools/make_demo_model.py"), str(model)]
        subprocess.run([*command, "--task", "checked_sums", "--steps", "1200"], check=True)
    runs = {}
    for wide in (False, True):
        name = f"float32_logits_{str(wide).lower()}"
        settings = [f"steps={options.steps}", f"model.path={model.absolute()}", f"trainer.float32_logits={wide}"]
        train(options.out, name, [*settings, *JOB, *options.overrides], job="examples/checked_sums/job.yaml")
        runs[wide] = measured(options.out / name)
    report_runs(console, runs)
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "float32_logits", "heads": heads, "runs": runs}))


def head_errors(deviation: float) -> dict[str, dict[str, float]]:
    """Errors of a bfloat16 and a float32 head, by quantity, at logits of this standard deviation."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(ROWS, HIDDEN, generator=generator).bfloat16()
    weight_VH = (torch.randn(VOCAB, HIDDEN, generator=generator) * deviation / HIDDEN**0.5).bfloat16()
    exact_NV = hidden_NH.double() @ weight_VH.double().t()
    # Half of the tokens are the most likely one, as in a sample of a trained model.
    targets_N = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets_N[::2] = exact_NV[::2].argmax(-1)
    exact_NV.sub_(exact_NV.logsumexp(-1, keepdim=True))
    log_probs_N = exact_NV.gather(1, targets_N[:, None])[:, 0]
    entropies_N = -(exact_NV.exp().mul_(exact_NV)).sum(-1)
    errors = {}
    for name, wide in (("bfloat16", False), ("float32", True)):
        [scores] = fused_scores(hidden_NH, weight_VH, targets_N, temperatures=(1.0,), float32_logits=wide)
        errors[name] = {
            "log-prob, mean": _mean_error(scores[0], log_probs_N),
            "log-prob, largest": float((scores[0] - log_probs_N).abs().max()),
            "entropy, mean": _mean_error(scores[1], entropies_N),
        }
    return errors


def _mean_error(got_N: Tensor, want_N: Tensor) -> float:
    return float((got_N - want_N).abs().mean())


def measured(folder: Path) -> dict[str, float]:
    """Means over the steps of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in METRICS}
    return {name: float(np.mean(of_steps)) for name, of_steps in values.items()}


def report_heads(console: Console, heads: dict[float, dict[str, dict[str, float]]]) -> None:
    """Print the errors of the head alone."""
    table = Table("error, nats", "logits' deviation", "bfloat16", "float32", title=f"head alone, {VOCAB:,} tokens")
    for deviation, errors in heads.items():
        for name, rounded in errors["bfloat16"].items():
            table.add_row(name, f"{deviation:g}", f"{rounded:.2g}", f"{errors['float32'][name]:.2g}")
    console.print(table)


def report_runs(console: Console, runs: dict[bool, dict[str, float]]) -> None:
    """Print the mismatch of both runs."""
    table = Table("engine against trainer", "bfloat16 logits", "float32 logits", title="mean over the steps")
    for name in METRICS:
        table.add_row(name, *(f"{runs[wide][name]:.3g}" for wide in (False, True)))
    console.print(table)


if __name__ == "__main__":
    main()
