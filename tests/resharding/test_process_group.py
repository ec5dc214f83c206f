"""Messages of a gloo group between threads that play trainer and engine ranks: values, deadlines, ranks that go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.resharding import process_group
from megatron_hapo.resharding.process_group import open_store
from tests.resharding.test_plan import MOE_SHAPE, SHAPE
from tests.resharding.test_transfer import CASES, Sides, make_transfer


@pytest.fixture
def port() -> Iterator[int]:
    store, port = open_store("127.0.0.1")
    yield port
    del store


@pytest.mark.parametrize("case", CASES)
def test_engines_hold_the_reference_cut_twice(tmp_path: Path, port: int, case: dict[str, int]) -> None:
    shape = MOE_SHAPE if "ep" in case else SHAPE
    sides = Sides(shape, **case, dtype=torch.float32)
    for _ in range(2):  # the second sync goes through the group of the first
        for targets in sides.targets.values():
            for tensor in targets.values():
                tensor.fill_(7.0)
        sides.run(make_transfer(tmp_path, meeting=sides.meeting(port)))
        assert not sides.errors
        for (_, rank), held in sides.targets.items():
            for name, want in sides.expected[rank].items():
                assert torch.equal(held[name], want), name


def small(port: int) -> Sides:
    return Sides(SHAPE, tp=2, pp=1, dp=1, engine_tp=1, engines=1, dtype=torch.float32)


def test_ranks_that_never_come_are_named(tmp_path: Path, port: int) -> None:
    sides = small(port)
    sides.run(make_transfer(tmp_path, deadline_seconds=0.5, meeting=sides.meeting(port)), without=(1,))
    assert sides.errors == ["connecting: not done within 0.5 s: trainer rank 1"] * 2


def test_a_rank_that_fails_is_noticed_at_once_and_the_next_sync_works(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = small(port)
    meeting = sides.meeting(port)
    original = process_group._End.start

    def dies(end: process_group._End, number: int, operation) -> None:
        if number == 5 and operation.__name__ == "send" and end._name.startswith("trainer rank 1"):
            raise WeightSyncError("died")
        original(end, number, operation)

    monkeypatch.setattr(process_group._End, "start", dies)
    start = time.monotonic()
    sides.run(make_transfer(tmp_path, deadline_seconds=60, meeting=meeting))
    assert time.monotonic() - start < 30
    assert len(sides.errors) == 3
    assert "died" in sides.errors, sides.errors
    assert sum(error.endswith("stopped, because trainer rank 1 failed") for error in sides.errors) == 2, sides.errors
    monkeypatch.undo()
    sides.run(make_transfer(tmp_path, meeting=replace(meeting, generation=1)))
    assert not sides.errors


def test_a_rank_slower_than_the_deadline_is_named(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = small(port)
    original = process_group._End.start

    def slow(end: process_group._End, number: int, operation) -> None:
        if number == 2 and operation.__name__ == "send" and end._name.startswith("trainer rank 1"):
            time.sleep(3)
        original(end, number, operation)

    monkeypatch.setattr(process_group._End, "start", slow)
    sides.run(make_transfer(tmp_path, deadline_seconds=1.5, meeting=sides.meeting(port)))
    named = "receiving weights: not done within 1.5 s: trainer rank 1 to engine 0, rank 0: model."
    assert any(error.startswith(named) for error in sides.errors)
