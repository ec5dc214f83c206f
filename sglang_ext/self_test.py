"""Proves at start, on the real model, that an engine's temperatures, log-probs and cuts are those of the formulas.

Requests with and without the adaptive temperature, with and without top-p and top-k, run in one batch. Their statistics
are chosen around the entropy of the model, so that h is about +0.5 and -0.5, and a hook that does nothing, or the wrong
thing, is detected.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.config.rollout_settings import MOST_KEPT
from megatron_hapo.entropy import adaptive_temperature, entropy_from_logits
from megatron_hapo.errors import RolloutError
from megatron_hapo.types import AdaptiveTemperature, EntropyStats, RouteFormat, Sign
from sglang_ext import temperature
from sglang_ext.plugin import REQUEST_KEY, TEMPERATURE_KEY
from sglang_ext.responses import routes_of

logger = logging.getLogger(__name__)

_TAU = 0.5
_BASE = 1.3  # not 1, so that a forgotten base temperature is detected
_TOKENS = 2  # one from the prefill, one from a decoding step
_TEMPERATURE_TOLERANCE = 2e-3  # relative; the reference entropy comes from log-probs rounded to float32
# Standard deviation of a logit's rounding between two batches, which may use different matrix kernels. In bfloat16 a
# logit of 16 has steps of 0.125, and the layers below round as well; single tokens may be off by several steps. With
# float8 layers, such a difference can move an activation to its neighbour in float8, by 6%.
_LOGIT_ERROR = {"float32": 5e-3, "bfloat16": 16 * 2.0**-7, "fp8": 32 * 2.0**-7}
_CUT_TOLERANCE = 1e-3
"""Of log-probs, and of the mass and log-prob at which a cut may as well fall one token further: all from one batch."""
_BESIDE, _EXACT_TOKENS, _EXACT_TOP = 20, 8, 20
"""Prompts on either side of the one whose bits are compared, its tokens, and log-probs of each."""
_NO_HOOK = (
    "SGLang did not load the plugin megatron_hapo: check that the package is installed in this environment, "
    "and that SGLANG_PLUGINS does not exclude it"
)
_OTHER_FORMULA = "Another plugin may change the logits, or this SGLang version calls its sampler differently"


class Answer(Protocol):
    """Calls the engine."""

    def __call__(self, prompts: list[list[int]], parameters: list[dict], **options: Any) -> list[dict]:
        """SGLang's answers to these prompts; `options` are lists with an entry a request."""
        ...


@dataclass(frozen=True)
class _Case:
    name: str
    adaptive: AdaptiveTemperature | None
    top_p: float = 1.0
    top_k: int | None = None
    """None: the choice is not cut."""


def run(answers: Answer, *, vocab_size: int, dtype: str) -> None:
    """Raises RolloutError at the first difference: what was expected, what was received, and the likely cause.

    Args:
        dtype: the coarsest of the engine's arithmetic: float32, bfloat16 or fp8.
    """
    start = time.perf_counter()
    prompt, plain_V = _entropic_prompt(answers, vocab_size)
    entropy = entropy_from_logits(plain_V)
    cases = _cases(float(entropy.log()))
    # All in one batch, so that a request that disturbs another is detected.
    replies = answers(
        [prompt] * len(cases),
        [_parameters(case) for case in cases],
        top_logprobs_num=[vocab_size] * len(cases),
        return_sampling_mask=[case.top_k is not None for case in cases],
    )
    for case, reply in zip(cases, replies, strict=True):
        _check_temperatures(case, reply, vocab_size)
        _check_log_probs(case, reply, plain_V, _LOGIT_ERROR[dtype])
        if case.top_k is not None:
            _check_cut(case, reply, vocab_size)
    logger.info("self-test of the sampling passed in %.1f s", time.perf_counter() - start)


def check_routes(answers: Answer, routes: RouteFormat, *, vocab_size: int) -> None:
    """Raises RolloutError if the engine does not return different experts of the model for each position and layer."""
    prompt = [997 * (1 + i) % vocab_size for i in range(5)]
    parameters = {"temperature": 0.0, "max_new_tokens": _TOKENS, "ignore_eos": True}
    [reply] = answers([prompt], [parameters], return_routed_experts=True)
    experts = np.sort(routes_of(reply["meta_info"], routes, len(prompt) + _TOKENS - 1), axis=-1)
    if (experts[..., 1:] == experts[..., :-1]).any() or experts.min() < 0 or experts.max() >= routes.num_experts:
        raise RolloutError(
            f"self-test of the experts: expected {routes.top_k} different ones below {routes.num_experts} for each "
            f"token and layer, got e.g. {experts[0, 0].tolist()}. SGLang does not record those of this model; set "
            "rollout.replay_routes=false"
        )


