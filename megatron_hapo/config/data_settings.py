"""Settings of prompts and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from megatron_hapo.config.data_sources import (
    ArithmeticData,
    CheckedSumsData,
    EvalData,
    EvalSet,
    FileData,
    TaskData,
    TrainData,
)
from megatron_hapo.config.effects import not_with, only_with
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.scorer_names import BUILT_IN_SCORERS, Scorer, judge_of, judge_scorer
from megatron_hapo.config.section import (
    ONE,
    SEVERAL,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    Section,
    SectionName,
    one_or_several,
)
from megatron_hapo.config.service_settings import JudgeConfig, ServiceConfig

Source = FileData | TaskData | ArithmeticData | CheckedSumsData
"""One source of prompts, in whatever place of the config."""


class CurriculumConfig(Section):
    """Prompts that teach nothing now, because all responses are right or all are wrong, are drawn less often."""

    enabled: bool = False
    """Follow how the prompts are solved during the run."""
    after: Annotated[PositiveInt, only_with("data.curriculum.enabled", True)] = 1
    """Consecutive groups that were solved by all responses or by none, after which a prompt is drawn less often; a
    group that differs resets the count."""
    revisit: Annotated[float, Field(ge=0.01, lt=1), only_with("data.curriculum.enabled", True)] = 0.25
    """Share of the epochs in which such a prompt is still drawn, so that it is noticed when it becomes useful."""


class DataConfig(Section):
    """The prompts; docs/data.md shows examples."""

    train: TrainData
    """Prompts to train on: one source, or several by name, each with a `weight`."""
    eval: EvalData | None = None
    """Prompts to evaluate on: one source, or several sets by name, each with its own sampling. `None`: no
    evaluation."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template. If false, the contents of the messages are concatenated."""
    shuffle: bool = True
    """Shuffle the training prompts of each source in each epoch."""
    curriculum: CurriculumConfig = CurriculumConfig()

    @property
    def train_sources(self) -> dict[str, Source]:
        """The training sources by name; a single one has the empty name."""
        return dict(self.train) if isinstance(self.train, dict) else {"": self.train}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each training source."""
        return {name: getattr(source, "weight", 1.0) for name, source in self.train_sources.items()}

    @property
    def eval_sets(self) -> dict[str, Source]:
        """The evaluation sets by name; a single one has the empty name."""
        if self.eval is None:
            return {}
        return dict(self.eval) if isinstance(self.eval, dict) else {"": self.eval}

    @property
    def sources(self) -> Iterator[tuple[str, Source]]:
        """The key and the settings of each data source."""
        for section, sources in (("data.train", self.train_sources), ("data.eval", self.eval_sets)):
            for name, source in sources.items():
                yield f"{section}.{name}" if name else section, source

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
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class OverlongConfig(Section):
    """DAPO's soft overlong penalty (arXiv:2503.14476, equation 13)."""

    buffer_tokens: NonNegativeInt = 0
    """Length of the zone before rollout.max_response_tokens in which the penalty rises linearly to `factor`; 0: no
    penalty."""
    factor: Annotated[float, Field(gt=0, le=1e6), not_with("reward.overlong.buffer_tokens", 0)] = 1.0
    """Largest penalty."""


class CodeConfig(Section):
    """How programs are tested by the scorer `code`; docs/rewards.md shows the layouts of tests."""

    credit: Literal["all_or_nothing", "share"] = "all_or_nothing"
    """`all_or_nothing`: a program is correct if it passes all tests. `share`: the share of tests that it passes."""
    test_seconds: Seconds = 6.0
    """A test that runs longer has failed. In reward workers, all tests of a program together have
    reward.timeout_seconds."""
    server: ServiceConfig | None = None
    """A sandbox server that runs the tests in place of the reward workers: SandboxFusion, or another one with its POST
    /run_code. `None`: the reward workers."""


