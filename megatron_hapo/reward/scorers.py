"""How right one response is, from its text. Pure, and free of torch: it runs in reward workers."""

from __future__ import annotations

import functools
import importlib
import json
import re
from typing import Any, Literal

from megatron_hapo.data.reasoning_tasks import REASONING_GYM_PREFIX, import_reasoning_gym

Scorer = Literal["auto", "math", "exact", "reasoning_gym"]

TAIL_CHARACTERS = 300
"""Only this much of the end of a response is searched for a mathematical answer, as in DAPO: an answer is a
conclusion, and a response that tries many answers on its way gains nothing."""

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def score(response: str, ground_truth: str, data_source: str, *, scorer: Scorer = "auto") -> float:
    """Correctness in [0, 1]: 0 or 1, except for tasks of reasoning-gym that give part of the credit.

    Args:
        response: text without special tokens.
        ground_truth: the answer; for reasoning-gym's tasks what `encode_task` wrote.
    """
    chosen = resolve_scorer(scorer, data_source)
    if chosen == "reasoning_gym":
        return score_task(response, ground_truth, data_source)
    if data_source.startswith(REASONING_GYM_PREFIX):
        ground_truth = json.loads(ground_truth)["answer"]
    return float((is_right_math if chosen == "math" else is_right_exact)(response, ground_truth))


def resolve_scorer(scorer: Scorer, data_source: str) -> Scorer:
    """The scorer that `auto` stands for with this data source; any other scorer as it is."""
    if scorer != "auto":
        return scorer
    if data_source == "arithmetic":
        return "exact"
    return "reasoning_gym" if data_source.startswith(REASONING_GYM_PREFIX) else "math"


def preload(scorer: Scorer) -> None:
    """Import what a scorer needs, so that its first response is not charged for it."""
    if scorer == "math":
        importlib.import_module("math_verify")
    elif scorer == "reasoning_gym":
        import_reasoning_gym()


def overlong_penalty(num_tokens: int, *, max_response_tokens: int, buffer_tokens: int, factor: float = 1.0) -> float:
    """What DAPO adds to the reward of a long response: 0 up to the buffer, then linearly down to -factor.

    Args:
        num_tokens: length of the response.
        max_response_tokens: the longest response, buffer included.
        buffer_tokens: length of the zone before it in which the penalty grows; 0 is no penalty at all.
    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if buffer_tokens == 0:
        return 0.0
    excess = num_tokens - (max_response_tokens - buffer_tokens)
    return min(-excess / buffer_tokens * factor, 0.0)


def is_right_exact(response: str, ground_truth: str) -> bool:
    """Whether the stated answer is the ground truth, letter by letter."""
    return stated_answer(response) == _collapse(ground_truth)


def stated_answer(response: str) -> str:
    """What a response says its answer is: the rest of the line after its last `Answer:`, else its last line, of
    which only what follows the last `=` counts. Blanks and a closing full stop do not belong to it."""
    marked = _ANSWER_LINE.findall(response)
    if marked:
        answer = marked[-1]
    else:
        lines = response.strip().splitlines() or [""]
        answer = lines[-1].rpartition("=")[2]
    return _collapse(answer).removesuffix(".")


def is_right_math(response: str, ground_truth: str) -> bool:
    r"""Whether the response concludes with the ground truth, as text or as mathematics.

    The conclusion is the last `Answer:` line, else the last \boxed{}, within the last TAIL_CHARACTERS. Equal text
    is enough; otherwise math-verify decides. A response without a conclusion is wrong.
    """
    prediction = _math_conclusion(response[-TAIL_CHARACTERS:])
    if prediction is None:
        return False
    if _plain(prediction) == _plain(ground_truth):
        return True
    return _math_equal(_unwrap(prediction), _unwrap(ground_truth))


def score_task(response: str, ground_truth: str, data_source: str) -> float:
    """What the task's own scorer gives the answer: in <answer> tags, reasoning-gym's convention, else as stated."""
    task = json.loads(ground_truth)
    name = data_source.removeprefix(REASONING_GYM_PREFIX)
    dataset = _task_dataset(name, task["size"], task["seed"], json.dumps(task["options"]))
    answer = import_reasoning_gym().utils.extract_answer(response)
    if answer is None:
        answer = stated_answer(response)
    return float(dataset.score_answer(answer, dataset[task["index"]]))


@functools.lru_cache(maxsize=8)
def _task_dataset(name: str, size: int, seed: int, options: str) -> Any:
    return import_reasoning_gym().create_dataset(name, size=size, seed=seed, **json.loads(options))


def _math_conclusion(text: str) -> str | None:
    marked = _ANSWER_LINE.findall(text)
    if marked:
        return marked[-1]
    start = text.rfind("\\boxed{")
    return None if start < 0 else _until_closing_brace(text[start + len("\\boxed{") :])


def _until_closing_brace(text: str) -> str | None:
    depth = 1
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:position]
    return None


def _unwrap(answer: str) -> str:
    """Without what surrounds an answer in running text: emphasis, dollars, a full stop, thousands separators."""
    return _THOUSANDS.sub("", answer.strip().strip("*").strip().removesuffix(".").replace("\\!", "").strip("$ "))


def _plain(answer: str) -> str:
    """For comparison as text: also without LaTeX's wrappers, degrees, percent, blanks and capitals."""
    answer = _WRAPPED.sub(r"\1", _unwrap(answer))
    for noise in ("$", "\\left", "\\right", "^\\circ", "^{\\circ}", "\\%", "%", "\\,", "\\ ", "\\;"):
        answer = answer.replace(noise, "")
    return "".join(answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").split()).casefold()


def _math_equal(prediction: str, ground_truth: str) -> bool:
    from math_verify import parse, verify

    # Their timeouts use SIGALRM, which the worker needs for itself and which is no limit for code in C.
    gold = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    guess = parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(verify(gold, guess, timeout_seconds=None))


def _collapse(text: str) -> str:
    return " ".join(text.split())
