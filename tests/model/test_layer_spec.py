"""Which layers a rank chooses, and what it says about it."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from megatron_hapo.errors import HapoError
from megatron_hapo.model.build import _use_transformer_engine

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("rank", "spec", "warns"), [(0, "auto", True), (1, "auto", False), (0, "local", False)])
def test_a_gpu_without_transformer_engine_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, spec: str, warns: bool
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with caplog.at_level(logging.WARNING):
        assert _use_transformer_engine(spec, GPU, experts=False) is False
    assert ("TRANSFORMER ENGINE IS NOT INSTALLED" in caplog.text) == warns


def test_a_cpu_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _use_transformer_engine("auto", torch.device("cpu"), experts=True) is False
    assert not caplog.records
    with pytest.raises(HapoError, match=r"model.spec: te needs a GPU"):
        _use_transformer_engine("te", torch.device("cpu"), experts=False)


def test_experts_one_after_another_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(HapoError, match=r"auto needs Transformer Engine for a model with experts.* model.spec: local"):
        _use_transformer_engine("auto", GPU, experts=True)
    assert _use_transformer_engine("local", GPU, experts=True) is False
