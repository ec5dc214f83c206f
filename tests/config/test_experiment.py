"""The file of an experiment: what it plans, in which order, and the mistakes that it tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo.config.experiment import plan_runs, read_experiment
from megatron_hapo.errors import ConfigError

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples/checked_sums/job.yaml"
METHODS = ROOT / "configs/methods"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text.replace("JOB", str(JOB)).replace("METHODS", str(METHODS)).replace("OUT", str(folder / "runs")))
    return path


PLAIN = """
name: small
output_dir: OUT
job: JOB
baseline: DAPO
seeds: [3, 1]
methods:
  DAPO: METHODS/dapo.yaml
  wide clip: {base: METHODS/dapo.yaml, algorithm: {clip_high: 0.5}}
"""


def test_every_method_runs_with_every_seed_under_every_setting(tmp_path: Path) -> None:
    settings = "settings:\n  fast: {optimizer: {lr: 1.0e-3}, algorithm: {clip_high: 0.4}}\n  long: {steps: 40}\n"
    path = write(tmp_path, PLAIN + settings)
    runs = plan_runs(read_experiment(path), path)
    assert len(runs) == 2 * 2 * 2
    assert [run.seed for run in runs] == [3] * 4 + [1] * 4
    assert [run.config.steps for run in runs] == [20, 20, 40, 40] * 2  # the cheapest first
    by_name = {run.config.name: run.config for run in runs}
    assert by_name["wide_clip__fast_seed3"].algorithm.clip_high == 0.4  # settings come after methods
    assert by_name["wide_clip__long_seed1"].algorithm.clip_high == 0.5
    assert by_name["dapo__long_seed1"].algorithm.clip_high == 0.07  # of the job
    assert by_name["dapo__fast_seed1"].optimizer.lr == 1e-3
    assert all(config.run_dir == tmp_path / "runs/small" / name for name, config in by_name.items())
    assert all(config.record.groups is None for config in by_name.values())


def test_the_shipped_experiment_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its output_dir is relative to the current folder
    path = ROOT / "examples/checked_sums/experiment.yaml"
    experiment = read_experiment(path)
    runs = plan_runs(experiment, path)
    assert len(runs) == len(experiment.methods) * 5 == 40
    ground = {"name", "seed", "algorithm"}
    (first,) = {run.config.model_dump_json(exclude=ground) for run in runs}  # they differ in nothing else
    assert '"steps":20' in first


PAPER = [path for path in sorted((ROOT / "examples/paper").glob("*.yaml")) if "\nmethods:" in path.read_text()]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_experiments_differ_in_their_methods_only(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = plan_runs(read_experiment(path), path)
    (ground,) = {run.config.model_dump_json(exclude={"name", "seed", "algorithm"}) for run in runs}
    assert '"dynamic_sampling":{"enabled":true' in ground
    assert {(run.config.algorithm.clip_low, run.config.algorithm.clip_high) for run in runs} == {(0.2, 0.28)}
    assert {run.config.reward.wrong for run in runs} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: DAPO", "baseline: GRPO"), "baseline: must be one of the methods (DAPO, wide clip), got GRPO"),
        (("seeds: [3, 1]", "seeds: []"), "seeds: must not be empty"),
        (("seeds: [3, 1]", "seeds: [x]"), "seeds"),
        (("job: JOB", "jobs: JOB"), "job: is required"),
        (("clip_high: 0.5", "clip_hihg: 0.5"), "algorithm.clip_hihg"),
        (("METHODS/dapo.yaml\n", "METHODS/nothing.yaml\n"), "no such config file"),
        (("clip_high: 0.5}", "clip_high: 0.5}, eval: {every: 0}"), "eval.every: a comparison needs evaluations"),
        (("clip_high: 0.5}", "clip_high: 0.5}, record: {every: 0}"), "record: a comparison needs all recorded"),
        (("clip_high: 0.5}", "clip_high: 0.5}, record: {groups: 2}"), "record: a comparison needs all recorded"),
        (("  wide clip", "  DAPO"), "duplicate key"),
        (
            ("  wide clip: ", "  Dapo: [METHODS/dapo.yaml]\n  wide clip: "),
            "two labels give the same file name: dapo_seed1",
        ),
    ],
)
def test_mistakes_are_told_in_lines_that_name_the_file(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = write(tmp_path, PLAIN.replace(*change))
    with pytest.raises(ConfigError) as caught:
        plan_runs(read_experiment(path), path)
    assert message in str(caught.value)
    assert all(str(path) in line for line in str(caught.value).splitlines())
