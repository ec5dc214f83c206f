from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.distributed import run_ranks

left_behind: list[int] = []


def facts(rank: int) -> dict[str, object]:
    import torch
    import torch.distributed as dist

    seen = {
        "pid": os.getpid(),
        "left behind": list(left_behind),
        "variable": os.environ.get("OF_THE_CALLER"),
        "random": torch.rand(1).item(),
        "threads": torch.get_num_threads(),
        "parent's threads": threads_of(os.getppid()),
    }
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    left_behind.append(rank)
    os.environ["OF_THE_CALLER"] = "changed by a rank"
    torch.set_num_threads(2)
    return seen | {"total": int(total)}


def threads_of(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads:")]
    return int(line.split()[1])


def hang(rank: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    time.sleep(3600)


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has a reason")
    time.sleep(3600)


def test_every_rank_is_a_fresh_process_with_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "first")
    first = run_ranks(2, facts)
    monkeypatch.setenv("OF_THE_CALLER", "second")
    second = run_ranks(2, facts)
    assert [seen["variable"] for seen in first + second] == ["first", "first", "second", "second"]
    assert len({seen["pid"] for seen in first + second}) == 4
    for seen in first + second:
        assert seen["left behind"] == []
        assert seen["random"] == first[0]["random"]
        assert (seen["threads"], seen["parent's threads"], seen["total"]) == (1, 1, 3)


def test_a_failure_is_raised_with_the_ranks_traceback() -> None:
    with pytest.raises(ValueError, match="rank 1 has a reason") as caught:
        run_ranks(2, fail)
    assert 'raise ValueError("rank 1 has a reason")' in str(caught.value.__cause__)


def test_ranks_that_hang_are_killed(tmp_path: Path) -> None:
    run_ranks(1, facts)  # from now on the server is running
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not finish within"):
        run_ranks(2, hang, tmp_path, timeout_seconds=3)
    for pid in [int((tmp_path / str(rank)).read_text()) for rank in range(2)]:
        assert not Path(f"/proc/{pid}").exists()
