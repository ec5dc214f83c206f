"""`megatron-hapo eval` with real engines: a comparison of models that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hapo import cli
from megatron_hapo.config import dump_config
from tests.test_loop import make_config
from tests.tiny_model import write_tiny_qwen3

SETS = {
    "sums": {"type": "arithmetic", "size": 6, "seed": 1, "samples": 3},
    "greedy": {"type": "arithmetic", "size": 4, "seed": 3, "temperature": 0, "max_response_tokens": 5},
}


@pytest.mark.slow
def test_a_run_s_exports_are_compared_and_an_interrupted_evaluation_goes_on(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = tmp_path / "hf_steps"
    for step in (1, 2):
        write_tiny_qwen3(steps / f"step_{step:08d}", seed=step)
    config = make_config(tiny_qwen3, tmp_path / "runs", {"tp": 1})
    values = config.model_dump(mode="json")
    values["data"]["eval"] = SETS
    dump_config(type(config).model_validate(values), tmp_path / "run.yaml")
    command = ["eval", str(tmp_path / "run.yaml"), "--model", str(steps), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "step_00000001" in printed
    assert "differences are to step_00000001" in printed

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary) == ["step_00000001", "step_00000002"]
    assert list(summary["step_00000002"]) == ["sums", "greedy", "all sets"]
    assert summary["step_00000002"]["sums"]["differences"]["avg"]["value"] == 0.0  # a random model is never right
    files = sorted((tmp_path / "out").glob("*/*.jsonl"))
    contents = [path.read_text() for path in files]
    assert sorted(path.name for path in files) == ["greedy.jsonl", "greedy.jsonl", "sums.jsonl", "sums.jsonl"]
    rows = [json.loads(line) for content in contents for line in content.splitlines()]
    assert len(rows) == 2 * (6 * 3 + 4)
    assert all(row["num_tokens"] <= 5 for row in rows if row["uid"].startswith("greedy/"))
    first, second = (path.read_text() for path in files if path.name == "sums.jsonl")
    assert first != second, "the two models have different weights"

    # Interrupted while it wrote the second model's results: the rest is generated again, and equal.
    cut = files[-1]
    cut.write_text(contents[-1][: len(contents[-1]) // 2])
    assert cli.main(command) == 0
    assert [path.read_text() for path in files] == contents
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    capsys.readouterr()

    # Everything is there: nothing is started, and other settings are refused.
    assert cli.main([*command, "data.eval.sums.temperature=0.9"]) == cli.EXIT_FAULT
    assert "made with other settings (sampling.temperature 0.7 -> 0.9)" in capsys.readouterr().err
