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
        assert _use_transformer_engine(spec, GPU) is False
    assert ("TRANSFORMER ENGINE IS NOT INSTALLED" in caplog.text) == warns


def test_a_cpu_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _use_transformer_engine("auto", torch.device("cpu")) is False
    assert not caplog.records
    with pytest.raises(HapoError, match=r"model.spec: te needs a GPU"):
        _use_transformer_engine("te", torch.device("cpu"))
