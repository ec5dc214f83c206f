"""A few moments of `python -m tests.chaos`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.chaos import KINDS, Chaos, invert


@pytest.mark.slow
def test_a_run_that_is_hit_at_random_moments_equals_an_undisturbed_one() -> None:
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))  # Ray's sockets need a short path
    try:
        chaos = Chaos(folder=folder, seed=1, kinds=("kill_tree", "kill_scheduler", "full_disk"), stop_seconds=5.0)
        moments = chaos.run(3)
    finally:
        shutil.rmtree(folder)
    assert sorted(moment.kind for moment in moments) == ["full_disk", "kill_scheduler", "kill_tree"]
    assert [moment.row() for moment in moments if moment.faults] == []


def test_every_kind_has_its_hit_and_a_bit_is_flipped_once(tmp_path: Path) -> None:
    from tests.chaos import HITS

    assert {kind.partition("_")[0] for kind in KINDS} == set(HITS)
    path = tmp_path / "file"
    path.write_bytes(bytes(4))
    invert(path, 17)
    assert path.read_bytes() == b"\0\0\2\0"
    invert(path, 17)
    assert path.read_bytes() == bytes(4)
