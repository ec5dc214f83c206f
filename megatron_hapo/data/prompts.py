"""Prompts from files and generated tasks, and the order in which training sees them. Does not import torch itself."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import batched, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hapo.config import ArithmeticData, DataSource, FileData, TaskData
from megatron_hapo.config.time_limit import time_limit
from megatron_hapo.data.chat_template import Rendered, is_valid_unicode, render_chat_template
from megatron_hapo.data.reasoning_tasks import REASONING_GYM_PREFIX, encode_task, import_reasoning_gym
from megatron_hapo.errors import DataError, one_line
from megatron_hapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, str]
"""A chat message with the keys that chat templates expect: role and content."""

COLUMNS = ("prompt", "reward_model", "data_source")
"""Columns of the DAPO-Math layout; reward_model contains ground_truth."""

TASK_SECONDS = 60.0
TASK_INSTRUCTION = '\n\nGive the final answer on the last line, after "Answer:".'
"""Appended to reasoning-gym's questions, which do not say how to format the answer."""

_ENCODE_BATCH = 1000
_LONGEST_ROW = 16 << 20


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one source, in the order of the source."""

    prompts: Sequence[Prompt]
    num_too_long: int
    """Number of prompts that exceed the limit and were dropped."""
    num_invalid: int = 0
    """Number of rows that cannot be used and were dropped."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _InvalidRow:
    row: str
    """Which row it is, e.g. "row 3" or "line 4"."""
    reason: str


@dataclass(frozen=True)
class _Problem:
    uid: str
    row: str
    messages: list[Message]
    ground_truth: str
    data_source: str


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model folder. Code in the folder is never run."""
    from transformers import AutoTokenizer  # imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if type(tokenizer.model_max_length) not in (int, float):
            raise TypeError(f"model_max_length must be a number, not a {type(tokenizer.model_max_length).__name__}")
        return tokenizer
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # Damaged files raise whatever the parsers run into; a panic in Rust is a BaseException.
    except BaseException as error:
        raise DataError(
            f"model.path: the tokenizer in {path} cannot be loaded from its files (tokenizer.json, "
            f"tokenizer_config.json, ...): {type(error).__name__}: {one_line(error)[:300]}"
        ) from error


def load_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool, max_prompt_tokens: int
) -> PromptSet:
    """The prompts of a data source, tokenized. Invalid rows, and prompts of more than `max_prompt_tokens`, are dropped:
    a warning states their number, and the reason for the first invalid row.

    Raises:
        DataError: no prompt is left, or the data or the chat template cannot be used at all.
    """
    prompts: list[Prompt] = []
    invalid: list[_InvalidRow] = []
    num_problems = num_too_long = 0
    for chunk in batched(_problems(source), _ENCODE_BATCH):
        num_problems += len(chunk)
        invalid += [row for row in chunk if isinstance(row, _InvalidRow)]
        problems = [row for row in chunk if isinstance(row, _Problem)]
        encoded = _encode_valid([p.messages for p in problems], tokenizer, chat_template=chat_template)
        for problem, token_ids in zip(problems, encoded, strict=True):
            if isinstance(token_ids, str):
                invalid.append(_InvalidRow(problem.row, token_ids))
            elif not token_ids:
                invalid.append(_InvalidRow(problem.row, "the prompt is empty after tokenization"))
            elif len(token_ids) > max_prompt_tokens:
                num_too_long += 1
            else:
                prompts.append(
                    Prompt(
                        uid=problem.uid,
                        token_ids=np.array(token_ids, dtype=np.int32),
                        ground_truth=problem.ground_truth,
                        data_source=problem.data_source,
                    )
                )
    name = _name(source)
    if num_problems == 0:
        raise DataError(f"{name} has no rows")
    dropped = []
    if invalid:
        dropped.append(f"{len(invalid)} of {num_problems} rows are invalid ({invalid[0].row}: {invalid[0].reason})")
    if num_too_long:
        dropped.append(
            f"{num_too_long} of {num_problems} prompts are longer than rollout.max_prompt_tokens={max_prompt_tokens}"
        )
    if not prompts:
        raise DataError(f"{name}: {'; '.join(dropped)}; no prompt is left")
    for reason in dropped:
        logger.warning("%s: %s and were dropped", name, reason)
    logger.info("%s: %d prompts", name, len(prompts))
    return PromptSet(prompts, num_too_long, len(invalid))


def encode_messages(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[int]]:
    """Token ids of each conversation, up to the start of the assistant's turn.

    Without the chat template, the contents are joined by newlines, and the tokenizer adds the special tokens of plain
    text, such as the beginning of the sequence.

    Raises:
        DataError: the chat template is wanted, but the tokenizer has none, or a conversation cannot be rendered.
    """
    encoded = _encode_valid(conversations, tokenizer, chat_template=chat_template)
    token_ids = [ids for ids in encoded if not isinstance(ids, str)]
    if reasons := [ids for ids in encoded if isinstance(ids, str)]:
        raise DataError(f"{len(reasons)} of {len(encoded)} conversations cannot be encoded: {reasons[0]}")
    return token_ids


def _encode_valid(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[int] | str]:
    """Token ids of each conversation, or the reason why it cannot be encoded."""
    if not chat_template:
        texts: list[Rendered] = [
            Rendered("\n".join(message["content"] for message in messages)) for messages in conversations
        ]
    elif tokenizer.chat_template is None:
        raise DataError(f"the tokenizer {tokenizer.name_or_path} has no chat template: set data.chat_template=false")
    else:
        texts = render_chat_template(tokenizer, conversations)
    valid = [rendered.text for rendered in texts if rendered.fault is None]
    try:
        ids = iter(tokenizer(valid, add_special_tokens=not chat_template)["input_ids"] if valid else ())  # pyright: ignore
    except Exception as error:
        raise DataError(f"the tokenizer {tokenizer.name_or_path} fails: {type(error).__name__}: {error}") from error
    return [next(ids) if rendered.fault is None else rendered.fault for rendered in texts]  # pyright: ignore


def file_faults(path: Path) -> list[str]:
    """Reasons why a prompt file cannot be used: missing, unreadable, or without a column. Its rows are not checked."""
    try:
        if not path.is_file():
            return [f"no such file: {path}"]
        columns, num_rows = _columns(path)
    except DataError as error:
        return [str(error)]
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"{path} cannot be read: {one_line(error)}"]
    if num_rows == 0:
        return [f"{path} has no rows"]
    needed = (*COLUMNS, "reward_model.ground_truth") if "reward_model" in columns else COLUMNS
    return [
        f"{path} has no column {column}; its columns: {', '.join(columns)}"
        for column in needed
        if column not in columns
    ]


class PromptSampler:
    """An endless sequence of prompts, permuted anew in each epoch, whose state is a single integer.

    A batch never contains a prompt twice unless it is larger than the set of prompts; each repetition then gets its own
    uid, so that it is given different responses. With shuffling, the prompts at the end of an epoch that do not fill a
    batch are therefore skipped; without shuffling, the batch continues at the beginning.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool):
        if not prompts:
            raise DataError("no prompts to sample from")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._order = (-1, np.zeros(0, dtype=np.int64))

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        size = len(self._prompts)
        if self._shuffle and count <= size < self._position % size + count:
            self._position += -self._position % size
        positions = range(self._position, self._position + count)
        self._position += count
        times: Counter[int] = Counter()
        prompts = []
        for row in map(self._row, positions):
            prompt, again = self._prompts[row], times[row]
            prompts.append(replace(prompt, uid=f"{prompt.uid}#{again}") if again else prompt)
            times[row] += 1
        return prompts

    def state(self) -> int:
        """Position in the sequence, for `restore`."""
        return self._position

    def restore(self, state: int) -> None:
        """Continue from the state of a sampler that had the same prompts and seed."""
        self._position = state

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._prompts))
        if not self._shuffle:
            return offset
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed % 2**64, epoch])
            self._order = (epoch, generator.permutation(len(self._prompts)))
        return int(self._order[1][offset])


