"""What deterministic mode sets in a trainer rank."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hapo.config import ParallelSizes
from megatron_hapo.model import determinism
from megatron_hapo.model.build import transformer_config
from megatron_hapo.model.families import read_shape
from megatron_hapo.model.rank_environment import environment


def test_a_rank_on_a_gpu_gets_the_variables_of_cublas_and_transformer_engine() -> None:
    variables = environment("cuda", loopback=True, deterministic=True)
    assert variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert variables["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    for other in (environment("cuda", loopback=True), environment("cpu", loopback=True, deterministic=True)):
        assert not other.keys() & {"CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"}


def test_torch_is_asked_for_deterministic_algorithms_and_warns_where_it_has_none() -> None:
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    try:
        determinism.enable()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("deterministic", [False, True])
def test_megatron_is_asked_for_its_deterministic_mode(deterministic: bool, tiny_qwen3: Path) -> None:
    layout: Any = SimpleNamespace(sizes=ParallelSizes(), device=torch.device("cpu"))
    config = transformer_config(
        read_shape(tiny_qwen3), layout, dtype=torch.float32, sequence_parallel=False, recompute="none", te=False,
        deterministic=deterministic,
    )  # fmt: skip
    assert config.deterministic_mode is deterministic


@pytest.mark.parametrize(("device", "said"), [("cpu", "same to the last bit"), ("cuda", "No GPU has verified this")])
def test_the_log_says_what_a_run_can_rely_on(device: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=determinism.__name__):
        determinism.announce(device)
    assert said in caplog.text