class RewardConfig(Section):
    """Rewards, and the processes that compute them; docs/rewards.md shows examples."""

    scorer: Annotated[
        Annotated[Scorer, Tag(ONE)]
        | Annotated[Annotated[tuple[Scorer, ...], Field(min_length=1, max_length=16)], Tag(SEVERAL)],
        Discriminator(one_or_several),
    ] = "auto"
    """`auto`: chosen by the data source. `math`: math-verify. `exact`: the text after the last 'answer' must match.
    `reasoning_gym`: the task's own scorer. `code`: runs the program on the row's tests. judge/NAME: the language
    model of reward.judges.NAME. FILE.py:NAME or MODULE:NAME: a function of your own; the file's path is relative to the
    config file. A list: several, whose weighted sum is the reward; accuracy is the first one's."""
    weights: tuple[Weight, ...] | None = None
    """Weight of each scorer in a list. `None`: 1 each."""
    scorers: dict[str, Scorer] = Field(default_factory=dict)
    """The scorer of each data source by its name, e.g. {openai/gsm8k: math}; other data sources have `scorer`."""
    correct: Reward = 1.0
    """Reward of a correct response, where a built-in scorer or a judge judges alone."""
    wrong: Reward = -1.0
    """Reward of a wrong response there, and of a response that could not be scored."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 2
    """Number of reward processes."""
    timeout_seconds: Seconds = 10.0
    """A response that takes longer to score counts as wrong; its process is replaced."""
    memory_bytes: Annotated[int, Field(ge=128 << 20, le=1 << 50)] = 2 << 30
    """Address space limit of a reward process."""
    allow_unisolated: bool = False
    """Evaluate answers even where the system offers neither user namespaces nor Landlock nor seccomp to confine them. A
    response can then run code with the rights of the user who trains."""
    code: CodeConfig = CodeConfig()
    judges: dict[SectionName, JudgeConfig] = Field(default_factory=dict)
    """Language models behind an endpoint, by name; the scorer judge/NAME asks one."""
    overlong: OverlongConfig = OverlongConfig()

    @property
    def default_scorers(self) -> dict[str, float | None]:
        """The scorers of `scorer` with their weights; a single scorer has none."""
        if isinstance(self.scorer, str):
            return {self.scorer: None}
        return dict(zip(self.scorer, self.weights or (1.0,) * len(self.scorer), strict=False))

    def used_scorers(self, data: DataConfig) -> dict[str, str]:
        """Every scorer that the config names, with the setting that names it."""
        named = dict.fromkeys(self.default_scorers, "reward.scorer")
        named |= {scorer: f"reward.scorers.{source}" for source, scorer in self.scorers.items()}
        for name, source in data.eval_sets.items():
            if isinstance(source, EvalSet) and source.scorer is not None:
                named.setdefault(source.scorer, f"data.eval.{name}.scorer")
        return named

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
        yield from self._weight_faults()
        if self.code != CodeConfig() and "code" not in self.used_scorers(data):
            yield Fault("reward.code", "has no effect: no scorer is code", ("reward.scorer", "reward.scorers"))
        yield from self._judge_faults(data)
        for key, source in data.sources:
            if "reasoning_gym" in self.default_scorers and source.type != "reasoning_gym":
                yield Fault(
                    "reward.scorer",
                    f"reasoning_gym cannot score {key}.type={source.type}; use auto, which chooses by the data source",
                    (f"{key}.type",),
                )

    def _judge_faults(self, data: DataConfig) -> Iterator[Fault]:
        """Judges that no scorer names or that cannot be, and scorers that name no judge."""
        used = self.used_scorers(data)
        for scorer, key in used.items():
            name = judge_of(scorer)
            if name is not None and name not in self.judges:
                known = ", ".join(map(judge_scorer, self.judges)) or "none"
                yield Fault(key, f"{scorer} is no judge of reward.judges; there: {known}", ("reward.judges",))
        for name, judge in self.judges.items():
            key = f"reward.judges.{name}"
            if name in BUILT_IN_SCORERS:
                yield Fault(key, f"must have another name: {name} is a built-in scorer")
            elif judge_scorer(name) not in used:
                yield Fault(
                    key, f"has no effect: no scorer is {judge_scorer(name)}", ("reward.scorer", "reward.scorers")
                )
            yield from judge.contradictions(key)

    def _weight_faults(self) -> Iterator[Fault]:
        """Scorers and weights that do not fit each other."""
        several = () if isinstance(self.scorer, str) else self.scorer
        if len(set(several)) < len(several):
            yield Fault("reward.scorer", "must not name a scorer twice")
        if self.weights is None:
            return
        if not several:
            yield Fault("reward.weights", "has no effect: reward.scorer is not a list", ("reward.scorer",))
        elif len(self.weights) != len(several):
            yield Fault(
                "reward.weights",
                f"must be one for each of the {len(several)} scorers, got {len(self.weights)}",
                ("reward.scorer",),
            )
