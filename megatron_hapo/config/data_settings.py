"""Settings of prompts and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_hapo.config.effects import not_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import Examples, FilePath, NonNegativeInt, PositiveInt, Seconds, Section, Seed


class FileData(Section):
    """Prompts from a file."""

    type: Literal["file"]
    """`file`: prompts from a file."""
    path: FilePath
    """Parquet or JSONL in the DAPO-Math layout: prompt (messages), reward_model.ground_truth (a string or a number),
    data_source. Rows that cannot be used are dropped, counted and reported with the reason for the first."""
    limit: PositiveInt | None = None
    """Use only this many rows, from the start. `None`: all."""


class TaskData(Section):
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


class ArithmeticData(Section):
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


DataSource = Annotated[FileData | TaskData | ArithmeticData, Field(discriminator="type")]


class DataConfig(Section):
    """The prompts."""

    train: DataSource
    """Prompts to train on."""
    eval: DataSource | None = None
    """Prompts to evaluate on. `None`: no evaluation."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template. If false, the contents of the messages are concatenated."""
    shuffle: bool = True
    """Shuffle the training prompts in each epoch."""

    @property
    def sources(self) -> Iterator[tuple[str, FileData | TaskData | ArithmeticData]]:
        """The key and the settings of each data source."""
        yield "data.train", self.train
        if self.eval is not None:
            yield "data.eval", self.eval

    def contradictions(self) -> Iterator[Fault]:
        """Settings of a data source that do not fit each other."""
        for key, source in self.sources:
            if isinstance(source, ArithmeticData) and source.min_terms > source.max_terms:
                yield Fault(
                    f"{key}.min_terms",
                    f"must be at most {key}.max_terms={source.max_terms}, got {source.min_terms}",
                    (f"{key}.max_terms",),
                )


Reward = Annotated[float, Field(ge=-1e6, le=1e6)]


class OverlongConfig(Section):
    """DAPO's soft overlong penalty (arXiv:2503.14476, equation 13)."""

    buffer_tokens: NonNegativeInt = 0
    """Length of the zone before rollout.max_response_tokens in which the penalty rises linearly to `factor`; 0: no
    penalty."""
    factor: Annotated[float, Field(gt=0, le=1e6), not_with("reward.overlong.buffer_tokens", 0)] = 1.0
    """Largest penalty."""


class RewardConfig(Section):
    """Rewards, and the processes that compute them."""

    scorer: Literal["auto", "math", "exact", "reasoning_gym"] = "auto"
    """`auto`: chosen by the data source. `math`: math-verify. `exact`: the text after the last 'answer' must match.
    `reasoning_gym`: the task's own scorer."""
    correct: Reward = 1.0
    """Reward of a correct response."""
    wrong: Reward = -1.0
    """Reward of a wrong response."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 2
    """Number of reward processes."""
    timeout_seconds: Seconds = 10.0
    """A response that takes longer to score counts as wrong; its process is replaced."""
    memory_bytes: Annotated[int, Field(ge=128 << 20, le=1 << 50)] = 2 << 30
    """Address space limit of a reward process."""
    allow_unisolated: bool = False
    """Evaluate answers even where the system offers neither user namespaces nor Landlock nor seccomp to confine them. A
    response can then run code with the rights of the user who trains."""
    overlong: OverlongConfig = OverlongConfig()

    def contradictions(self, *, max_response_tokens: int, data: DataConfig) -> Iterator[Fault]:
        """Rewards that do not fit each other, the longest response or the data."""
        if self.overlong.buffer_tokens >= max_response_tokens:
            yield Fault(
                "reward.overlong.buffer_tokens",
                f"must be less than rollout.max_response_tokens={max_response_tokens}, "
                f"got {self.overlong.buffer_tokens}",
                ("rollout.max_response_tokens",),
            )
        if self.correct <= self.wrong:
            yield Fault(
                "reward.correct",
                f"must be greater than reward.wrong={self.wrong}, got {self.correct}",
                ("reward.wrong",),
            )
        for key, source in data.sources:
            if self.scorer == "reasoning_gym" and source.type != "reasoning_gym":
                yield Fault(
                    "reward.scorer",
                    f"reasoning_gym cannot score {key}.type={source.type}; use auto, which chooses by the data source",
                    (f"{key}.type",),
                )
