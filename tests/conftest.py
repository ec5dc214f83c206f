"""Fixtures for every package's tests; imports neither torch nor SGLang by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer random Qwen3 in float32 with a byte-level tokenizer."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny_qwen3"))
