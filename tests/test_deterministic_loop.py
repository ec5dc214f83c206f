"""Deterministic mode in whole runs: the same command again, killed and resumed, with another number of engines."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo.config import Config
from tests.chaos import LEARNING_RATE, SCORER
from tests.chaos_run import Run, differences, rows_of, wait_until
from tests.test_loop import is_timed, make_config

STEPS = 5


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="exact", dir="/tmp"))  # Ray's sockets need a short path
    (made / "letters.py").write_text(SCORER)
    yield made
    shutil.rmtree(made)


def make_run(name: str, folder: Path, model: Path, *, staleness: int, engines: int = 1) -> Run:
    values = make_config(model, folder / "runs", {"tp": 1}).model_dump()
    values |= {"name": name, "steps": STEPS, "deterministic": True, "async": {"max_staleness": staleness}}
    values["rollout"]["engines"] = engines
    values["algorithm"]["importance_correction"]["level"] = "token" if staleness else "none"
    values["eval"]["every"] = 2
    values["checkpoint"] |= {"every": 2}
    values["optimizer"]["lr"] = LEARNING_RATE
    values["reward"]["scorer"] = f"{folder / 'letters.py'}:score"
    temporary = folder / name
    temporary.mkdir()
    return Run(Config.model_validate(values), folder, temporary)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_interrupted_run_repeats_every_bit(staleness: int, folder: Path, tiny_qwen3: Path) -> None:
    """It has two engines, not one; an engine is killed after the second step, and everything after the third, which no
    checkpoint has."""
    plain = make_run("plain", folder, tiny_qwen3, staleness=staleness)
    hit = make_run("hit", folder, tiny_qwen3, staleness=staleness, engines=2)
    try:
        plain.start()
        wait_until(lambda: plain.code() == 0, plain, "end")
        hit.start()
        wait_until(lambda: hit.step() >= 2, hit, "second step")
        victim = hit.victim("scheduler")
        assert victim is not None
        victim.kill()
        wait_until(lambda: hit.step() >= 3, hit, "third step")
        hit.signal(signal.SIGKILL)
        assert hit.process is not None
        assert hit.process.wait() == -signal.SIGKILL
        hit.start()
        wait_until(lambda: hit.code() == 0, hit, "end")
    finally:
        plain.end()
        hit.end()
    expected = every_metric(plain)
    assert [row["step"] for row in expected] == list(range(STEPS + 1))
    assert len({row["reward/mean"] for row in expected[1:]}) == STEPS  # they teach something
    assert differences(every_metric(hit), expected) == []
    files = sorted((plain.config.run_dir / "hf").glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (hit.config.run_dir / "hf" / file.name).read_bytes()


def every_metric(run: Run) -> list[dict[str, float]]:
    """The rows of the run's metrics, without times."""
    return rows_of(run.config.run_dir, lambda name: not is_timed(name))