def _name(source: DataSource) -> str:
    match source:
        case FileData():
            return str(source.path)
        case TaskData():
            return f"{REASONING_GYM_PREFIX}{source.name}"
        case ArithmeticData():
            return source.type


def _problems(source: DataSource) -> Iterator[_Problem | _InvalidRow]:
    match source:
        case FileData():
            return islice(_file_problems(source.path), source.limit)
        case TaskData():
            return _task_problems(source)
        case ArithmeticData():
            return _arithmetic_problems(source)


def _file_problems(path: Path) -> Iterator[_Problem | _InvalidRow]:
    faults = file_faults(path)
    if faults:
        raise DataError("\n".join(faults))
    try:
        for number, row in enumerate(_parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)):
            if isinstance(row, _InvalidRow):
                yield row
                continue
            try:
                yield _Problem(f"{path.stem}/{number}", f"row {number}", *_parse_row(row))
            except (ValueError, RecursionError) as error:
                yield _InvalidRow(f"row {number}", one_line(error))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def _parse_row(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    prompt, reward_model, data_source = (row.get(column) for column in COLUMNS)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("prompt must be a string or a list of messages with role and content")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") in (None, ""):
        raise ValueError("reward_model.ground_truth is missing")
    truth = reward_model["ground_truth"]
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(f"reward_model.ground_truth must be a string or a number, not a {type(truth).__name__}")
    if isinstance(truth, float) and not math.isfinite(truth):
        raise ValueError(f"reward_model.ground_truth must be a finite number, got {truth}")
    if not isinstance(data_source, str):
        raise ValueError("data_source must be a string")
    for name, text in (("reward_model.ground_truth", str(truth)), ("data_source", data_source)):
        if not is_valid_unicode(text):
            raise ValueError(f"{name} contains half of a surrogate pair, which is not valid Unicode")
    if not all(is_valid_unicode(message["role"] + message["content"]) for message in messages):
        raise ValueError("prompt contains half of a surrogate pair, which is not valid Unicode")
    # Parquet gives every message all keys, absent ones with None, which some chat templates would print.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return messages, str(truth), data_source


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _columns(path: Path) -> tuple[list[str], int]:
    """Column names, with the children of reward_model as `reward_model.NAME`, and a number of rows (JSONL: 0 or 1)."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        if "reward_model" in columns and pa.types.is_struct(kind := file.schema_arrow.field("reward_model").type):
            columns += [f"reward_model.{child.name}" for child in kind]
        return columns, file.metadata.num_rows
    if path.suffix == ".jsonl":
        rows = list(islice(_jsonl_rows(path), _ENCODE_BATCH))
        first = next((row for row in rows if not isinstance(row, _InvalidRow)), None)
        if first is None and rows:
            invalid = rows[0]
            assert isinstance(invalid, _InvalidRow)
            raise DataError(f"{path}: {invalid.row} {invalid.reason}")
        reward_model = first.get("reward_model") if first else None
        children = list(reward_model) if isinstance(reward_model, dict) else []
        return [*(first or ()), *(f"reward_model.{child}" for child in children)], int(first is not None)
    raise ValueError(f"the file name must end in .parquet or .jsonl, not {path.suffix!r}")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any] | _InvalidRow]:
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ENCODE_BATCH, columns=list(COLUMNS)):
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, or a date that Python cannot represent
            yield from (_parquet_row(batch, index, start + index) for index in range(batch.num_rows))
        start += batch.num_rows


def _parquet_row(batch: pa.RecordBatch, index: int, number: int) -> dict[str, Any] | _InvalidRow:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return _InvalidRow(f"row {number}", one_line(error))


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any] | _InvalidRow]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_ROW + 1):
            number += 1
            if len(line) > _LONGEST_ROW:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_ROW)
                yield _InvalidRow(f"line {number}", f"has more than {_LONGEST_ROW} bytes")
            elif line.strip():
                yield _jsonl_row(line, number)


def _jsonl_row(line: bytes, number: int) -> dict[str, Any] | _InvalidRow:
    try:
        row = json.loads(line.decode())
    except RecursionError:
        return _InvalidRow(f"line {number}", "is not a row: it is nested too deeply")
    except ValueError as error:
        return _InvalidRow(f"line {number}", f"is not JSON: {one_line(error)}")
    return row if isinstance(row, dict) else _InvalidRow(f"line {number}", "is not a JSON object")


def _task_problems(source: TaskData) -> Iterator[_Problem]:
    try:
        dataset = import_reasoning_gym().create_dataset(
            source.name, size=source.size, seed=source.seed, **source.options
        )
    except Exception as error:  # reasoning-gym validates its configs by assert, and only some of the options
        raise DataError(f"{_name(source)}: {one_line(error) or type(error).__name__}") from None
    for index in range(source.size):
        entry = _task_entry(dataset, index, _name(source))
        truth = encode_task(
            answer=str(entry["answer"]),
            index=index,
            size=source.size,
            seed=source.seed,
            options=source.options,
        )
        question = [{"role": "user", "content": entry["question"] + TASK_INSTRUCTION}]
        yield _Problem(f"{source.name}/{index}", f"row {index}", question, truth, _name(source))


def _task_entry(dataset: Any, index: int, name: str) -> dict[str, Any]:
    """One task, within a limit of time: options can ask for more than can be computed."""
    try:
        with time_limit(TASK_SECONDS):
            return dataset[index]
    except TimeoutError:
        raise DataError(f"{name}: task {index} takes longer than {TASK_SECONDS:g} s to generate") from None
    except Exception as error:
        raise DataError(f"{name}: task {index}: {one_line(error) or type(error).__name__}") from None


def _arithmetic_problems(source: ArithmeticData) -> Iterator[_Problem]:
    from megatron_hapo.data.arithmetic import problems

    try:
        generated = problems(
            size=source.size,
            seed=source.seed,
            min_terms=source.min_terms,
            max_terms=source.max_terms,
            max_number=source.max_number,
        )
    except ValueError as error:
        raise DataError(f"{_name(source)}: {error}") from None
    for index, problem in enumerate(generated):
        question = [{"role": "user", "content": problem.question}]
        yield _Problem(f"{source.type}/{index}", f"row {index}", question, problem.answer, source.type)
