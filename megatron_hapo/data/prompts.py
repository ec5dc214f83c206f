"""Prompts from files and generated tasks, and the order in which training sees them. Does not import torch itself."""

from __future__ import annotations

import json
import logging
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
from megatron_hapo.data.reasoning_tasks import REASONING_GYM_PREFIX, encode_task, import_reasoning_gym
from megatron_hapo.errors import DataError
from megatron_hapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, str]
"""A chat message with the keys that chat templates expect: role and content."""

COLUMNS = ("prompt", "reward_model", "data_source")
"""Columns of the DAPO-Math layout; reward_model contains ground_truth."""

TASK_INSTRUCTION = '\n\nGive the final answer on the last line, after "Answer:".'
"""Appended to reasoning-gym's questions, which do not say how to format the answer."""

_ENCODE_BATCH = 1000


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of one source, in the order of the source."""

    prompts: Sequence[Prompt]
    num_too_long: int
    """Number of prompts that exceed the limit and were dropped."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _Problem:
    uid: str
    messages: list[Message]
    ground_truth: str
    data_source: str


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model folder. Code in the folder is never run."""
    from transformers import AutoTokenizer  # imports torch

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool, max_prompt_tokens: int
) -> PromptSet:
    """The prompts of a data source, tokenized. Prompts of more than `max_prompt_tokens` are dropped, with a warning.

    Raises:
        DataError: a row is invalid, or no prompt is left.
    """
    prompts: list[Prompt] = []
    num_problems = 0
    for chunk in batched(_problems(source), _ENCODE_BATCH):
        num_problems += len(chunk)
        encoded = encode_messages([p.messages for p in chunk], tokenizer, chat_template=chat_template)
        for problem, token_ids in zip(chunk, encoded, strict=True):
            if not token_ids:
                raise DataError(f"{problem.uid}: the prompt is empty after tokenization")
            if len(token_ids) <= max_prompt_tokens:
                prompts.append(
                    Prompt(
                        uid=problem.uid,
                        token_ids=np.array(token_ids, dtype=np.int32),
                        ground_truth=problem.ground_truth,
                        data_source=problem.data_source,
                    )
                )
    num_too_long = num_problems - len(prompts)
    name = _name(source)
    if num_problems == 0:
        raise DataError(f"{name} has no rows")
    dropped = f"{num_too_long} of {num_problems} prompts are longer than rollout.max_prompt_tokens={max_prompt_tokens}"
    if not prompts:
        raise DataError(f"{name}: {dropped}; no prompt is left")
    if num_too_long:
        logger.warning("%s: %s and were dropped", name, dropped)
    logger.info("%s: %d prompts", name, len(prompts))
    return PromptSet(prompts, num_too_long)


def encode_messages(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[int]]:
    """Token ids of each conversation, up to the start of the assistant's turn.

    Without the chat template, the contents are joined by newlines, and the tokenizer adds the special tokens of plain
    text, such as the beginning of the sequence.

    Raises:
        DataError: the chat template is wanted, but the tokenizer has none.
    """
    if not chat_template:
        texts = ["\n".join(message["content"] for message in messages) for messages in conversations]
        return tokenizer(texts)["input_ids"]  # pyright: ignore[reportReturnType]
    if tokenizer.chat_template is None:
        raise DataError(f"the tokenizer {tokenizer.name_or_path} has no chat template: set data.chat_template=false")
    texts = [
        str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
        for messages in conversations
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def file_faults(path: Path) -> list[str]:
    """Reasons why a prompt file cannot be used: missing, unreadable, or without a column. Its rows are not checked."""
    if not path.is_file():
        return [f"no such file: {path}"]
    try:
        columns, num_rows = _columns(path)
    except DataError as error:
        return [str(error)]
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"{path} cannot be read: {' '.join(str(error).split())}"]
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


def _problems(source: DataSource) -> Iterator[_Problem]:
    match source:
        case FileData():
            return islice(_file_problems(source.path), source.limit)
        case TaskData():
            return _task_problems(source)
        case ArithmeticData():
            return _arithmetic_problems(source)


def _file_problems(path: Path) -> Iterator[_Problem]:
    faults = file_faults(path)
    if faults:
        raise DataError("\n".join(faults))
    for number, row in enumerate(_parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)):
        try:
            yield _Problem(f"{path.stem}/{number}", *_parse_row(row))
        except ValueError as error:
            raise DataError(f"{path}: row {number}: {error}") from None


def _parse_row(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    prompt, reward_model, data_source = (row.get(column) for column in COLUMNS)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("prompt must be a string or a list of messages with role and content")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") in (None, ""):
        raise ValueError("reward_model.ground_truth is missing")
    if not isinstance(data_source, str):
        raise ValueError("data_source must be a string")
    # Parquet gives every message all keys, absent ones with None, which some chat templates would print.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return messages, str(reward_model["ground_truth"]), data_source


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
        first = next(_jsonl_rows(path), None)
        reward_model = first.get("reward_model") if first else None
        children = list(reward_model) if isinstance(reward_model, dict) else []
        return [*(first or ()), *(f"reward_model.{child}" for child in children)], int(first is not None)
    raise ValueError(f"the file name must end in .parquet or .jsonl, not {path.suffix!r}")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ENCODE_BATCH, columns=list(COLUMNS)):
        yield from batch.to_pylist()


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is not a JSON object")
            yield row


def _task_problems(source: TaskData) -> Iterator[_Problem]:
    try:
        dataset = import_reasoning_gym().create_dataset(
            source.name, size=source.size, seed=source.seed, **source.options
        )
    except (ValueError, TypeError, AssertionError) as error:  # reasoning-gym validates its configs by assert
        raise DataError(f"{_name(source)}: {error}") from None
    for index in range(source.size):
        entry = dataset[index]
        truth = encode_task(
            answer=str(entry["answer"]),
            index=index,
            size=source.size,
            seed=source.seed,
            options=source.options,
        )
        question = [{"role": "user", "content": entry["question"] + TASK_INSTRUCTION}]
        yield _Problem(f"{source.name}/{index}", question, truth, _name(source))


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
        yield _Problem(f"{source.type}/{index}", question, problem.answer, source.type)
