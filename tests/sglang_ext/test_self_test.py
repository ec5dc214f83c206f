"""The start-up proof of the cut, on answers worked out by hand; the other proofs run in every start of an engine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_hapo.errors import RolloutError
from sglang_ext.self_test import _Case, _check_cut

PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]


def reply(mask: list[int], *, token: int, log_prob: float) -> dict[str, Any]:
    """SGLang's answer of one token."""
    top = [(math.log(p), token_id, None) for token_id, p in enumerate(PROBABILITIES)]
    meta = {
        "output_top_logprobs": [top],
        "output_token_sampling_mask": [mask],
        "output_token_sampling_logprobs": [log_prob],
    }
    return {"output_ids": [token], "meta_info": meta}


def test_the_kept_tokens_and_the_log_prob_among_them_are_accepted():
    """Of 0.4, 0.3, 0.15, 0.1 and 0.05 top-p 0.75 keeps the first three, and top-k 2 the first two."""
    _check_cut(_Case("p", None, 0.75, 100), reply([4, 1, 3], token=3, log_prob=math.log(0.3 / 0.85)), 5)
    _check_cut(_Case("k", None, 1.0, 2), reply([1, 3], token=1, log_prob=math.log(0.4 / 0.7)), 5)
    # A cut within rounding of 0.7 may keep the third token or not.
    _check_cut(_Case("p", None, 0.7, 100), reply([1, 3], token=1, log_prob=math.log(0.4 / 0.7)), 5)
    _check_cut(_Case("p", None, 0.7, 100), reply([1, 3, 4], token=1, log_prob=math.log(0.4 / 0.85)), 5)


def test_of_tokens_of_one_probability_either_may_be_kept(monkeypatch: pytest.MonkeyPatch):
    """Of 0.4, 0.2, 0.2, 0.1 and 0.1 top-p 0.5 keeps the first and one of the second."""
    monkeypatch.setitem(globals(), "PROBABILITIES", [0.2, 0.4, 0.1, 0.2, 0.1])
    for second in (0, 3):
        _check_cut(_Case("p", None, 0.5, 100), reply([1, second], token=1, log_prob=math.log(0.4 / 0.6)), 5)


@pytest.mark.parametrize("mask", [[1, 3], [1, 3, 0], [1, 3, 4, 0], [1, 3, 4, 2]])
def test_other_kept_tokens_are_refused(mask: list[int]):
    with pytest.raises(
        RolloutError, match=r"top-p: expected the 3 most likely tokens to be kept at token 0, got \d (others|tokens)"
    ):
        _check_cut(_Case("top-p", None, 0.75, 100), reply(mask, token=3, log_prob=math.log(0.3 / 0.85)), 5)


def test_a_log_prob_over_the_whole_vocabulary_is_refused():
    with pytest.raises(RolloutError, match=r"expected log-prob -1\.0415 of token 3 among the kept ones, got -1\.204"):
        _check_cut(_Case("top-p", None, 0.75, 100), reply([4, 1, 3], token=3, log_prob=math.log(0.3)), 5)
