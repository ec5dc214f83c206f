"""Problems of a data source, before they are tokenized: rows of files by their columns, or generated tasks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_hapo.config import ArithmeticData, CheckedSumsData, FileData, PromptText, Source, TaskData
from megatron_hapo.config.time_limit import time_limit
from megatron_hapo.data import arithmetic, checked_sums
from megatron_hapo.data.chat_template import is_valid_unicode
from megatron_hapo.data.hub_rows import is_hub_name, open_hub_rows, parse_hub_name
from megatron_hapo.data.reasoning_tasks import REASONING_GYM_PREFIX, encode_task, import_reasoning_gym
from megatron_hapo.data.rows import InvalidRow, Row, RowFile, find, json_value, open_rows
from megatron_hapo.errors import DataError, one_line

Message = dict[str, str]
"""A chat message with the keys that chat templates expect: role and content."""

TASK_SECONDS = 60.0
TASK_INSTRUCTION = '\n\nGive the final answer on the last line, after "Answer:".'
"""Appended to reasoning-gym's questions, which do not say how to format the answer."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Problem:
    """One problem as text."""

    uid: str
    row: str
    """Which row it is, e.g. "row 3"."""
    messages: list[Message]
    ground_truth: str
    data_source: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of its row, as JSON values."""


def source_name(source: Source) -> str:
    """What messages call a data source."""
    match source:
        case FileData():
            first, *others = source.paths
            return f"{first} and {len(others)} more" if others else str(first)
        case TaskData():
            return f"{REASONING_GYM_PREFIX}{source.name}"
        case ArithmeticData() | CheckedSumsData():
            return source.type


def problems(source: Source) -> Iterator[Problem | InvalidRow]:
    """The problems of a data source, in its order.

    Raises:
        DataError: a file cannot be read, or problems cannot be generated.
    """
    match source:
        case FileData():
            return islice(_file_problems(source), source.limit)
        case TaskData():
            return _task_problems(source)
        case ArithmeticData():
            return _sums(
                source, arithmetic.problems, min_terms=source.min_terms, max_terms=source.max_terms,
                max_number=source.max_number,
            )  # fmt: skip
        case CheckedSumsData():
            return _sums(source, checked_sums.problems)


def file_faults(source: FileData) -> list[str]:
    """Reasons why the files cannot be used: missing, unreadable, or without a column. Their rows are not checked."""
    opened = (_open(path, source) for path in source.paths)
    return [fault for file in opened if not isinstance(file, RowFile) for fault in file]


def _open(path: Path, source: FileData) -> RowFile | list[str]:
    """The file, or the reasons why it cannot be used."""
    try:
        if is_hub_name(path):
            file = open_hub_rows(path)
        elif path.is_dir():
            folder = path if path.is_absolute() else f"./{path}"
            return [f"{path} is a folder: list its files, or name a split of a data set as hf:{folder}:train"]
        elif not path.is_file():
            return [f"no such file: {path}"]
        else:
            file = open_rows(path)
    except DataError as error:
        return [str(error)]
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"{path} cannot be read: {one_line(error)}"]
    return (_column_faults(path, file, source) if file.has_rows else [f"{path} has no rows"]) or file


def _column_faults(path: Path, file: RowFile, source: FileData) -> list[str]:
    """The columns that the file should have and does not."""
    answer = _answer_column(source, file)
    parent = answer.partition(".")[0]
    shown = [*file.columns, *(f"{parent}.{child}" for child in file.columns.get(parent, ()))]
    needed = {"prompt": source.columns.prompt, "answer": answer}
    if source.columns.data_source is not None:
        needed["data_source"] = source.columns.data_source
    return [
        f"{path} has no column {column}; its columns: {', '.join(shown)} (columns.{setting} chooses one)"
        for setting, column in needed.items()
        if not _has_column(file, column)
    ]


def _answer_column(source: FileData, file: RowFile) -> str:
    if source.columns.answer is not None:
        return source.columns.answer
    return "reward_model.ground_truth" if "reward_model" in file.columns else "answer"


def _has_column(file: RowFile, column: str) -> bool:
    parent, _, nested = column.partition(".")
    if column in file.columns or not nested:
        return column in file.columns
    return parent in file.columns and nested.partition(".")[0] in file.columns[parent]


def _file_problems(source: FileData) -> Iterator[Problem | InvalidRow]:
    opened = [_open(path, source) for path in source.paths]
    if faults := [fault for file in opened if not isinstance(file, RowFile) for fault in file]:
        raise DataError("\n".join(faults))
    stems = [parse_hub_name(path).stem if is_hub_name(path) else path.stem for path in source.paths]
    for index, (path, file, stem) in enumerate(zip(source.paths, opened, stems, strict=True)):
        assert isinstance(file, RowFile)
        prefix = stem if stems.count(stem) == 1 else f"{index}-{stem}"
        place = "" if len(stems) == 1 else f"{path}, "
        try:
            yield from _problems_of_file(file, source, stem=stem, prefix=prefix, place=place)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def _problems_of_file(
    file: RowFile, source: FileData, *, stem: str, prefix: str, place: str
) -> Iterator[Problem | InvalidRow]:
    parse = _row_parser(file, source, stem)
    for number, row in enumerate(file.rows()):
        if isinstance(row, InvalidRow):
            yield InvalidRow(f"{place}{row.row}", row.reason)
            continue
        try:
            messages, truth, data_source = parse(row)
            columns = {str(name): json_value(value) for name, value in row.items()}
            messages = with_prompt_text(messages, source, columns)
            yield Problem(f"{prefix}/{number}", f"{place}row {number}", messages, truth, data_source, columns)
        except (ValueError, RecursionError) as error:
            yield InvalidRow(f"{place}row {number}", one_line(error))


def _row_parser(file: RowFile, source: FileData, stem: str) -> Callable[[Row], tuple[list[Message], str, str]]:
    """The function that takes messages, ground truth and data source from a row.

    It raises ValueError with the reason if the row cannot be used.
    """
    prompt_column, answer_column = source.columns.prompt, _answer_column(source, file)
    source_column = source.columns.data_source or "data_source"
    has_source_column = _has_column(file, source_column)
    pattern = re.compile(source.answer_pattern) if source.answer_pattern is not None else None

    def parse(row: Row) -> tuple[list[Message], str, str]:
        messages = _messages(find(row, prompt_column), prompt_column)
        truth = _truth(find(row, answer_column), answer_column)
        if pattern is not None:
            match = pattern.search(truth)
            if match is None or not match[1]:
                raise ValueError(f"answer_pattern finds nothing in {answer_column}")
            truth = match[1].strip()
        data_source = source.data_source
        if data_source is None:
            data_source = find(row, source_column) if has_source_column else stem
        if not isinstance(data_source, str):
            raise ValueError(f"{source_column} must be a string")
        for name, text in ((answer_column, truth), (source_column, data_source)):
            if not is_valid_unicode(text):
                raise ValueError(f"{name} contains half of a surrogate pair, which is not valid Unicode")
        return messages, truth, data_source

    return parse


def _messages(prompt: Any, column: str) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"{column} must be a string or a list of messages with role and content")
    if not all(is_valid_unicode(message["role"] + message["content"]) for message in messages):
        raise ValueError(f"{column} contains half of a surrogate pair, which is not valid Unicode")
    # Parquet gives every message all keys, absent ones with None, which some chat templates would print.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _truth(truth: Any, column: str) -> str:
    if truth is None or truth == "":
        raise ValueError(f"{column} is missing")
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(f"{column} must be a string or a number, not a {type(truth).__name__}")
    if isinstance(truth, float) and not math.isfinite(truth):
        raise ValueError(f"{column} must be a finite number, got {truth}")
    return str(truth)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def with_prompt_text(messages: Sequence[Message], source: PromptText, columns: Mapping[str, Any]) -> list[Message]:
    """The messages with the source's prompt template and system prompt.

    Raises:
        ValueError: there is no user's message for the template.
    """
    changed = list(messages)
    if source.prompt_template is not None:
        last = next((i for i in reversed(range(len(changed))) if changed[i]["role"] == "user"), None)
        if last is None:
            raise ValueError("has no message of the user's, which prompt_template needs")
        content = _filled(source.prompt_template, {**columns, "prompt": changed[last]["content"]})
        changed[last] = {**changed[last], "content": content}
    if source.system_prompt is not None:
        others = [message for message in changed if message["role"] != "system"]
        changed = [{"role": "system", "content": source.system_prompt}, *others]
    return changed


def _filled(template: str, values: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            return match[0]
        given = values[match[1]]
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

    return _PLACEHOLDER.sub(value, template)


def _task_problems(source: TaskData) -> Iterator[Problem]:
    try:
        dataset = import_reasoning_gym().create_dataset(
            source.name, size=source.size, seed=source.seed, **source.options
        )
    except Exception as error:  # reasoning-gym validates its configs by assert, and only some of the options
        raise DataError(f"{source_name(source)}: {one_line(error) or type(error).__name__}") from None
    for index in range(source.size):
        entry = _task_entry(dataset, index, source_name(source))
        truth = encode_task(
            answer=str(entry["answer"]),
            index=index,
            size=source.size,
            seed=source.seed,
            options=source.options,
        )
        question = [{"role": "user", "content": entry["question"] + TASK_INSTRUCTION}]
        question = with_prompt_text(question, source, {})
        yield Problem(f"{source.name}/{index}", f"row {index}", question, truth, source_name(source))


def _task_entry(dataset: Any, index: int, name: str) -> dict[str, Any]:
    """One task, within a limit of time: options can ask for more than can be computed."""
    try:
        with time_limit(TASK_SECONDS):
            return dataset[index]
    except TimeoutError:
        raise DataError(f"{name}: task {index} takes longer than {TASK_SECONDS:g} s to generate") from None
    except Exception as error:
        raise DataError(f"{name}: task {index}: {one_line(error) or type(error).__name__}") from None


def _sums(
    source: ArithmeticData | CheckedSumsData, make: Callable[..., list[arithmetic.Problem]], **bounds: int
) -> Iterator[Problem]:
    try:
        generated = make(size=source.size, seed=source.seed, **bounds)
    except ValueError as error:
        raise DataError(f"{source_name(source)}: {error}") from None
    for index, problem in enumerate(generated):
        question = with_prompt_text([{"role": "user", "content": problem.question}], source, {})
        yield Problem(f"{source.type}/{index}", f"row {index}", question, problem.answer, source.type)
