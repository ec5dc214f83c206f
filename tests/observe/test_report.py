"""Curves of one run and of several."""

import html
import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_hapo.errors import DataError
from megatron_hapo.observe.report import write_report
from megatron_hapo.observe.report_page import joined_seeds, watch, write_report_page
from megatron_hapo.observe.view.build_view import PLOTLY, asset, write_view
from tests import chromium
from tests.observe.recorded import some_rows, write_records
from tests.observe.test_metrics import METRICS


def write_rows(run_dir: Path, num_steps: int, **extra: float | None) -> Path:
    run_dir.mkdir(exist_ok=True)
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


CONFIG = "name: {name}\nseed: {seed}\noptimizer: {{lr: {lr}}}\n"


def seeds(tmp_path: Path) -> list[Path]:
    """Two seeds of one experiment and one run of another."""
    runs = []
    for name, seed, lr, reward in (("a", 0, 1, 1.0), ("a2", 1, 1, 3.0), ("b", 0, 2, 5.0)):
        runs.append(write_rows(tmp_path / name, 4, **{"reward/mean": reward, "reward/accuracy": 0.5}))
        (runs[-1] / "config.yaml").write_text(CONFIG.format(name=name, seed=seed, lr=lr))
    return runs


def test_seeds_of_one_experiment_become_a_line_with_a_band(tmp_path):
    first, second = joined_seeds(seeds(tmp_path))
    assert (first.name, second.name) == ("a, 2 seeds", "b")
    assert first.points("reward/mean")[0] == [1, 2.0, 1.0, 3.0]
    assert second.points("reward/mean") == [[step, 5.0] for step in (1, 2, 3, 4)]


def test_runs_without_a_config_are_lines_of_their_own(tmp_path):
    runs = [write_rows(tmp_path / name, 2) for name in ("a", "b")]
    assert [line.name for line in joined_seeds(runs)] == ["a", "b"]


def test_the_page_is_one_file_and_names_nothing_outside(tmp_path):
    run = write_rows(tmp_path / "<script><b>", 2)
    text = write_report_page([run]).read_text()
    own = text.replace(asset(PLOTLY), "")
    assert len(own) < len(text)
    assert "<b>" not in own
    assert "://" not in own
    assert "default-src 'none'" in html.unescape(own)


def test_watching_waits_for_the_first_step_and_draws_again_after_each(tmp_path, monkeypatch, capsys):
    run, drawn = tmp_path / "run", []
    pauses = iter(["first", "nothing", "step", "end"])

    def sleep(seconds: float) -> None:
        match next(pauses):
            case "first":
                write_rows(run, 1)
            case "step":
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": 2}) + "\n")
            case "end":
                raise KeyboardInterrupt

    def draw(*, live: bool) -> list[Path]:
        path = write_report_page([run], live=live)
        drawn.append(live)
        return [path]

    monkeypatch.setattr("megatron_hapo.observe.report_page.time.sleep", sleep)
    with pytest.raises(DataError, match="no such folder"):
        watch([run], draw)
    run.mkdir()
    watch([run], draw)
    assert drawn == [True, True, False]
    waiting, path = capsys.readouterr().out.splitlines()
    assert waiting.startswith(f"waiting for the first step: {run}: no metrics")
    assert path == str(run / "report.html")


def test_the_page_shows_the_numbers_under_the_pointer_and_links_to_responses(tmp_path):
    if chromium.PATH is None:
        pytest.skip(chromium.MISSING)
    runs = seeds(tmp_path)
    write_records(runs[0], "step_00000003", some_rows(3))
    with chromium.chromium(tmp_path / "chromium") as page:
        page.size(1300, 900)
        page.open(write_report_page(runs).as_uri())
        assert f"megatron-hapo view {runs[0]}" in page.value("document.querySelector('.note').textContent")
        write_view(runs[:1])
        page.open(write_report_page(runs).as_uri())
        reward = "[...document.querySelectorAll('.panel')].find(p => p.textContent.startsWith('Reward'))"
        page.value(f"{reward}.id = 'reward'")
        page.wait("document.querySelector('#reward .plot').dataset.state === 'drawn'")
        page.hover("#reward .plot")
        page.wait("document.querySelector('#reward .hoverlayer text')")
        numbers = page.value("document.querySelector('#reward .hoverlayer').textContent")
        assert "a, 2 seeds : 2 (1 to 3)" in numbers
        assert "b : 5" in numbers
        page.click("#reward .plot")
        page.wait("document.querySelector('#links a')")
        link = page.value("document.querySelector('#links a').href")
        assert link == f"{(runs[0] / 'view/index.html').as_uri()}#/0/step_00000003"
        page.open(link)
        assert page.value("document.querySelectorAll('.card').length") == 3
        assert page.faults == []
