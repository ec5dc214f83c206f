"""Which answers reasoning-gym's scorers may see, where they pass answers to `eval` or to sympy's `parse_expr`.

Both run any Python that an answer contains (reasoning-gym 0.1.25, sympy 1.14). Only a literal (numbers, short strings,
brackets) or an arithmetic expression passes; neither has attributes, strings that are parsed again, or names of objects
that do more than mathematics. The scorer still decides what the answer is worth, so honest answers keep their scores.
The sandbox, not this grammar, is what confines an answer that gets through all the same or takes for ever.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import keyword
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, assert_never

MAX_LITERAL_CHARACTERS = 20_000
MAX_EXPRESSION_CHARACTERS = 5_000
MAX_NESTING = 40
MAX_EXPONENT = 999
MAX_FACTORIAL_DIGITS = 2


class EvaluatedTask(NamedTuple):
    """How a dataset's scorer reads answers."""

    grammar: Literal["literal", "expression"]
    unparsable: float
    """What the scorer gives an answer that it cannot parse."""


EVALUATED_TASKS = {
    "binary_matrix": EvaluatedTask("literal", 0.0),
    "countdown": EvaluatedTask("expression", 0.01),
    "intermediate_integration": EvaluatedTask("expression", 0.0),
    "n_queens": EvaluatedTask("literal", 0.0),
    "polynomial_multiplication": EvaluatedTask("expression", 0.0),
    "puzzle24": EvaluatedTask("expression", 0.01),
    "simple_integration": EvaluatedTask("expression", 0.0),
    "spiral_matrix": EvaluatedTask("literal", 0.0),
    "string_insertion": EvaluatedTask("literal", 0.0),
}
"""Datasets whose scorers evaluate answers. A test compares this with what all of the package's scorers compile."""

_LITERAL_TOKEN = re.compile(
    r"""\s*+(?:[-+]?(?:\d{1,40}+(?:\.\d{0,40}+)?|\.\d{1,40}+)(?![\w.'"])"""
    r"""|'[^'\\\n\x00]{0,100}+'|"[^"\\\n\x00]{0,100}+"|(?:True|False|None)(?!\w)|[\[\](),])"""
)
_EXPRESSION_TOKEN = re.compile(
    r"\s*+(?:(?P<number>(?:\d{1,40}+(?:\.\d{0,40}+)?|\.\d{1,40}+)(?:[eE][-+]?\d{1,2})?)(?![\w.])"
    r"|(?P<name>[A-Za-z][A-Za-z0-9_]{0,30}+)|(?P<sign>\*\*|//|[-+*/^%(),!]))",
    re.ASCII,
)
# fmt: off
_FUNCTIONS = frozenset({
    "sqrt", "cbrt", "root", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan",
    "acot", "asec", "acsc", "atan2", "sinh", "cosh", "tanh", "coth", "asinh", "acosh", "atanh", "Abs", "abs", "sign",
    "pi", "oo", "Rational", "erf", "erfc", "erfi", "Si", "Ci", "Ei", "li", "gamma",
})
# fmt: on
"""Names of sympy that stand for mathematics of numbers and symbols."""


def unparsable_score(answer: str, *, dataset: str, entry: dict[str, Any]) -> float | None:
    """What an answer earns that its scorer must not see; None for an answer that is safe to hand on.

    Args:
        entry: the task, as reasoning-gym built it.
    """
    metadata = entry["metadata"]
    if dataset == "composite":
        dataset = metadata["source_dataset"]
    task = EVALUATED_TASKS.get(dataset)
    if task is None:
        return None
    match task.grammar:
        case "literal":
            # These scorers compare before they evaluate.
            expected = {text.strip() for text in (entry["answer"], *metadata.get("valid_answers", ()))}
            safe = answer.strip() in expected or is_literal(answer)
        case "expression":
            safe = is_expression(_unquoted(answer), variables=metadata.get("variables", ()))
        case _ as never:
            assert_never(never)
    return None if safe else task.unparsable


def is_literal(text: str) -> bool:
    """Whether Python reads the text as numbers, short strings, True, False and None in lists and tuples, if at all."""
    tokens = _tokens(_LITERAL_TOKEN, text, MAX_LITERAL_CHARACTERS)
    return tokens is not None and _nesting([token.group().strip() for token in tokens]) <= MAX_NESTING


def is_expression(text: str, *, variables: Collection[str] = ()) -> bool:
    """Whether the text is made of numbers, variables, known functions, + - * / // % ^ **, factorials and parentheses.

    Exponents and factorials of plain numbers are bounded. A variable is one of `variables`, a single letter, or any
    name that means nothing to sympy.
    """
    tokens = _tokens(_EXPRESSION_TOKEN, text, MAX_EXPRESSION_CHARACTERS)
    if tokens is None:
        return False
    words = [token.group().strip() for token in tokens]
    names = {word for word, token in zip(words, tokens, strict=True) if token.lastgroup == "name"}
    if _nesting(words) > MAX_NESTING or not all(name in variables or _is_harmless(name) for name in names):
        return False
    return all(
        _is_bounded_exponent(words, position + 1) if word == "**" else _is_bounded_factorial(words, position)
        for position, word in enumerate(words)
        if word in ("**", "!")
    )


def _unquoted(text: str) -> str:
    """Without quotation marks around all of it: sympy reads a string as the expression in it."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _tokens(pattern: re.Pattern[str], text: str, max_characters: int) -> list[re.Match[str]] | None:
    """The text as tokens; None if something else stands between them, or if it is too long."""
    text = text.strip()
    if len(text) > max_characters:
        return None
    tokens, position = [], 0
    while position < len(text):
        token = pattern.match(text, position)
        if token is None:
            return None
        tokens.append(token)
        position = token.end()
    return tokens


def _nesting(words: Sequence[str]) -> int:
    depth = deepest = 0
    for word in words:
        depth += (word in "([") - (word in ")]") if len(word) == 1 else 0
        deepest = max(deepest, depth)
    return deepest


def _is_harmless(name: str) -> bool:
    if name in _FUNCTIONS or len(name) == 1:
        return True
    return not keyword.iskeyword(name) and name not in _sympy_names() and not name.endswith("__")


@functools.cache
def _sympy_names() -> frozenset[str]:
    """What parse_expr does not read as a new symbol."""
    return frozenset(dir(importlib.import_module("sympy"))) | frozenset(dir(builtins))


def _is_bounded_exponent(words: Sequence[str], position: int) -> bool:
    """Whether what follows ** is at most MAX_EXPONENT, or holds a name, so that nothing is multiplied out."""
    while position < len(words) and words[position] in "+-":
        position += 1
    if position == len(words):
        return True
    exponent = words[position : position + 1]
    if exponent == ["("]:
        end, depth = position, 0
        for end in range(position, len(words)):
            depth += (words[end] == "(") - (words[end] == ")")
            if depth == 0:
                break
        exponent = words[position : end + 1]
        position = end
    if any(word[0].isalpha() for word in exponent):
        return True
    towers = "**" in exponent or "!" in exponent or words[position + 1 : position + 2] in (["**"], ["!"])
    return not towers and all(float(word) <= MAX_EXPONENT for word in exponent if word[0].isdigit() or word[0] == ".")


def _is_bounded_factorial(words: Sequence[str], position: int) -> bool:
    operand = words[position - 1] if position else ""
    return operand.isdigit() and len(operand) <= MAX_FACTORIAL_DIGITS
