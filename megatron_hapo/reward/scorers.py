"""Scores one response by its text. Pure, and without torch, because it runs in reward workers."""

from __future__ import annotations

import functools
import json
import re
from itertools import pairwise
from typing import Any, Literal, assert_never

from megatron_hapo.data.reasoning_tasks import REASONING_GYM_PREFIX, import_reasoning_gym
from megatron_hapo.reward.answer_grammar import EVALUATED_TASKS, unparsable_score

NamedScorer = Literal["math", "exact", "reasoning_gym"]
Scorer = Literal["auto", NamedScorer]
"""The values of `reward.scorer` in `config/data_settings.py`."""

TAIL_CHARACTERS = 300
"""Length of the end of a response that is searched for a mathematical answer, as in DAPO. A response gains nothing by
trying many answers on the way."""

_WARM_UP = (
    *(
        "0.5",
        "1/2",
        "12",
        r"\frac{1}{2}",
        r"-\frac{3}{4}",
        r"2\sqrt{3}",
        r"\frac{1+2\sqrt{5}}{3}",
        r"\sqrt[3]{2}",
        "x = 5",
    ),
    *(
        "x^{2}+3x-1",
        "(x+1)(x-2)",
        r"\pi",
        r"\frac{3\pi}{4}",
        r"12\pi",
        "e^{x}",
        r"\sin x",
        r"\log_2 8",
        r"\ln 2",
        "2^{10}",
    ),
    *("(1, 2)", "(1, 2]", r"[0, \infty)", r"(-\infty, 1) \cup (2, 3)", r"\{1, 2\}", "1, 2", r"x \le 3", "y=2x+1"),
    *(r"3 \cdot 5", r"3 \times 10^{4}", r"\binom{5}{2}", "5!", "|x|", "2+3i", r"50\%", r"90^\circ", r"\text{even}"),
    *(
        r"-\frac{7\sqrt{2}}{4}",
        r"\frac{3}{\sqrt{7}}",
        r"\frac{\sqrt{5}}{3}",
        r"4\sqrt{5}-3",
        r"\sqrt{5}-\sqrt{2}",
        "-1.25",
    ),
    *(
        "x^{3}-5x+6",
        r"\frac{2x-1}{x+3}",
        r"\frac{k(k-1)}{6}",
        "3^{m}+2",
        "3(a-2)",
        "2ab-c",
        "a^2 + b^2",
        r"\sqrt{y^2-4}",
    ),
    *(r"\arcsin(1)", r"\cos^{-1}(0.5)", r"\cos 60^\circ", r"\ln(3)-2", r"\log_{5}(7)", "e^{3}+1", r"\frac{5\pi}{6}"),
    *(r"3\pi r^2", r"4\frac{2}{3}", r"(2, -3, \frac{1}{3})", r"\{2, 4, x\}", r"(-\infty, -1) \cup [2, 5)"),
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
)
"""Typical answers, neighbours of which differ. Parsing takes twice as long for the first answer of a kind."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def score(response: str, ground_truth: str, data_source: str, *, scorer: Scorer = "auto") -> float:
    """Correctness in [0, 1]: 0 or 1, except for reasoning-gym tasks that give partial credit.

    Call it on a model's response only in a sandbox: it may evaluate the answer.

    Args:
        response: text without special tokens.
        ground_truth: the answer; for reasoning-gym tasks what `encode_task` wrote.
    """
    settled = settle(response, ground_truth, data_source, scorer=scorer)
    if settled is not None:
        return settled
    answer = answer_of(response, data_source, scorer=scorer)
    if resolve_scorer(scorer, data_source) == "reasoning_gym":
        dataset, entry = _task(data_source, ground_truth)
        return float(dataset.score_answer(answer, entry))
    return float(_math_equal(answer, _unwrap(_plain_truth(ground_truth, data_source))))


def answer_of(response: str, data_source: str, *, scorer: Scorer = "auto") -> str:
    """The answer in the response, on which alone its score depends. Safe without a sandbox, as `settle` is."""
    match resolve_scorer(scorer, data_source):
        case "reasoning_gym":
            return _task_answer(response)
        case "math":
            return _unwrap(_math_conclusion(response[-TAIL_CHARACTERS:]) or "")
        case "exact":
            return stated_answer(response)
        case unknown:
            assert_never(unknown)


def settle(response: str, ground_truth: str, data_source: str, *, scorer: Scorer = "auto") -> float | None:
    """The score if a comparison of text decides it; None if the answer has to be parsed, as `score` does.

    Safe without a sandbox: the response is only searched with linear regular expressions, sliced and compared, never
    interpreted as code or mathematics. The scorer `exact` needs no more than this.
    """
    match resolve_scorer(scorer, data_source):
        case "reasoning_gym":
            return _settle_task(response, ground_truth, data_source)
        case "math":
            return _settle_math(response, _plain_truth(ground_truth, data_source))
        case "exact":
            return float(is_right_exact(response, _plain_truth(ground_truth, data_source)))
        case unknown:
            assert_never(unknown)


def evaluates(scorer: Scorer, data_source: str) -> bool:
    """Whether the scorer passes answers to a parser that may run them as code, and therefore requires isolation."""
    match resolve_scorer(scorer, data_source):
        case "reasoning_gym":
            return data_source.removeprefix(REASONING_GYM_PREFIX) in {*EVALUATED_TASKS, "composite"}
        case "math":
            return True  # math-verify calls sympy's parse_expr, if only on digits and operators (0.9)
        case "exact":
            return False
        case unknown:
            assert_never(unknown)


def resolve_scorer(scorer: Scorer, data_source: str) -> NamedScorer:
    """The scorer to use: `auto` is resolved by the data source, any other scorer is returned unchanged."""
    if scorer != "auto":
        return scorer
    if data_source in ("arithmetic", "checked_sums"):
        return "exact"
    return "reasoning_gym" if data_source.startswith(REASONING_GYM_PREFIX) else "math"


def preload(scorer: Scorer) -> None:
    """Import what a scorer needs, so that this does not count towards the time limit of its first response."""
    if scorer == "math":
        # The first parses fill caches (the LaTeX grammar's, sympy's) that forked processes then share; answers that
        # differ load the modules with which sympy simplifies.
        for answer, other in pairwise(_WARM_UP):
            _math_equal(answer, answer)
            _math_equal(answer, other)
    elif scorer == "reasoning_gym":
        import_reasoning_gym()


def overlong_penalty(num_tokens: int, *, max_response_tokens: int, buffer_tokens: int, factor: float = 1.0) -> float:
    """DAPO's penalty, added to the reward of a long response: 0 up to the buffer, then linearly down to -factor.

    Args:
        num_tokens: length of the response.
        max_response_tokens: the longest response, buffer included.
        buffer_tokens: length of the zone before that limit in which the penalty grows; 0 disables the penalty.
    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if buffer_tokens == 0:
        return 0.0
    excess = num_tokens - (max_response_tokens - buffer_tokens)
    return min(-excess / buffer_tokens * factor, 0.0)


