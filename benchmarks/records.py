"""What recording costs: bytes, memory and seconds of a large step's file, and the time that it adds to a training step.

    python benchmarks/records.py [--responses 8192] [--tokens 4000]
    python benchmarks/records.py --train [--steps 240] [--out runs/records] [key=value ...]

The first writes one step of random tokens, as the thread of a run would, and reads one group of it. With `--train`,
which needs `make demo`'s model, the demo trains with every fourth step recorded: a step counts as recorded if it hands
tokens over, or if the file is written beside it (the next one), so that both kinds alternate in one run. Two of each
are compared with each other. The seconds that the driver spends on records, and its thread's seconds of CPU, are
measured where they are spent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from megatron_hapo.checks.preflight import load_checked_config
from megatron_hapo.config import Config
from megatron_hapo.data.prompts import load_tokenizer
from megatron_hapo.launch.run import run_training
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics
from megatron_hapo.observe.record_schema import Origin, vocabulary_fingerprint
from megatron_hapo.observe.records import RecordWriter, open_records
from megatron_hapo.observe.view.record_files import recorded_runs
from megatron_hapo.trainer.over_ranks import TrainerOverRanks
from megatron_hapo.types import EntropyStats, Prompt, Rollout, Score, ScoredGroup, TokenScores, pack_groups
from tests.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 16
UPDATED = ("h", "token_advantages", "importance_ratios", "clip_low", "clip_high")
EVERY = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=240, help="of the run with --train")
    parser.add_argument("--out", type=Path, default=Path("runs/records"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run with --train")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    if options.train:
        train(options.out, options.steps, options.overrides)
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


def train(out: Path, steps: int, overrides: list[str]) -> None:
    """Train the demo, and compare the steps that recording touches with the others, in turns."""
    config = load_checked_config(
        ROOT / "configs/demo_cpu.yaml",
        [f"output_dir={out}", f"steps={steps}", f"record.every={EVERY}", "eval.every=0", "checkpoint.hf_at_end=false",
         "checkpoint.resume=false", *overrides],
    )  # fmt: skip
    spent: dict[str, list[float]] = {"driver": [], "thread": []}
    RecordWriter.add_step = timed(RecordWriter.add_step, spent["driver"], time.perf_counter)
    TrainerOverRanks.updated_tokens = timed(TrainerOverRanks.updated_tokens, spent["driver"], time.perf_counter)
    RecordWriter._write = timed(RecordWriter._write, spent["thread"], time.thread_time)
    with (out.parent / f"{out.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        run_training(config)
    seconds = [row["time/step"] for row in read_metrics(config.run_dir / METRICS_FILE) if row["step"] > EVERY]
    from_record = seconds[EVERY - 1 :]  # a turn begins with the step that is recorded
    turns = np.array(from_record[: len(from_record) // EVERY * EVERY]).reshape(-1, EVERY)
    recorded, others = turns[:, :2].mean(axis=1), turns[:, 2:].mean(axis=1)
    more = recorded / others - 1
    draws = np.random.default_rng(0).choice(more, (10_000, len(more)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    step, num_records = float(np.median(others)), steps // EVERY
    print(f"load average {os.getloadavg()[0]:.1f} at the end; median step without records {step:.3f} s")
    print(
        f"{len(more)} turns of {EVERY} steps, two with and two without records: records add {np.median(more):.2%} "
        f"(median; 95 % interval {low:.2%} to {high:.2%})"
    )
    driver, thread = sum(spent["driver"]) / num_records, sum(spent["thread"]) / num_records
    print(f"a record: the driver waits {driver * 1e3:.1f} ms ({driver / step:.2%} of a step)")
    print(f"and its thread takes {thread * 1e3:.1f} ms of CPU ({thread / step:.2%} of a step)")


def timed(method: Callable[..., Any], spent: list[float], clock: Callable[[], float]) -> Any:
    """The method, with the seconds of each call added to a list."""

    def call(*arguments: Any, **options: Any) -> Any:
        begin = clock()
        try:
            return method(*arguments, **options)
        finally:
            spent.append(clock() - begin)

    return call


if __name__ == "__main__":
    main()
