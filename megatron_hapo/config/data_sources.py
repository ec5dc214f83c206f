"""Settings of where prompts come from: one source, a mixture of named ones, or named sets for evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from megatron_hapo.config.scorer_names import Scorer
from megatron_hapo.config.section import (
    NAMED,
    ONE,
    SEVERAL,
    Examples,
    FilePath,
    PositiveInt,
    Section,
    SectionName,
    Seed,
    one_or_named,
    one_or_several,
)


def _with_placeholder(template: str) -> str:
    if "{prompt}" not in template:
        raise PydanticCustomError("template", "must contain {prompt}, where the row's prompt is inserted")
    return template


def pattern_with_group(pattern: str) -> str:
    """The validator of a regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError):
        raise PydanticCustomError("pattern", "must be a regular expression") from None
    if groups != 1:
        raise PydanticCustomError("pattern", "must be a regular expression with one group, for what is looked for")
    return pattern


class PromptText(Section):
    """How a problem becomes a prompt."""

    system_prompt: str | None = None
    """System message at the start of every prompt, in place of the row's own. `None`: the row's own, if it has one."""
    prompt_template: Annotated[str, AfterValidator(_with_placeholder)] | None = None
    """Text of the user's last message: {prompt} stands for the row's, {NAME} for the text of any other column; other
    braces stay as they are. `None`: the row's as it is."""


class ColumnsConfig(Section):
    """Which columns of a file hold what. A dot leads into a nested column, e.g. reward_model.ground_truth."""

    prompt: str = "prompt"
    """The problem: a string, or a list of messages with role and content."""
    answer: str | None = None
    """The ground truth: a string or a number. `None`: reward_model.ground_truth if there is a column reward_model, else
    answer."""
    data_source: str | None = None
    """Name that selects the scorer. `None`: data_source, or none if there is no such column."""


class FileData(PromptText):
    """Prompts from files."""

    type: Literal["file"]
    """`file`: prompts from files or from the Hugging Face Hub."""
    path: Annotated[
        Annotated[FilePath, Tag(ONE)]
        | Annotated[Annotated[tuple[FilePath, ...], Field(min_length=1, max_length=10_000)], Tag(SEVERAL)],
        Discriminator(one_or_several),
    ]
    """A file (.parquet, .jsonl, .json or .csv), or a list of files, one after another; or a data set on the Hub as
    hf:ORG/NAME, hf:ORG/NAME/CONFIG@REVISION:SPLIT (revision main and split train unless given), or a folder of one as
    hf:./FOLDER:SPLIT. Rows that cannot be used are dropped, counted and reported with their reasons."""
    columns: ColumnsConfig = ColumnsConfig()
    answer_pattern: Annotated[str, AfterValidator(pattern_with_group)] | None = None
    r"""Regular expression that is searched in the answer's text; its group is the ground truth, e.g. '#### (.+)' for
    GSM8K. Rows without a match are dropped. `None`: the whole text."""
    data_source: Annotated[str, Field(min_length=1)] | None = None
    """Name that selects the scorer, for all rows. `None`: the column's, else the name of the file."""
    limit: PositiveInt | None = None
    """Use only this many rows, from the start. `None`: all."""

    @property
    def paths(self) -> tuple[Any, ...]:
        """The files, in their order."""
        return self.path if isinstance(self.path, tuple) else (self.path,)


class TaskData(PromptText):
    """Prompts from a task of reasoning-gym."""

    type: Literal["reasoning_gym"]
    """`reasoning_gym`: prompts from a task of reasoning-gym."""
    name: str
    """A dataset of reasoning-gym, e.g. chain_sum."""
    size: Examples
    """Number of prompts."""
    seed: Seed = 0
    """Seed of the prompts."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the dataset, e.g. {min_terms: 2, max_terms: 4}."""


class ArithmeticData(PromptText):
    """Generated sums."""

    type: Literal["arithmetic"]
    """`arithmetic`: generated sums."""
    size: Examples
    """Number of prompts."""
    seed: Seed = 0
    """Seed of the prompts."""
    min_terms: Annotated[int, Field(ge=2, le=1000)] = 3
    """Fewest terms of a sum."""
    max_terms: Annotated[int, Field(ge=2, le=1000)] = 5
    """Most terms of a sum."""
    max_number: Annotated[int, Field(gt=0, le=10**9)] = 9
    """Largest term of a sum."""


class CheckedSumsData(PromptText):
    """Generated sums that are checked and tried again: a small task on which the entropy of tokens matters."""

    type: Literal["checked_sums"]
    """`checked_sums`: generated sums for a model that checks its own totals."""
    size: Annotated[Examples, Field(le=10_000)]
    """Number of prompts."""
    seed: Seed = 0
    """Seed of the prompts."""


DataSource = Annotated[FileData | TaskData | ArithmeticData | CheckedSumsData, Field(discriminator="type")]


class _Share(Section):
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of this source in the prompts of a step, relative to the other sources' weights."""


class MixedFile(FileData, _Share):
    """Files in a mixture."""


class MixedTask(TaskData, _Share):
    """A task in a mixture."""


class MixedArithmetic(ArithmeticData, _Share):
    """Sums in a mixture."""


class MixedCheckedSums(CheckedSumsData, _Share):
    """Checked sums in a mixture."""


class EvalSet(Section):
    """How a named evaluation set is sampled and scored. What is not set is as `eval` and `rollout` say."""

    samples: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    """Responses to each prompt. `None`: eval.samples."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """Sampling temperature; 0 is greedy. `None`: eval.temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens whose probabilities add up to this. `None`: eval.top_p."""
    max_response_tokens: PositiveInt | None = None
    """Longer responses are truncated. `None`: rollout.max_response_tokens, which is also the most."""
    scorer: Scorer | None = None
    """The set's scorer, as in reward.scorer. `None`: reward.scorer."""


class EvalFile(FileData, EvalSet):
    """An evaluation set from files."""


class EvalTask(TaskData, EvalSet):
    """An evaluation set from a task."""


class EvalArithmetic(ArithmeticData, EvalSet):
    """An evaluation set of sums."""


class EvalCheckedSums(CheckedSumsData, EvalSet):
    """An evaluation set of checked sums."""


_Mixed = Annotated[MixedFile | MixedTask | MixedArithmetic | MixedCheckedSums, Field(discriminator="type")]
_EvalSet = Annotated[EvalFile | EvalTask | EvalArithmetic | EvalCheckedSums, Field(discriminator="type")]

TrainData = Annotated[
    Annotated[DataSource, Tag(ONE)] | Annotated[dict[SectionName, _Mixed], Tag(NAMED)], Discriminator(one_or_named)
]
EvalData = Annotated[
    Annotated[DataSource, Tag(ONE)] | Annotated[dict[SectionName, _EvalSet], Tag(NAMED)], Discriminator(one_or_named)
]
