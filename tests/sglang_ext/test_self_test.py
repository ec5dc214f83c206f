"""The start-up proofs of cuts and experts, on answers worked out by hand; others run in every start of an engine."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest

from megatron_hapo.errors import RolloutError
from megatron_hapo.types import RouteFormat
from sglang_ext.plugin import TEMPERATURE_KEY
from sglang_ext.self_test import _Case, _check_cut, check_exact, check_routes

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


ROUTES = RouteFormat(num_layers=3, expert_layers=(0, 2), num_experts=4, top_k=2)
"""Of the layers 0 and 2; layer 1 has no experts, and SGLang leaves zeros there."""


def check(experts: np.ndarray | None) -> None:
    meta = {} if experts is None else {"routed_experts": base64.b64encode(experts.astype(np.int32).tobytes()).decode()}
    check_routes(lambda prompts, parameters, **options: [{"meta_info": meta}], ROUTES, vocab_size=100)


def experts_of(first: list[int]) -> np.ndarray:
    """Experts 1 and 3 of every position and layer with experts, but `first` at the first position and layer."""
    experts = np.zeros((6, 3, 2), dtype=int)
    experts[:, [0, 2]] = [3, 1]
    experts[0, 0] = first
    return experts


def test_different_experts_of_every_position_and_layer_are_accepted():
    check(experts_of([0, 2]))


@pytest.mark.parametrize("first", [[0, 0], [4, 1], [-1, 2]])
def test_experts_that_the_model_does_not_choose_are_refused(first: list[int]):
    with pytest.raises(RolloutError, match=r"expected 2 different ones below 4 .*rollout.replay_routes=false"):
        check(experts_of(first))


@pytest.mark.parametrize("experts", [None, experts_of([0, 2])[:5], experts_of([0, 2])[:, :2]])
def test_an_engine_that_does_not_return_experts_is_refused(experts: np.ndarray | None):
    with pytest.raises(RolloutError, match=r"6 positions, 3 layers and 2 experts .*set rollout.replay_routes=false"):
        check(experts)


@pytest.mark.parametrize(
    ("together", "prefilled", "prefill_matters", "way"),
    [
        (0.0, True, False, None),
        (1e-9, True, False, "beside others"),
        (0.0, True, True, "after a prefill of its first tokens"),
        (0.0, False, True, None),  # a GPU is not asked for that
    ],
)
def test_a_response_whose_bits_depend_on_others_or_on_a_prefill_is_refused(
    together: float, prefilled: bool, prefill_matters: bool, way: str | None
) -> None:
    def answers(prompts: list[list[int]], parameters: list[dict], **_: Any) -> list[dict]:
        replies = []
        for prompt, parameter in zip(prompts, parameters, strict=True):
            count = parameter["max_new_tokens"]
            moved = together * (len(prompts) > 1) + 1e-9 * (prefill_matters and len(prompts) == 1 and count < 8)
            ids = [(len(prompt) + token) % 5 for token in range(count)]
            top = [[(-1.0 - moved, token_id, None)] for token_id in ids]
            meta = {"output_top_logprobs": top, TEMPERATURE_KEY: [1.3] * count}
            replies.append({"output_ids": ids, "meta_info": meta})
        return replies

    if way is None:
        check_exact(answers, lambda: None, vocab_size=100, prefilled=prefilled)
        return
    with pytest.raises(RolloutError, match=f"^deterministic: true: .* {way} than alone.*; set deterministic: false$"):
        check_exact(answers, lambda: None, vocab_size=100, prefilled=prefilled)
