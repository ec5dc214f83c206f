"""Comparisons of methods: curves, budgets and intervals against numbers worked out by hand, and a real experiment."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from megatron_hapo.cli import main
from megatron_hapo.config.experiment import PlannedRun, plan_runs, read_experiment
from megatron_hapo.data.demo_model import make_demo_model
from megatron_hapo.errors import DataError, HapoError
from megatron_hapo.launch.compare.curves import Curve, common_budget, compare, interval, problem_weights, read_curve
from megatron_hapo.launch.compare.results import write_results
from megatron_hapo.launch.compare.runs import is_finished, run_all
from tests.config.test_experiment import PLAIN, write
from tests.time_limits import patient

STEPS = (0, 10, 20)
EXAMPLES = Path(__file__).parents[2] / "examples"


def curve(counts: list[list[int]], *, samples: int = 4, seconds: float = 1.0) -> Curve:
    evaluations = len(counts)
    return Curve(
        steps=np.arange(evaluations) * 10, responses=np.arange(evaluations) * 640.0,
        seconds=np.arange(evaluations) * 10 * seconds, uids=tuple("abc"[: len(counts[0])]),
        sets=np.zeros(len(counts[0]), np.int64),
        correct=np.array(counts), samples=samples, rows=[],
    )  # fmt: skip


def write_run(run: PlannedRun, counts: list[list[int]], *, kept: float = 1.0, seconds: float = 2.0) -> None:
    """The files of a finished run with these counts of correct responses at steps 0, 10 and 20."""
    folder = run.config.run_dir
    (folder / "rollouts").mkdir(parents=True)
    rows = [{"step": 0, "eval/accuracy": 0.0}]
    for step in range(1, 21):
        row = {
            "step": step, "rollout/kept_groups": kept, "time/step": seconds, "entropy/mean": 0.1 + step / 1000,
            "response_length/mean": 40.0, "loss/clip_fraction_low": 0.01, "loss/clip_fraction_high": 0.02,
        }  # fmt: skip
        if step % 10 == 0:
            row |= {"time/step": seconds + 5, "time/eval": 5.0, "eval/accuracy": 0.5}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, of_step in zip(STEPS, counts, strict=True):
        table = pa.table(
            {
                "uid": [f"p{p}" for p in range(len(of_step)) for _ in range(8)],
                "sample": list(range(8)) * len(of_step),
                "correctness": pa.array([float(s < n) for n in of_step for s in range(8)], pa.float32()),
            }
        )
        pq.write_table(table, folder / "rollouts" / f"eval_{step:08d}.parquet")


def test_values_between_evaluations_lie_on_the_line() -> None:
    run = curve([[0, 4], [2, 4], [4, 4]])
    assert run.pass_when(1, "steps", 10).tolist() == [0.5, 1.0]
    assert run.pass_when(1, "steps", 15).tolist() == [0.75, 1.0]
    assert run.pass_when(1, "responses", 160).tolist() == [0.125, 1.0]
    assert run.pass_when(1, "steps", 99).tolist() == [1.0, 1.0]  # never beyond the last
    assert run.pass_at(2)[1].tolist() == pytest.approx([1 - (2 / 4) * (1 / 3), 1.0])


def test_budgets_are_what_the_most_frugal_run_spent() -> None:
    slow, fast = curve([[0], [1], [2]], seconds=3.0), curve([[0], [1], [4]])
    assert common_budget([slow, fast], "seconds") == 20.0
    found = compare({0: slow}, {0: fast}, k=1, budget="seconds", spent=20.0)
    assert found.value == pytest.approx(1 / 4 * 2 / 3)
    assert found.difference == pytest.approx(1 / 6 - 1.0)


def test_intervals_agree_with_the_normal_approximation() -> None:
    """Independent noise of problems: the standard error is that of the mean over problems, with little from seeds."""
    generator = np.random.default_rng(0)
    of_problems = generator.normal(0.1, 0.5, 400)
    low, high = interval(np.tile(of_problems, (5, 1)), np.zeros(400))
    error = of_problems.std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (of_problems.mean() - 1.96 * error, of_problems.mean() + 1.96 * error), abs=0.004
    )
    of_seeds = np.tile(generator.normal(0.1, 0.5, (100, 1)), (1, 3))
    low, high = interval(of_seeds, np.zeros(3))
    error = of_seeds.std() / 10
    assert (low, high) == pytest.approx((of_seeds.mean() - 1.96 * error, of_seeds.mean() + 1.96 * error), abs=0.01)
    assert interval(np.full((5, 64), 0.25), np.zeros(64)) == pytest.approx((0.25, 0.25))


def test_every_evaluation_set_counts_the_same() -> None:
    """A set of two problems against one of 200: the small one has half of the mean, and nearly all of its variance."""
    sets_P = np.array([0, 0] + [1] * 200)
    assert problem_weights(sets_P) == pytest.approx([0.25, 0.25] + [0.0025] * 200)
    run = Curve(
        steps=np.array([0]), responses=np.zeros(1), seconds=np.zeros(1), uids=(), sets=sets_P,
        correct=np.array([[2, 0] + [1] * 200]), samples=2, rows=[],
    )  # fmt: skip
    assert run.mean(1).tolist() == pytest.approx([0.5])
    low, high = interval(np.array([[1.0, -1.0] + [0.1] * 200]), sets_P)
    assert (low, high) == pytest.approx((-0.45, 0.55))  # both draws from the small set may be the same problem


def test_a_run_is_read_with_what_its_evaluations_had_cost(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    run = plan_runs(read_experiment(path), path)[0]
    write_run(run, [[0, 8], [4, 8], [8, 8]], kept=0.5)
    assert is_finished(run)
    found = read_curve(run.config.run_dir, 64)
    assert found.steps.tolist() == [0, 10, 20]
    assert found.responses.tolist() == [0, 1280, 2560]  # dynamic sampling dropped half
    assert found.seconds.tolist() == [0, 20, 40]  # without evaluations
    assert found.correct.tolist() == [[0, 8], [4, 8], [8, 8]]
    with pytest.raises(DataError, match="at least two recorded evaluations, got 0"):
        read_curve(tmp_path, 64)


def test_results_say_what_the_intervals_support_and_no_more(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN.replace("  wide clip", "  same: METHODS/grpo.yaml\n  wide clip"))
    experiment = read_experiment(path)
    runs = plan_runs(experiment, path)
    with pytest.raises(DataError, match="nothing to compare yet"):
        write_results(experiment, runs)
    counts = {"DAPO": [2, 4, 6, 4] * 16, "same": [4, 4, 4, 4] * 16, "wide clip": [4, 6, 8, 6] * 16}
    for run in runs:
        last = counts[run.arm.method]
        write_run(run, [[0] * 64, [n // 2 for n in last], last], seconds=4.0 if run.arm.method == "wide clip" else 2.0)
    text = write_results(experiment, runs).read_text()
    assert "| DAPO | 0.250 | 0.500 |" in text
    assert "0.750 (**+25.0**; +25.0 to +25.0)" in text
    assert "- pass@1, step 20: above DAPO: wide clip; no difference shown from DAPO: same." in text
    assert "- pass@1, 40 s: no difference shown from DAPO: same; " not in text
    assert re.search(r"0\.375 \(\*\*-12\.5\*\*; -1\d\.\d to -\d+\.\d\)", text)  # at equal time: half as many steps
    assert (tmp_path / "runs/small/comparison.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "runs/small/results.json").read_text())
    assert numbers["wide clip"]["pass@1, step 20"]["difference"] == pytest.approx(0.25)
    for file in (runs[0].config.run_dir / "rollouts").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="nothing to compare yet"):
        write_results(experiment, runs)  # a run of the baseline is missing


def test_runs_that_were_made_with_other_settings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    run = plan_runs(read_experiment(path), path)[0]
    run.config.run_dir.mkdir(parents=True)
    (run.config.run_dir / "experiment.yaml").write_text("{}")
    with pytest.raises(HapoError, match=r"1 runs were made with other settings \(dapo_seed3\): restore the settings"):
        run_all([run], parallel=1, console=Console(quiet=True))


def test_a_failing_run_is_told_with_its_last_line_and_its_log(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN.replace("{clip_high: 0.5}", "{clip_high: 0.5}, model: {path: MISSING}"))
    runs = [run for run in plan_runs(read_experiment(path), path) if run.arm.method == "wide clip"][:1]
    with pytest.raises(HapoError, match=r"wide_clip_seed3: ended with exit code 2 after .* s: .*MISSING.*seed3\.log\)"):
        run_all(runs, parallel=1, console=Console(quiet=True))


def test_a_stopped_experiment_stops_its_runs(tmp_path: Path) -> None:
    """The command's own process gets SIGTERM, as from a scheduler; its job must not outlive it."""
    path = write(tmp_path, PLAIN)
    command = [sys.executable, "-m", "megatron_hapo", "compare", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + patient(120)
        while not (jobs := psutil.Process(running.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.terminate()
        assert "interrupted" in running.communicate()[1]
        assert running.returncode == 130
    _, alive = psutil.wait_procs(jobs, timeout=patient(60))
    assert not alive


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the task's characters and nothing else."""
    folder = tmp_path_factory.mktemp("model") / "untrained"
    make_demo_model(folder, steps=0)
    return folder


@pytest.mark.slow
def test_an_experiment_runs_stops_and_goes_on(tmp_path: Path, untrained: Path, capsys: pytest.CaptureFixture) -> None:
    small = (
        f"{{base: METHODS/dapo.yaml, steps: 2, model: {{path: {untrained}}}, eval: {{every: 1, samples: 2}}, "
        "data: {eval: {type: checked_sums, size: 4, seed: 1}}}"
    )
    path = write(tmp_path, PLAIN.replace("METHODS/dapo.yaml\n", f"{small}\n").replace("[3, 1]", "[3]").replace(
        "{base: METHODS/dapo.yaml, algorithm", f"{small[:-1]}, algorithm"))  # fmt: skip
    experiment = read_experiment(path)
    runs = plan_runs(experiment, path)
    run_all(runs[:1], parallel=1, console=Console(quiet=True))
    before = (runs[0].config.run_dir / "metrics.jsonl").stat().st_mtime_ns
    assert main(["compare", str(path)]) == 0
    assert (runs[0].config.run_dir / "metrics.jsonl").stat().st_mtime_ns == before  # not run again
    assert capsys.readouterr().out.strip().endswith("RESULTS.md")
    assert "| wide clip |" in (tmp_path / "runs/small/RESULTS.md").read_text()


@pytest.mark.slow
def test_a_command_of_the_paper_runs_in_miniature_from_start_to_drawing(
    tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / "paper/miniature.yaml").read_text().replace("miniature_job.yaml", "own.yaml")
    text = text.replace("../../configs", f"{EXAMPLES.parent}/configs").replace("../checked", f"{EXAMPLES}/checked")
    (tmp_path / "own.yaml").write_text(
        f"base: {EXAMPLES}/paper/miniature_job.yaml\nsteps: 1\nmodel: {{path: {untrained}}}\n"
        "eval: {every: 1, samples: 2}\ndata: {eval: {size: 4}}\ndynamic_sampling: {enabled: false}\n"
    )
    (tmp_path / "miniature.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "miniature.yaml"]) == 0
    assert (tmp_path / "runs/paper_miniature/comparison.png").exists()
    assert "| A+B+C+D |" in (tmp_path / "runs/paper_miniature/RESULTS.md").read_text()
