"""Filters the answers that reach those of reasoning-gym's scorers that call `eval` or sympy's `parse_expr`.

Both execute any Python in an answer (reasoning-gym 0.1.25, sympy 1.14). Only literals (numbers, short strings,
brackets) and arithmetic expressions pass: they contain no attributes, no strings that are parsed again, and no names
other than those of mathematics. The scorer still computes the score, so honest answers keep theirs. An answer that gets
past this grammar, or that takes forever to evaluate, is confined by the sandbox.
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
    """The scorer's score for an answer that it cannot parse."""


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
"""Datasets whose scorers evaluate answers. A test compares it with what every scorer of the package compiles."""

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
"""sympy's names of mathematical functions and constants."""


def unparsable_score(answer: str, *, dataset: str, entry: dict[str, Any]) -> float | None:
    """The score of an answer that must not reach its scorer; None if the answer is safe to pass on.

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
            # These scorers compare the text before they evaluate it.
            expected = {text.strip() for text in (entry["answer"], *metadata.get("valid_answers", ()))}
            safe = answer.strip() in expected or is_literal(answer)
        case "expression":
            safe = is_expression(_unquoted(answer), variables=metadata.get("variables", ()))
        case _ as never:
            assert_never(never)
    return None if safe else task.unparsable


def is_literal(text: str) -> bool:
    """Whether the text has only numbers, short strings, True, False, None, brackets and commas; it need not parse."""
    tokens = _tokens(_LITERAL_TOKEN, text, MAX_LITERAL_CHARACTERS)
    return tokens is not None and _nesting([token.group().strip() for token in tokens]) <= MAX_NESTING


def is_expression(text: str, *, variables: Collection[str] = ()) -> bool:
    """Whether the text is made of numbers, variables, known functions, + - * / // % ^ **, factorials and parentheses.

    Exponents and factorials of plain numbers are bounded. A variable is one of `variables`, a single letter, or any
    name that sympy does not define.
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
    """The text without quotation marks around it: sympy parses a quoted string as the expression inside."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _tokens(pattern: re.Pattern[str], text: str, max_characters: int) -> list[re.Match[str]] | None:
    """The text's tokens; None if it contains anything else, or is too long."""
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
    """The names that parse_expr does not turn into new symbols."""
    return frozenset(dir(importlib.import_module("sympy"))) | frozenset(dir(builtins))


def _is_bounded_exponent(words: Sequence[str], position: int) -> bool:
    """Whether the exponent after ** is at most MAX_EXPONENT, or contains a name, so that the power is not expanded."""
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
