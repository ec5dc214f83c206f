"""Programs in responses: their tests, how one runs in the sandbox, and how its outputs are compared. Imports no torch.

Every test runs in a sandboxed fork of its own. What it must print or return stays in the driver's process: a worker
knows the inputs only, and sends back a digest of what each run gave, so a program cannot look the answers up or report
its own success. The exception are HumanEval's assertions, which are code that runs beside the program.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

Kind = Literal["stdin", "function", "asserts"]

MAX_TESTS = 100
"""Tests of a row that are run, from the first."""
MAX_OUTPUT_BYTES = 4 << 20
"""A program that prints more fails the test."""
PASSED = "passed"
"""The digest of assertions that hold."""

_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
PREAMBLE = (
    "import bisect, collections, functools, heapq, itertools, math, random, re, string\n"
    "from collections import *\nfrom functools import *\nfrom itertools import *\nfrom typing import *\n"
)
"""What solutions of the LeetCode layout use without importing it."""


class CodeTestsError(ValueError):
    """A row has no tests in a known layout."""


@dataclass(frozen=True)
class CodeTests:
    """The tests of one problem."""

    kind: Kind
    inputs: tuple[str, ...]
    """What each test reads on stdin; the JSON list of its arguments; or its assertions."""
    expected: tuple[str, ...]
    """The digest of the right result of each test."""
    function: str = ""
    """Name of the function that is called or checked."""
    prompt: str = ""
    """HumanEval's beginning of the program, for responses that only continue it."""

    def for_worker(self) -> dict[str, Any]:
        """What a worker needs: everything except the expected results."""
        return {"kind": self.kind, "inputs": list(self.inputs), "function": self.function, "prompt": self.prompt}


def parse_tests(ground_truth: str, columns: Mapping[str, Any]) -> CodeTests:
    """The tests of a row.

    Layouts: TACO's and APPS's `input_output` ({"inputs": [...], "outputs": [...], "fn_name": ...}); LiveCodeBench's
    list of {"input", "output", "testtype"} with `func_name` in the column `metadata`; HumanEval's column `test`, which
    defines `check`, with the columns `entry_point` and `prompt`.

    Raises:
        CodeTestsError: it has none of them.
    """
    entry_point = columns.get("entry_point")
    if isinstance(entry_point, str) and "def check" in ground_truth:
        prompt = columns.get("prompt")
        start = prompt if isinstance(prompt, str) and f"def {entry_point}" in prompt else ""
        return CodeTests("asserts", (ground_truth,), (PASSED,), entry_point, start)
    try:
        return _parse_json_tests(json.loads(ground_truth), columns)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CodeTestsError(
            "the ground truth must be tests in the layout of TACO (inputs and outputs), LiveCodeBench (a list of "
            f"tests) or HumanEval (assertions in `check`, with entry_point): {error!r}"
        ) from None


def program_of(response: str) -> str | None:
    """The program in a response: its last block of Python between ```; None if there is none."""
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else None


def share_passed(tests: CodeTests, digests: Sequence[str | None]) -> float:
    """Share of the tests whose result is the expected one, in [0, 1].

    Args:
        digests: of the results, None for a run that failed; tests that were not run are missing at the end.
    """
    right = sum(got == expected for got, expected in zip(digests, tests.expected, strict=False))
    return right / len(tests.expected)


def run_test(program: str, kind: Kind, test: str, *, function: str, prompt: str, nonce: bytes) -> bytes:
    """The output of one test, in the sandboxed process that this is called in; an error of the program is raised.

    Args:
        nonce: what to return if assertions hold.
    """
    if kind == "stdin":
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="replace")
        captured = io.FileIO(3, "w", closefd=False)  # the sandbox's pipe: nothing is held back if the program is killed
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(captured), encoding="utf-8", errors="replace")
        try:
            _execute(program, "__main__")
        except SystemExit as stopped:
            if stopped.code not in (None, 0):
                raise
        sys.stdout.flush()
        return b""
    if kind == "asserts":
        source = program if f"def {function}" in program else prompt + program
        _execute(f"{source}\n\n{test}\n\ncheck({function})\n", "checked")
        return nonce
    namespace = _execute(PREAMBLE + program, "solution")
    owner = namespace.get("Solution")
    call = getattr(owner(), function) if owner is not None and hasattr(owner, function) else namespace[function]
    return json.dumps(call(*json.loads(test)), default=list).encode()


