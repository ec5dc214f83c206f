"""What recording costs: bytes, memory and seconds of a large step's file, and the time that it adds to a training step.

    python benchmarks/records.py [--responses 8192] [--tokens 4000]
    python benchmarks/records.py --train [--out runs/records] [key=value ...]

The first writes one step of random tokens, as the thread of a run would, and reads one group of it. With `--train`,
which needs `make demo`'s model, the demo trains with every fourth step recorded: a step counts as recorded if it hands
tokens over, or if the file is written beside it (the next one), so that both kinds alternate in one run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from megatron_hapo.config import Config
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.records import open_records
from megatron_hapo.observe.view.record_files import recorded_runs
from megatron_hapo.types import EntropyStats, Prompt, Rollout, Score, ScoredGroup, TokenScores, pack_groups
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 16
UPDATED = ("h", "token_advantages", "importance_ratios", "clip_low", "clip_high")
EVERY = 4
STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/records"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run with --train")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    if options.train:
        train(options.out, options.overrides)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), options.responses, options.tokens)


def write(folder: Path, responses: int, tokens: int) -> None:
    """Write and read one step's file."""
    write_tiny_qwen3(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    config = Config.model_validate(
        {"name": "run", "output_dir": folder, "steps": 1, "model": {"path": folder / "model"},
         "batch": {"prompts_per_step": responses // SAMPLES, "samples_per_prompt": SAMPLES, "prompts_per_minibatch": 1},
         "record": {"every": 1, "groups": None}, "data": {"train": {"type": "arithmetic", "size": 4}}}
    )  # fmt: skip
    groups = random_groups(responses, tokens, len(tokenizer))
    stats = EntropyStats(pivot=0.0, log_max=1.0, log_min=-1.0, rms=0.5, num_tokens=responses * tokens)
    batch = replace(pack_groups(groups), advantages=np.ones(responses, np.float32), stats=stats)
    draw, count = np.random.default_rng(0), batch.num_response_tokens
    scores = TokenScores(
        log_probs=batch.rollout_log_probs - np.float32(0.01),
        rollout_temperature_log_probs=batch.rollout_log_probs + np.float32(1e-3) * draw.normal(size=count).astype("f4"),
        entropies=draw.exponential(size=count).astype(np.float32),
    )  # fmt: skip
    updated = {name: draw.normal(size=count).astype(np.float32) for name in UPDATED}
    origin = Origin(model="", vocabulary=vocabulary_fingerprint(tokenizer))
    with PeakMemory(every_seconds=0.2) as memory:
        begin, cpu = time.perf_counter(), time.process_time()
        with open_records(config, tokenizer, origin, start_step=0) as records:
            assert records is not None, "the config records every step"
            handed_over = time.perf_counter()
            records.add_step(1, groups, batch, scores, updated, collection={})
            handed_over = time.perf_counter() - handed_over
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    path = config.run_dir / "rollouts/step_00000001.parquet"
    size = path.stat().st_size
    print(
        f"{responses} responses of {tokens} tokens: {size / 1e9:.2f} GB, {size / responses / tokens:.1f} bytes a token"
    )
    print(f"handed over in {handed_over * 1e3:.2f} ms; the thread wrote for {seconds:.1f} s ({cpu:.1f} s of CPU)")
    print(f"peak memory of the thread {memory.rise / 1e6:.0f} MB, {pq.ParquetFile(path).num_row_groups} row groups")
    begin = time.perf_counter()
    rows = recorded_runs([config.run_dir])[0].files[0].responses(7, 7)
    print(f"one group of {len(rows)} responses read in {time.perf_counter() - begin:.2f} s")


def random_groups(responses: int, tokens: int, vocabulary: int) -> list[ScoredGroup]:
    """Groups of random tokens."""
    draw = np.random.default_rng(0)
    groups = []
    for number in range(responses // SAMPLES):
        prompt = Prompt(
            uid=f"p{number}", token_ids=draw.integers(0, vocabulary, 200, dtype=np.int32), ground_truth="1",
            data_source="random",
        )  # fmt: skip
        rollouts = [
            Rollout(
                prompt=prompt, response_ids=draw.integers(0, vocabulary, tokens, dtype=np.int32),
                rollout_log_probs=-draw.exponential(size=tokens).astype(np.float32),
                temperatures=draw.uniform(0.95, 1.05, tokens).astype(np.float32),
                policy_versions=np.zeros(tokens, dtype=np.int32), finish_reason="stop",
            )
            for _ in range(SAMPLES)
        ]  # fmt: skip
        groups.append(ScoredGroup(rollouts, [Score(1.0, 1.0)] * SAMPLES))
    return groups


def train(out: Path, overrides: list[str]) -> None:
    """Train the demo, and compare the steps that recording touches with the others."""
    command = [
        sys.executable, "-m", "megatron_hapo", "train", str(ROOT / "configs/demo_cpu.yaml"), f"output_dir={out}",
        f"steps={STEPS}", f"record.every={EVERY}", "eval.every=0", "checkpoint.hf_at_end=false", *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in read_metrics(out / "demo_cpu" / METRICS_FILE) if row["step"] > EVERY]
    touched = {True: [], False: []}
    for row in rows:
        touched[row["step"] % EVERY in (0, 1)].append(row["time/step"])
    recorded, others = (np.array(touched[key]) for key in (True, False))
    more = np.mean(recorded) / np.mean(others) - 1
    spread = np.hypot(np.std(recorded) / len(recorded) ** 0.5, np.std(others) / len(others) ** 0.5) / np.mean(others)
    print(f"{len(recorded)} steps with records {np.mean(recorded):.3f} s, median {np.median(recorded):.3f} s")
    print(f"{len(others)} steps without records {np.mean(others):.3f} s, median {np.median(others):.3f} s")
    print(f"records add {more:.2%} (standard error {spread:.2%})")


if __name__ == "__main__":
    main()
