"""The hook's arithmetic against `megatron_hapo.entropy`, and its rows as batches change; without SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_hapo.entropy import EntropyStats, adaptive_temperature, entropy_from_logits
from megatron_hapo.types import AdaptiveTemperature
from sglang_ext import plugin, temperature
from sglang_ext.engine import sample_seed

STATS = [
    EntropyStats(-0.5, 1.5, -6.0, 1.0, 10),
    EntropyStats(1.0, 1.0, 1.0, 0.0, 1),
    EntropyStats(0.3, 9.0, -0.2, 1, 9),
]


@pytest.mark.parametrize("rule", ["scaled", "z_score"])
@pytest.mark.parametrize("sign", ["signed", "reference"])
def test_factors_equal_the_reference_bit_by_bit_with_statistics_of_each_row(sign, rule):
    entropy_R = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 8
    entropy_R[:4] = torch.tensor([0.0, 1e-9, 1e-6, 20.0])
    rows = [AdaptiveTemperature(stats=STATS[i % 3], tau=0.05 + 0.1 * (i % 5), rule=rule, sign=sign) for i in range(300)]
    factor_R = temperature.temperature_factor(entropy_R, torch.tensor([temperature.row_parameters(r) for r in rows]))
    for i, row in enumerate(rows):
        expected = adaptive_temperature(
            entropy_R[i : i + 1], 1.0, row.stats, tau=row.tau, rule=rule, sign=sign, floor=row.floor
        )
        torch.testing.assert_close(factor_R[i : i + 1], expected, rtol=1e-7, atol=0)


def test_neutral_rows_get_exactly_one():
    parameters_R6 = torch.tensor([temperature.NEUTRAL] * 4)
    assert (temperature.temperature_factor(torch.tensor([0.0, 1e-8, 1.0, 30.0]), parameters_R6) == 1).all()


def test_entropy_equals_the_reference_also_with_forbidden_tokens(monkeypatch):
    logits_RV = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)) * 6
    logits_RV[2, 5:] = -torch.inf
    logits_RV[3, 1:] = -torch.inf
    base_R = torch.linspace(0.5, 2, 7)
    expected_R = entropy_from_logits(logits_RV / base_R[:, None])
    for chunk in (1 << 24, 2500, 1):
        monkeypatch.setattr(temperature, "_CHUNK_ELEMENTS", chunk)
        got_R = temperature.entropy_at_temperature(logits_RV, base_R)
        torch.testing.assert_close(got_R, expected_R, atol=2e-6, rtol=2e-6)
    assert got_R[3] == 0


def test_sample_seeds_are_stable_and_distinct():
    assert sample_seed(1, "a", 0) == 7070643233116610031
    assert len({sample_seed(s, u, i) for s in range(3) for u in ("", "a", "1a") for i in range(9)}) == 81


class Info(SimpleNamespace):
    """A SamplingBatchInfo as the hooks see it."""

    def __len__(self) -> int:
        return self.rows


def make_info(first: int, last: int, kind: str) -> Info:
    """Requests [first, last): `adaptive` rows carry their number as pivot, in their seed too."""
    info = Info(rows=last - first, sampling_seed=None, hapo=None)
    if kind != "foreign":
        info.sampling_seed = torch.arange(first, last)
        parameters = [[0.1, 0.0, 1e-6, float(i), 1.0, 1.0] for i in range(first, last)]
        info.hapo = plugin._Rows(torch.tensor(parameters) if kind == "adaptive" else None)
    return info


@pytest.mark.parametrize("left", ["foreign", "base", "adaptive"])
@pytest.mark.parametrize("right", ["foreign", "base", "adaptive"])
def test_rows_stay_aligned_when_batches_merge_and_shrink(left, right):
    mine, other = make_info(0, 3, left), make_info(3, 5, right)
    if mine.sampling_seed is not None and other.sampling_seed is not None:  # as SGLang's merge_batch does before us
        mine.sampling_seed = torch.cat([mine.sampling_seed, other.sampling_seed])
    mine.rows = 5
    plugin._after_merge(None, mine, other)
    keep = torch.tensor([1, 2, 4])
    if mine.sampling_seed is not None:
        mine.sampling_seed = mine.sampling_seed[keep]
    plugin._after_filter(None, mine, [1, 2, 4], keep)

    kinds = [left, left, right]
    if set(kinds) == {"foreign"}:
        assert mine.hapo is None
        assert mine.sampling_seed is None
        return
    assert mine.sampling_seed is not None
    assert mine.sampling_seed.tolist() == [42 if k == "foreign" else i for k, i in zip(kinds, (1, 2, 4), strict=True)]
    if "adaptive" not in kinds:
        assert mine.hapo.adaptive is None
        return
    for row, kind, i in zip(mine.hapo.adaptive.tolist(), kinds, (1, 2, 4), strict=True):
        assert row[3] == i if kind == "adaptive" else tuple(row) == temperature.NEUTRAL
