"""`megatron-hapo generate` with a real engine and real reward workers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_hapo import cli
from megatron_hapo.config import dump_config
from tests.test_loop import make_config


@pytest.mark.slow
def test_prompts_are_sampled_and_scored_once_and_nothing_starts_when_all_is_there(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_config(make_config(tiny_qwen3, tmp_path / "runs", {"tp": 1}), tmp_path / "run.yaml")
    command = ["generate", str(tmp_path / "run.yaml"), "--prompts", "6", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "prompts:    6\n" in printed
    assert "responses:  24\n" in printed
    files = sorted((tmp_path / "out/rollouts").iterdir())
    assert [path.name for path in files] == ["step_00000001.parquet", "step_00000002.parquet"]
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len({row["uid"] for row in rows}) == 6
    assert len({tuple(row["response_ids"]) for row in rows}) > 12  # every sample has its own seed
    assert {row["correctness"] for row in rows} == {0.0}  # a random model is never right
    assert all(len(row["temperatures"]) == len(row["response_ids"]) <= 24 for row in rows)

    monkeypatch.setattr("megatron_hapo.launch.generate.local_ray", None)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == printed
    assert cli.main([*command, "rollout.temperature=0.5"]) == cli.EXIT_FAULT
    assert "(other: rollout); remove it" in capsys.readouterr().err
