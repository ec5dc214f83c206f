"""What the tests of launchers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo.private_folder import run_time_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """For a Ray node: pytest's own folders are too long for its sockets."""
    with run_time_folder() as path:
        yield path
