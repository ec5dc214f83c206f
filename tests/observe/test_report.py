"""Curves of one run and of several."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_hapo.errors import DataError
from megatron_hapo.observe.report import write_report
from tests.observe.test_metrics import METRICS


def write_rows(run_dir: Path, num_steps: int, **extra: float | None) -> Path:
    run_dir.mkdir()
    rows = [{"step": 0, "eval/accuracy": 0.3}]
    rows += [{"step": step, **METRICS, "temperature/mean": 1.0, **extra} for step in range(1, num_steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def colors(picture: Path) -> int:
    with Image.open(picture) as image:
        assert image.width > 1000
        return len(image.convert("RGB").getcolors(1 << 24) or [])


def test_one_run_gives_its_curves(tmp_path):
    run = write_rows(tmp_path / "run", 5, **{"rollout/logprob_abs_diff": 1e-6, "eval/accuracy": 0.8})
    assert write_report(run) == run / "curves.png"
    assert colors(run / "curves.png") > 100


def test_several_runs_are_compared_in_the_first_ones_folder(tmp_path):
    runs = [write_rows(tmp_path / name, steps) for name, steps in (("a", 5), ("b", 3))]
    assert write_report(*runs) == tmp_path / "a" / "comparison.png"
    assert not (tmp_path / "b" / "comparison.png").exists()


@pytest.mark.parametrize("extra", [{"entropy/mean": None}, {"time/update": None}, {"temperature/min": None}])
def test_a_metric_that_is_missing_or_null_leaves_a_gap(tmp_path, extra):
    assert write_report(write_rows(tmp_path / "run", 2, **extra)).is_file()


def test_a_run_that_stopped_before_its_first_step_has_a_picture(tmp_path):
    assert write_report(write_rows(tmp_path / "run", 0)).is_file()


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(DataError, match="empty"):
        write_report(tmp_path / "empty")
