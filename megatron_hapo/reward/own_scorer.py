"""Rewards of the user's own: loads the function, calls it and reads its result. Runs in reward workers, without torch.

The function is the user's, so it is trusted; the responses that it sees are not. It is therefore imported in a worker's
inner process, and called on each response in that response's sandboxed fork.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from megatron_hapo.config.scorer_names import function_of, is_file, is_own

RESERVED_PARTS = frozenset({"mean", "accuracy", "failures"})
"""Names of metrics under reward/ that a part must not take."""
MAX_PARTS = 32
MAX_REWARD = 1e6

_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class OwnScorerError(ValueError):
    """The user's function cannot be used."""


@dataclass(frozen=True)
class OwnReward:
    """What the user's function gave for one response."""

    total: float
    """The reward."""
    correctness: float
    """In [0, 1]: the part `correct`, else the total, cut to this range."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """By name, without the total."""


Function = Callable[[str, dict[str, Any]], Any]


@functools.cache
def load_own_scorer(scorer: str) -> Function:
    """The function that the scorer names.

    Raises:
        OwnScorerError: it cannot be imported, or takes other arguments than a response and a row.
    """
    target, name = function_of(scorer)
    try:
        module = _import_file(Path(target)) if is_file(target) else importlib.import_module(target)
    except MemoryError:
        raise
    except ModuleNotFoundError as error:
        hint = ""
        if not is_file(target) and error.name == target.partition(".")[0]:
            hint = "; install it, add its folder to PYTHONPATH, or name its file as FILE.py:NAME"
        raise OwnScorerError(f"cannot be imported: {error}{_place(error, target)}{hint}") from None
    except BaseException as error:  # also SystemExit: a script without `if __name__ == "__main__"`
        raise OwnScorerError(f"cannot be imported: {error!r}{_place(error, target)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise OwnScorerError(f"has no function {name}; it defines: {', '.join(defined) or 'none'}")
    if inspect.iscoroutinefunction(function):
        raise OwnScorerError("must not be an async function")
    try:
        inspect.signature(function).bind("response", {})
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise OwnScorerError(
            f"must take two arguments, the response's text and its row, but is {name}{inspect.signature(function)}: "
            f"{error}"
        ) from None
    return function


def own_reward(scorer: str, response: str, row: Mapping[str, Any]) -> OwnReward:
    """The reward that the user's function gives.

    Raises:
        OwnScorerError: the function raised an error, or its result is not a reward.
    """
    function = load_own_scorer(scorer)
    try:
        result = function(response, dict(row))
    except MemoryError:
        raise
    except Exception as error:
        raise OwnScorerError(f"{error!r}{_place(error, function_of(scorer)[0])}") from None
    return read_result(result)


def read_result(result: Any) -> OwnReward:
    """The reward in what a function returned: a number, or named parts with their `total`.

    Raises:
        OwnScorerError: it is neither, a number is not finite, or a name cannot be that of a metric.
    """
    if not isinstance(result, Mapping):
        total = _number("the result", result)
        return OwnReward(total, min(max(total, 0.0), 1.0))
    if "total" not in result:
        names = ", ".join(map(str, list(result)[:8]))
        raise OwnScorerError(f'returned the parts {names or "{}"} without "total", which is the reward')
    parts = {str(name): _number(f"part {name!r}", value) for name, value in result.items()}
    total = parts.pop("total")
    for name in parts:
        if not _PART.fullmatch(name) or name in RESERVED_PARTS:
            raise OwnScorerError(
                f"part {name[:80]!r} must have a name of letters, digits and underscores, other than "
                f"{', '.join(sorted(RESERVED_PARTS))}"
            )
    if len(parts) > MAX_PARTS:
        raise OwnScorerError(f"returned {len(parts)} parts; at most {MAX_PARTS} are allowed")
    correctness = parts.get("correct", min(max(total, 0.0), 1.0))
    if not 0 <= correctness <= 1:
        raise OwnScorerError(f"part 'correct' must be in [0, 1], got {correctness:g}")
    return OwnReward(total, correctness, parts)


def readable_folders(scorers: Iterable[str]) -> tuple[Path, ...]:
    """The folders that the user's functions may read: that of the file, or of the package. Imports nothing."""
    folders: set[Path] = set()
    for scorer in filter(is_own, scorers):
        target, _ = function_of(scorer)
        if is_file(target):
            folders.add(Path(target).absolute().parent)
            continue
        found = importlib.util.find_spec(target.partition(".")[0])
        if found is not None:
            folders |= {Path(folder).absolute() for folder in found.submodule_search_locations or ()}
    return tuple(sorted(folders))


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise OwnScorerError(f"no such file: {path}")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # modules beside the file, as for a script
    name = f"own_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None, "a file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes look their module up
    spec.loader.exec_module(module)
    return module


def _number(what: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise OwnScorerError(f"{what} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        raise OwnScorerError(f"{what} must be a finite number of at most {MAX_REWARD:g}, got {number}")
    return number


def _place(error: BaseException, target: str) -> str:
    """Where in the user's file the error arose, as far as the traceback says; else an empty string."""
    if isinstance(error, SyntaxError):
        return ""  # it names its line itself
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.isfile(frame.filename)]
    if is_file(target):  # the user's line, and not one of a library that it called
        frames = [frame for frame in frames if os.path.dirname(frame.filename) == os.path.dirname(target)]
    if not frames or frames[-1].filename == __file__:
        return ""
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