def is_right_exact(response: str, ground_truth: str) -> bool:
    """Whether the stated answer equals the ground truth, apart from white space."""
    return stated_answer(response) == _collapse(ground_truth)


def stated_answer(response: str) -> str:
    """The answer that a response states: the rest of the line after its last `Answer:`, else what follows the last `=`
    of its last line. White space is collapsed, and a final full stop is removed."""
    marked = _ANSWER_LINE.findall(response)
    if marked:
        answer = marked[-1]
    else:
        lines = response.strip().splitlines() or [""]
        answer = lines[-1].rpartition("=")[2]
    return _collapse(answer).removesuffix(".")


def voted_answer(response: str) -> str | None:
    r"""The answer with which the response votes: in <answer> tags, else the last `Answer:` line, else the last
    \boxed{}, without emphasis, LaTeX wrappers, white space and case; None if it states none.

    Safe without a sandbox, as `settle` is. Answers that differ only in notation (0.5, 1/2) are different votes.
    """
    tail = response[-TAIL_CHARACTERS:]
    before, _, _ = tail.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    conclusion = tagged if opened else _math_conclusion(tail)
    return (_plain(conclusion) or None) if conclusion is not None else None


def _settle_math(response: str, ground_truth: str) -> float | None:
    r"""Whether the response concludes with the ground truth, where comparing text decides it; else None.

    The conclusion is the last `Answer:` line, else the last \boxed{}, within the last TAIL_CHARACTERS. A response
    without a conclusion is wrong.
    """
    prediction = _math_conclusion(response[-TAIL_CHARACTERS:])
    if prediction is None:
        return 0.0
    if _plain(prediction) == _plain(ground_truth):
        return 1.0
    sides = (_unwrap(prediction), _unwrap(ground_truth))
    if all(map(_INTEGER.fullmatch, sides)):  # most answers; math-verify would say the same, 20 ms later
        return float(int(sides[0]) == int(sides[1]))
    return None