def check_exact(answers: Answer, flush: Callable[[], object], *, vocab_size: int, prefilled: bool) -> None:
    """Raises RolloutError if the bits of a response depend on what is generated beside it.

    Args:
        flush: empties the prefix cache.
        prefilled: also compare with a response whose first tokens are computed by a prefill, as after a restart.
    """
    prompt = [(5 + 37 * i) * 997 % vocab_size for i in range(7)]
    others = [[(3 + 29 * i + 13 * j) * 997 % vocab_size for j in range(1 + i % 8)] for i in range(_BESIDE)]
    case = _cases(0.0)[1]
    top = min(vocab_size, _EXACT_TOP)

    def answer(*beside: list[int], known: Sequence[int] = ()) -> list[tuple[Any, ...]]:
        prompts = [*beside, prompt + list(known), *beside]
        own = _parameters(case) | {"max_new_tokens": _EXACT_TOKENS - len(known)}
        reply = answers(prompts, [own] * len(prompts), top_logprobs_num=[top] * len(prompts))[len(beside)]
        meta = reply["meta_info"]
        return list(zip(reply["output_ids"], meta["output_top_logprobs"], meta[TEMPERATURE_KEY], strict=True))

    flush()
    alone = answer()
    ways = {"beside others": answer(*others)}
    flush()
    if prefilled:
        half = _EXACT_TOKENS // 2
        known = [token for token, *_ in alone[:half]]
        ways["after a prefill of its first tokens"] = alone[:half] + answer(known=known)
    for way, tokens in ways.items():
        if tokens != alone:
            first = next(index for index, (one, other) in enumerate(zip(alone, tokens, strict=True)) if one != other)
            raise RolloutError(
                f"deterministic: true: SGLang computes token {first} of a response differently {way} than alone, so "
                "this model cannot be trained bit for bit the same again on this machine; set deterministic: false"
            )


def _entropic_prompt(answers: Answer, vocab_size: int) -> tuple[list[int], Tensor]:
    """The prompt, of a few, with the highest next-token entropy, and its log-probs at the base temperature. [V]

    These requests do not use the plugin: SGLang's own log-probs at temperature 1 are the reference for everything.
    """
    prompts = [[(17 + 31 * i + 7 * j) * 997 % vocab_size for j in range(1 + 2 * i)] for i in range(4)]
    replies = answers(
        prompts,
        [{"temperature": 1.0, "max_new_tokens": 1, "ignore_eos": True}] * len(prompts),
        top_logprobs_num=[vocab_size] * len(prompts),
    )
    log_probs = [torch.log_softmax(_full_log_probs(reply, 0, vocab_size) / _BASE, -1) for reply in replies]
    entropies = [float(entropy_from_logits(lp)) for lp in log_probs]
    best = max(range(len(prompts)), key=entropies.__getitem__)
    if not entropies[best] > 1e-3:
        raise RolloutError(
            f"self-test of the sampling: the model's next-token entropies on the test prompts are {entropies} nats; at "
            "least one must be above 0.001, check that model.path holds the weights of a language model"
        )
    return prompts[best], log_probs[best]


def _cases(log_entropy: float) -> list[_Case]:
    above = EntropyStats(log_entropy - 1, log_entropy + 1, log_entropy - 3, 1.0, 1)  # h = +0.5
    below = EntropyStats(log_entropy + 1, log_entropy + 3, log_entropy - 1, 1.0, 1)  # h = -0.5, or +0.5 as `reference`
    signs: tuple[Sign, Sign] = ("signed", "reference")
    adaptive = [
        _Case(
            f"adaptive temperature, sign={sign}, entropy {side} the pivot",
            AdaptiveTemperature(stats=stats, tau=_TAU, sign=sign),
        )
        for sign in signs
        for side, stats in (("above", above), ("below", below))
    ]
    plain = _Case("base temperature", None)
    cut = [
        _Case("top-p at the adaptive temperature", adaptive[0].adaptive, top_p=0.7, top_k=MOST_KEPT),
        _Case("top-k", None, top_k=5),
    ]
    return [plain, *adaptive, *cut, plain]


def _parameters(case: _Case) -> dict[str, Any]:
    adaptive = case.adaptive
    return ({} if case.top_k is None else {"top_p": case.top_p, "top_k": case.top_k}) | {
        "temperature": _BASE,
        "max_new_tokens": _TOKENS,
        "ignore_eos": True,
        "sampling_seed": 0,
        "custom_params": {REQUEST_KEY: [] if adaptive is None else temperature.row_parameters(adaptive)},
    }


