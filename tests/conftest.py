"""Fixtures shared by all tests. Does not import torch or SGLang itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen3 with two layers and random float32 weights, and a byte-level tokenizer."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny_qwen3"))
