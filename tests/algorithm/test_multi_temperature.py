"""Two temperatures through the hook of the adaptive one, in the trainer's formula and in the sampler's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hapo.algorithm.step_statistics import steering
from megatron_hapo.config import load_config
from megatron_hapo.entropy import adaptive_temperature, entropy_stats
from megatron_hapo.errors import ConfigError
from sglang_ext.temperature import row_parameters, temperature_factor
from tests.algorithm.test_methods import CONFIGS, algorithm


def test_tokens_above_the_quantile_are_sampled_hotter_by_a_step():
    entropies = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 2.0, 0.85])
    stats = entropy_stats(entropies, pivot=0.8)
    wish = steering(algorithm(multi_temperature={"enabled": True, "tau": 0.2}), stats)
    assert wish is not None
    hot = entropies > 0.8
    temperatures = adaptive_temperature(entropies, 1.5, wish.stats, tau=wish.tau, sign=wish.sign, floor=wish.floor)
    pivot = entropies == 0.8
    torch.testing.assert_close(temperatures[hot], torch.full((2,), 1.8))
    torch.testing.assert_close(temperatures[~hot & ~pivot], torch.full((8,), 1.2))
    assert temperatures[pivot].tolist() == [1.5]
    factors = temperature_factor(entropies, torch.tensor([row_parameters(wish)] * len(entropies)))
    torch.testing.assert_close(1.5 * factors, temperatures)
    assert steering(algorithm(), stats) is None


def test_it_excludes_the_adaptive_temperature(tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(f"base: {CONFIGS / 'demo_cpu.yaml'}\nalgorithm: {{multi_temperature: {{enabled: true}}}}\n")
    with pytest.raises(
        ConfigError, match=r"multi_temperature.enabled: must be false with .*adaptive_temperature.enabled"
    ):
        load_config(job)
