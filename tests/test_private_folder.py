"""What a run needs only while it runs is private, and is gone afterwards, even if the run was killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo import private_folder
from megatron_hapo.private_folder import PrivateFolder, current_folder, remove_abandoned, run_time_folder

OWNER = """
import sys
from megatron_hapo.private_folder import run_time_folder, shared_memory_prefix

with run_time_folder() as folder:
    print(folder, flush=True)
    print(shared_memory_prefix(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
    tempfile.tempdir = None


def test_temporary_files_are_in_a_private_folder_until_it_is_removed(parent: Path) -> None:
    with run_time_folder() as folder:
        assert folder.parent == parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
        assert current_folder() == folder
        _, scratch = tempfile.mkstemp()
        assert Path(scratch).parent == folder
    assert not folder.exists()
    assert tempfile.gettempdir() == str(parent)
    assert current_folder() is None


def test_the_folder_of_a_killed_owner_is_removed_by_the_next_start(parent: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder, prefix = Path(owner.stdout.readline().strip()), owner.stdout.readline().strip()
        assert folder.parent == parent
        segment = private_folder.SHARED_MEMORY / f"{prefix}segment"
        segment.write_text("")
        by_process_id = private_folder.SHARED_MEMORY / f"torch_{owner.pid}_1_1"
        by_process_id.write_text("")
        (folder / "ray/session").mkdir(parents=True)
        with run_time_folder() as other:
            assert folder.is_dir(), "its owner is alive"
            assert segment.exists()
            assert other != folder
        owner.kill()
        owner.wait()
    with run_time_folder():
        assert not folder.exists()
        assert not segment.exists()
        assert not by_process_id.exists()


def test_folders_that_are_not_ours_are_left_alone(parent: Path) -> None:
    (parent / "megatron-hapo-no-owner").mkdir()
    (parent / "other").mkdir()
    (parent / "other/owner").touch()
    (parent / "megatron-hapo-link").symlink_to(parent / "other")
    remove_abandoned(parent)
    assert sorted(path.name for path in parent.iterdir()) == ["megatron-hapo-link", "megatron-hapo-no-owner", "other"]
    assert (parent / "other/owner").exists()


def test_a_folder_within_another_is_removed_alone(parent: Path) -> None:
    with run_time_folder() as outer:
        inner = PrivateFolder()
        assert inner.path.parent == outer
        remove_abandoned(outer)
        assert inner.path.is_dir()
        inner.close()
        assert not inner.path.exists()
        assert outer.is_dir()


def test_a_long_path_for_temporary_files_is_avoided(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = parent / "a_folder_with_a_name_that_leaves_no_room_for_a_socket"
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with run_time_folder() as folder:
        assert folder.parent == Path("/tmp")
        longest = f"{folder}{private_folder._RAY_SOCKET}"
        assert len(longest) <= 107


def test_a_user_without_a_home_gets_a_folder_too(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(private_folder.Path, "home", no_home)
    with run_time_folder() as folder:
        assert folder.is_dir()
