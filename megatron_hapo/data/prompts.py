"""The prompts of data sources, tokenized. Does not import torch itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_hapo.config import Source
from megatron_hapo.data.chat_template import Rendered, render_chat_template
from megatron_hapo.data.problems import Message, Problem, problems, source_name
from megatron_hapo.data.rows import BATCH_ROWS, InvalidRow
from megatron_hapo.errors import DataError, one_line
from megatron_hapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 5


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


def load_tokenizer(path: Path | str, *, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model folder. Code in the folder is never run.

    Args:
        vocab_size: the model's, which must have the tokenizer's tokens; None: not compared.
    Raises:
        DataError: damaged files, or a tokenizer of another model.
    """
    from transformers import AutoTokenizer  # imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if type(tokenizer.model_max_length) not in (int, float):
            raise TypeError(f"model_max_length must be a number, not a {type(tokenizer.model_max_length).__name__}")
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # Damaged files raise whatever the parsers run into; a panic in Rust is a BaseException.
    except BaseException as error:
        raise DataError(
            f"model.path: the tokenizer in {path} cannot be loaded from its files (tokenizer.json, "
            f"tokenizer_config.json, ...): {type(error).__name__}: {one_line(error)[:300]}"
        ) from error
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size=vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> None:
    """Checks that the model has the tokenizer's tokens; some models lack one that was added to it, e.g. for padding.

    Args:
        vocab_size: the model's.
    Raises:
        DataError: an ordinary token is missing, or the one that ends a response.
    """
    fault = None
    if tokenizer.vocab_size > vocab_size:
        fault = f"has {tokenizer.vocab_size} tokens, but the model {vocab_size}"
    elif isinstance(tokenizer.eos_token_id, int) and tokenizer.eos_token_id >= vocab_size:
        fault = f"ends responses with token {tokenizer.eos_token_id}, but the model's last one is {vocab_size - 1}"
    if fault is not None:
        raise DataError(
            f"model.path: the tokenizer {fault} (vocab_size in its config.json): they are of different models"
        )


def load_prompts(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool, max_prompt_tokens: int
) -> PromptSet:
    """The prompts of a data source, tokenized. Invalid rows, and prompts of more than `max_prompt_tokens`, are dropped:
    a warning states their number and the reasons, each with the first row that it holds for.

    Raises:
        DataError: no prompt is left, or the data or the chat template cannot be used at all.
    """
    prompts: list[Prompt] = []
    invalid: list[InvalidRow] = []
    num_rows = num_too_long = 0
    for chunk in batched(problems(source), BATCH_ROWS):
        num_rows += len(chunk)
        invalid += [row for row in chunk if isinstance(row, InvalidRow)]
        valid = [row for row in chunk if isinstance(row, Problem)]
        encoded = _encode_valid([p.messages for p in valid], tokenizer, chat_template=chat_template)
        for problem, token_ids in zip(valid, encoded, strict=True):
            if isinstance(token_ids, str):
                invalid.append(InvalidRow(problem.row, token_ids))
            elif not token_ids:
                invalid.append(InvalidRow(problem.row, "the prompt is empty after tokenization"))
            elif len(token_ids) > max_prompt_tokens:
                num_too_long += 1
            else:
                prompts.append(_prompt(problem, token_ids))
    name = source_name(source)
    if num_rows == 0:
        raise DataError(f"{name} has no rows")
    dropped = []
    if invalid:
        dropped.append(f"{len(invalid)} of {num_rows} rows are invalid ({_reasons(invalid)})")
    if num_too_long:
        dropped.append(
            f"{num_too_long} of {num_rows} prompts are longer than rollout.max_prompt_tokens={max_prompt_tokens}"
        )
    if not prompts:
        raise DataError(f"{name}: {'; '.join(dropped)}; no prompt is left")
    for reason in dropped:
        logger.warning("%s: %s and were dropped", name, reason)
    logger.info("%s: %d prompts", name, len(prompts))
    return PromptSet(prompts, num_too_long, len(invalid))


def _prompt(problem: Problem, token_ids: Sequence[int]) -> Prompt:
    return Prompt(
        uid=problem.uid,
        token_ids=np.array(token_ids, dtype=np.int32),
        ground_truth=problem.ground_truth,
        data_source=problem.data_source,
        columns=problem.columns,
        question=problem.messages[-1]["content"],
    )


def _reasons(invalid: Sequence[InvalidRow]) -> str:
    """Each reason with the first row that it holds for and the number of rows, the most frequent first."""
    rows: dict[str, list[str]] = {}
    for row in invalid:
        rows.setdefault(row.reason, []).append(row.row)
    by_count = sorted(rows.items(), key=lambda item: -len(item[1]))
    texts = [
        f"{names[0]}: {reason}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        for reason, names in by_count[:_SHOWN_REASONS]
    ]
    others = len(by_count) - _SHOWN_REASONS
    return "; ".join([*texts, f"{others} other reasons"] if others > 0 else texts)


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