def _plain_truth(ground_truth: str, data_source: str) -> str:
    return json.loads(ground_truth)["answer"] if data_source.startswith(REASONING_GYM_PREFIX) else ground_truth


def _settle_task(response: str, ground_truth: str, data_source: str) -> float | None:
    """The score of an answer that must not reach the task's scorer; else None."""
    _, entry = _task(data_source, ground_truth)
    name = data_source.removeprefix(REASONING_GYM_PREFIX)
    return unparsable_score(_task_answer(response), dataset=name, entry=entry)


def _task_answer(response: str) -> str:
    """The answer in <answer> tags, reasoning-gym's convention, else as stated."""
    end = response.rfind("</answer>") + len("</answer>")  # its regular expression is quadratic on unclosed tags
    answer = import_reasoning_gym().utils.extract_answer(response[:end])
    return stated_answer(response) if answer is None else answer


@functools.lru_cache(maxsize=512)
def _task(data_source: str, ground_truth: str) -> tuple[Any, dict[str, Any]]:
    """The task's dataset and its entry, rebuilt from our ground truth; cached for the prompt's other samples."""
    task = json.loads(ground_truth)
    name = data_source.removeprefix(REASONING_GYM_PREFIX)
    dataset = _task_dataset(name, task["size"], task["seed"], json.dumps(task["options"]))
    entry = dataset[task["index"]]
    if str(entry["answer"]) != task["answer"]:
        # A few datasets (polynomial_multiplication, ransom_note) iterate over sets of strings, so they build different
        # tasks in each process unless PYTHONHASHSEED is fixed (reasoning-gym 0.1.25). Use the answer to our prompt.
        entry = entry | {"answer": task["answer"]}
    return dataset, entry


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
    """The answer without emphasis, dollar signs, a final full stop and thousands separators."""
    return _THOUSANDS.sub("", answer.strip().strip("*").strip().removesuffix(".").replace("\\!", "").strip("$ "))


def _plain(answer: str) -> str:
    """The answer for comparison as text: also without LaTeX wrappers, degree and percent signs, spaces and case."""
    answer = _WRAPPED.sub(r"\1", _unwrap(answer))
    for noise in ("$", "\\left", "\\right", "^\\circ", "^{\\circ}", "\\%", "%", "\\,", "\\ ", "\\;"):
        answer = answer.replace(noise, "")
    return "".join(answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").split()).casefold()


def _math_equal(prediction: str, ground_truth: str) -> bool:
    from math_verify import parse, verify

    # Their timeouts use SIGALRM, which does not interrupt code in C; the sandbox enforces the time limit.
    gold = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    guess = parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(verify(gold, guess, timeout_seconds=None))


def _collapse(text: str) -> str:
    return " ".join(text.split())
