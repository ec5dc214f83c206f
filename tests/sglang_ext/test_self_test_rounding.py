"""Which differences between two distributions the self-test accepts: rounding of the dtype, and nothing more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hapo.errors import RolloutError
from megatron_hapo.types import AdaptiveTemperature, EntropyStats
from sglang_ext import self_test
from sglang_ext.plugin import TEMPERATURE_KEY

V = 32_768
PLAIN = self_test._Case("base temperature", None)


def logits(spread: float = 2.0) -> Tensor:
    """Of a model with a large vocabulary, most of whose tokens are improbable."""
    return 20 + spread * torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reply_with(log_probs_V: Tensor, temperature: float = self_test._BASE) -> dict:
    values = [(value, token, None) for token, value in enumerate(log_probs_V.tolist())]
    return {"meta_info": {"output_top_logprobs": [values], TEMPERATURE_KEY: [temperature]}}


def at(logits_V: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits_V / temperature, -1)


def test_rounding_of_the_logits_to_bfloat16_passes_and_a_maximum_would_not() -> None:
    """Logits around 20 have steps of 0.125; of 150,000 tokens some differ by more than any fixed bound."""
    generator = torch.Generator().manual_seed(1)
    noisy = (logits() + 0.06 * torch.randn(V, generator=generator, dtype=torch.float64)).bfloat16().double()
    expected, got = at(logits(), self_test._BASE), at(noisy, self_test._BASE)
    assert float((got - expected).abs().max()) > 0.15
    share = float(((got - expected).abs() > 0.1).double().mean())
    assert 0.06 < share < 0.5  # as in verl's issue 6280, where 6 to 14 % of the tokens differ by more than 0.1 nats
    self_test._check_log_probs(PLAIN, reply_with(got), expected, self_test._LOGIT_ERROR["bfloat16"])
    with pytest.raises(RolloutError, match=r"base temperature: expected log-probs within a divergence of .* for token"):
        self_test._check_log_probs(PLAIN, reply_with(got), expected, self_test._LOGIT_ERROR["float32"])


def test_errors_of_the_assumed_size_give_the_divergence_of_the_limit() -> None:
    """KL = (e / T)^2 / 2 for independent errors e, here on many tokens of similar probability."""
    error = self_test._LOGIT_ERROR["bfloat16"]
    for factor, passes in ((0.9, True), (1.1, False)):
        noise = torch.randn(V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * error * factor
        expected, got = at(logits(0.1), self_test._BASE), at(logits(0.1) + noise, self_test._BASE)
        check = lambda e=expected, g=got: self_test._check_log_probs(PLAIN, reply_with(g), e, error)  # noqa: E731
        if passes:
            check()
        else:
            with pytest.raises(RolloutError):
                check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_temperature_that_is_recorded_but_not_applied_is_found(dtype: str) -> None:
    stats = EntropyStats(pivot=0.0, log_max=1.0, log_min=-1.0, rms=1.0, num_tokens=1)
    case = self_test._Case("adaptive", AdaptiveTemperature(stats=stats, tau=0.5))
    plain = at(logits(), self_test._BASE)
    recorded = self_test._BASE * 1.25
    self_test._check_log_probs(case, reply_with(at(logits(), recorded), recorded), plain, self_test._LOGIT_ERROR[dtype])
    with pytest.raises(RolloutError, match="adaptive: expected"):
        self_test._check_log_probs(case, reply_with(plain, recorded), plain, self_test._LOGIT_ERROR[dtype])