def digest_of_output(kind: Kind, output: bytes, nonce: bytes) -> str | None:
    """The digest of what a test's process wrote; None if it cannot be a result. Safe on hostile bytes."""
    if kind == "asserts":
        return PASSED if output == nonce else None
    text = output.decode(errors="replace")
    if kind == "stdin":
        return _digest(_plain_tokens(text))
    try:
        return _digest(_plain_value(json.loads(text)))
    except (ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=1024)
def _parse_cached(ground_truth: str, columns: str) -> CodeTests:
    return parse_tests(ground_truth, json.loads(columns))


def tests_of_row(ground_truth: str, columns: Mapping[str, Any]) -> CodeTests:
    """`parse_tests`, remembered for the other responses to the prompt."""
    needed = {name: columns[name] for name in ("entry_point", "prompt", "metadata", "fn_name") if name in columns}
    return _parse_cached(ground_truth, json.dumps(needed))


def _parse_json_tests(tests: Any, columns: Mapping[str, Any]) -> CodeTests:
    name, pairs = _taco(tests, columns) if isinstance(tests, Mapping) else _live_code_bench(tests, columns)
    if not pairs:
        raise ValueError("no tests")
    if name and not str(name).isidentifier():
        raise ValueError(f"the function's name {name!r} is not a name")
    pairs = pairs[:MAX_TESTS]
    if name:
        inputs = [json.dumps(given) for given, _ in pairs]
        digests = [_digest(_plain_value(result)) for _, result in pairs]
    else:
        inputs = [_text(given) for given, _ in pairs]
        digests = [_digest(_plain_tokens(_text(result))) for _, result in pairs]
    return CodeTests("function" if name else "stdin", tuple(inputs), tuple(digests), str(name))


def _taco(tests: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[str, list[tuple[Any, Any]]]:
    """The function's name, empty for programs that read stdin, with each test's input and result."""
    name = tests.get("fn_name") or columns.get("fn_name") or ""
    pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    if name:  # a result may be wrapped in a list
        pairs = [(given, out[0] if isinstance(out, list) and len(out) == 1 else out) for given, out in pairs]
    return name, pairs


def _live_code_bench(tests: Sequence[Any], columns: Mapping[str, Any]) -> tuple[str, list[tuple[Any, Any]]]:
    """As `_taco`. Arguments are JSON values, one a line."""
    if not tests or tests[0].get("testtype") != "functional":
        return "", [(test["input"], test["output"]) for test in tests]
    metadata = columns.get("metadata") or "{}"
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    pairs = [([json.loads(line) for line in t["input"].splitlines()], json.loads(t["output"])) for t in tests]
    return metadata["func_name"], pairs


def _text(value: Any) -> str:
    """TACO gives some inputs and outputs as lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _execute(source: str, name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": name, "__builtins__": __builtins__}
    exec(compile(source, "<program>", "exec"), namespace)
    return namespace


def _plain_tokens(text: str) -> str:
    """The words of an output, with numbers in one notation, so that 1.0 equals 1 and white space does not matter."""
    return "\n".join(" ".join(map(_plain_token, line.split())) for line in text.strip().splitlines())


def _plain_token(token: str) -> str:
    if len(token) > 40 or not (token[-1].isdigit() or token[-1] == "."):
        return token
    try:
        number = Decimal(token)
    except InvalidOperation:
        return token
    return str(number.normalize()) if number.is_finite() and abs(number.adjusted()) < 60 else token


def _plain_value(value: Any) -> str:
    """A result as text; 1, 1.0 and true are equal, as in Python."""

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(item) for item in part]
        if isinstance(part, dict):
            return {str(key): plain(item) for key, item in part.items()}
        if isinstance(part, bool) or (isinstance(part, float) and part.is_integer()):
            return int(part)
        return part

    return json.dumps(plain(value), sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