def _check_temperatures(case: _Case, reply: dict, vocab_size: int) -> None:
    """Compares the recorded temperatures with the formula, given that the log-probs are of logits / T_t.

    Otherwise the logits recovered from them would have another entropy, and the formula another T_t.
    """
    a = case.adaptive
    if a is None:
        return
    recorded = reply["meta_info"].get(TEMPERATURE_KEY)
    if recorded is None or len(recorded) != _TOKENS:
        _fail(case, f"the temperatures of {_TOKENS} tokens", recorded, _NO_HOOK)
    for step, got in enumerate(recorded):
        base_V = _full_log_probs(reply, step, vocab_size) * (got / _BASE)
        entropy_1 = entropy_from_logits(base_V)[None]
        expected = float(
            adaptive_temperature(entropy_1, _BASE, a.stats, tau=a.tau, rule=a.rule, sign=a.sign, floor=a.floor)
        )
        if not math.isclose(got, expected, rel_tol=_TEMPERATURE_TOLERANCE):
            _fail(case, f"temperature {expected:.6g} at token {step}", f"{got:.6g}", _OTHER_FORMULA)


def _check_log_probs(case: _Case, reply: dict, plain_V: Tensor, logit_error: float) -> None:
    """Compares the first token's distribution with SGLang's own at the base temperature, converted to T_t.

    By their divergence: independent errors of standard deviation e on the logits give at most KL = (e / T)^2 / 2 to
    second order, whatever the size of the vocabulary, whereas the largest error grows with it.
    """
    temperature_ratio = 1.0 if case.adaptive is None else reply["meta_info"][TEMPERATURE_KEY][0] / _BASE
    expected_V = torch.log_softmax(plain_V / temperature_ratio, -1)
    got_V = torch.log_softmax(_full_log_probs(reply, 0, len(plain_V)), -1)
    divergence = float(torch.nn.functional.kl_div(got_V, expected_V, reduction="sum", log_target=True))
    limit = (logit_error / (_BASE * temperature_ratio)) ** 2 / 2
    if not divergence <= limit:
        cause = _NO_HOOK if case.adaptive is not None else _OTHER_FORMULA
        token = int((expected_V.exp() * (got_V - expected_V).abs()).argmax())
        expected = f"log-probs within a divergence of {limit:.2g} nats, such as {float(expected_V[token]):.5g}"
        _fail(case, expected, f"{divergence:.3g} nats, and {float(got_V[token]):.5g} for token {token}", cause)


def _check_cut(case: _Case, reply: dict, vocab_size: int) -> None:
    """Compares the kept tokens, and the log-probs among them, with those that follow from the full distribution."""
    assert case.top_k is not None
    meta = reply["meta_info"]
    for step, token in enumerate(reply["output_ids"]):
        full_V = _full_log_probs(reply, step, vocab_size)
        kept = torch.tensor(meta["output_token_sampling_mask"][step])
        sorted_V = full_V.sort(descending=True).values
        mass_before_V = sorted_V.exp().cumsum(0) - sorted_V.exp()
        expected = int(((mass_before_V <= case.top_p) & (torch.arange(vocab_size) < case.top_k)).sum())
        # Where the cut falls within rounding, a token more or less may be kept; of equally likely ones either.
        least, most = (
            int((mass_before_V <= case.top_p + margin).sum()) for margin in (-_CUT_TOLERANCE, _CUT_TOLERANCE)
        )
        right = min(least, case.top_k) <= len(kept) <= min(most, case.top_k)
        likely_V = full_V[kept].sort(descending=True).values
        if not right or bool((likely_V - sorted_V[: len(kept)]).abs().max() > _CUT_TOLERANCE):
            _fail(
                case,
                f"the {expected} most likely tokens to be kept at token {step}",
                f"{len(kept)} {'others' if right else 'tokens'}",
                "SGLang cuts differently than its version 0.5.23",
            )
        among = float(full_V[token] - full_V[kept].logsumexp(0))
        got = meta["output_token_sampling_logprobs"][step]
        if not math.isclose(got, among, abs_tol=_CUT_TOLERANCE):
            cause = "SGLang's sampling_logprobs are not those among the kept tokens"
            _fail(case, f"log-prob {among:.5g} of token {token} among the kept ones", f"{got:.5g}", cause)


def _full_log_probs(reply: dict, step: int, vocab_size: int) -> Tensor:
    """[V] float64, log-probs at output token `step`."""
    values, token_ids, _ = zip(*reply["meta_info"]["output_top_logprobs"][step], strict=True)
    log_probs_V = torch.full((vocab_size,), -math.inf, dtype=torch.float64)
    log_probs_V[torch.tensor(token_ids)] = torch.tensor(values, dtype=torch.float64)
    return log_probs_V


def _fail(case: _Case, expected: str, got: Any, cause: str) -> NoReturn:
    raise RolloutError(f"self-test of the sampling, {case.name}: expected {expected}, got {got}. {cause}")
