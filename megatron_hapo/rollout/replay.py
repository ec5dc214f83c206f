"""The groups of a run's steps, read from the records that it, or another run, has written.

A step's updates follow from its groups, the weights, the settings and the seed; advantages and the trainer's log-probs
and entropies are computed anew. So a run with the same model and settings makes the same updates, and one with another
method learns from the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_hapo.config import Config
from megatron_hapo.data.sampling import SamplerState
from megatron_hapo.errors import DataError
from megatron_hapo.observe.record_schema import FILE_NAME, SCHEMA_VERSION, Origin
from megatron_hapo.observe.view.record_files import RecordFile
from megatron_hapo.rollout.collect import Collected, StageClock
from megatron_hapo.types import FinishReason, KeptTokens, Prompt, Rollout, Sampling, Score, ScoredGroup, ScoringFailure

_SHOWN_STEPS = 5
_SCALARS = (
    "uid", "data_source", "ground_truth", "answer", "reward", "earned", "correctness", "reward_parts", "finish_reason",
    "failure",
)  # fmt: skip
_KEPT = ("kept_lengths", "kept_ids")
_TOKENS = ("temperatures", "rollout_log_probs", "policy_versions")


class _Collection(BaseModel):
    """How the groups of a step were collected."""

    model_config = ConfigDict(extra="ignore", strict=True)

    kept_share: Annotated[float, Field(ge=0, le=1)]
    metrics: dict[str, float]
    prompts: int | dict[str, Any]


class _Job(BaseModel):
    """What the metadata of a step's file must say."""

    model_config = ConfigDict(extra="ignore", strict=True)

    step: int
    num_groups: int
    replayed_routes: bool = False
    temperature: float
    origin: dict[str, str]
    collection: _Collection


class RecordedGroups:
    """GroupSource of a replay: the groups that `config.replay` holds for each step.

    Args:
        origin: of the model that this run starts from.
        vocab_size: of the model.
    """

    def __init__(self, config: Config, origin: Origin, *, vocab_size: int):
        assert config.replay is not None, "replay must name the folder of the records"
        self._config, self._folder, self._origin = config, config.replay, origin
        self._vocab_size = vocab_size
        self._state: SamplerState = 0

    def check(self, *, first_step: int) -> None:
        """Checks that the records can train every step of the run after `first_step`.

        Raises:
            DataError: steps are missing, only part of a step is recorded, or another model or another sampling wrote
                the records; in one line.
        """
        steps = range(first_step + 1, self._config.steps + 1)
        found = {path.name for path in self._folder.glob("step_*.parquet") if FILE_NAME.fullmatch(path.name)}
        missing = [step for step in steps if _file_name(step) not in found]
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN_STEPS])) + (", ..." if len(missing) > _SHOWN_STEPS else "")
            raise DataError(
                f"replay: {self._folder} has no records of {len(missing)} of the steps {steps[0]} to {steps[-1]}: "
                f"{shown}; the recorded run needs record.every=1, and a record.keep and record.max_gigabytes that keep "
                f"all steps, or set steps to at most {missing[0] - 1}"
            )
        for step in steps:
            file = self._file(step)
            self._job(file, step)
            self._check_places(file, file.table(["group", "sample"]))
        if steps:  # what is wrong with the tokens of one step is most likely wrong with all
            self._groups(self._file(steps[0]))

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The recorded groups of this step; how this run would sample is of no importance."""
        with clock("rollout"):
            file = self._file(step)
            job = self._job(file, step)
            groups = self._groups(file)
            self._state = job.collection.prompts
            return Collected(groups=groups, kept_share=job.collection.kept_share, metrics=job.collection.metrics)

    def state(self) -> SamplerState:
        """Of the recorded run's prompts, after the last collected step: a run with engines can continue from it."""
        return self._state

    def settle(self, clock: StageClock) -> None:
        """Nothing is generated."""

    def finished_groups(self) -> dict[str, np.ndarray]:
        """None waits."""
        return {}

    def restore(self, state: SamplerState, finished: Mapping[str, np.ndarray]) -> None:
        """Keeps the state; a step's records are found by its number."""
        self._state = state

    def _file(self, step: int) -> RecordFile:
        return RecordFile(self._folder / _file_name(step))

    def _job(self, file: RecordFile, step: int) -> _Job:
        """The file's metadata.

        Raises:
            DataError: they do not go with this run.
        """
        said = file.job
        if file.version != SCHEMA_VERSION:
            raise DataError(
                f"replay: {file.path} has records of schema {file.version}, which lack what a replay needs; it needs "
                f"schema {SCHEMA_VERSION}: record the run again with this version"
            )
        try:
            job = _Job.model_validate(said)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise DataError(f"replay: the metadata of {file.path} are damaged: {where} is missing or wrong") from None
        if faults := self._faults(job, step):
            raise DataError(f"replay: {file.path} {faults[0]}")
        return job

    def _faults(self, job: _Job, step: int) -> list[str]:
        """Why a file with these metadata cannot be this step of the run."""
        config, faults = self._config, []
        if job.step != step:
            faults.append(f"holds step {job.step}; its name says {step}")
        if job.origin.get("vocabulary") != self._origin.vocabulary:
            faults.append(
                f"was written with the tokens of another tokenizer than that in model.path={config.model.path}"
            )
        elif job.origin.get("model") != self._origin.model:
            faults.append(f"was written by a run that started from another model than model.path={config.model.path}")
        if job.replayed_routes:
            faults.append(
                "was trained on with the engine's choice of experts, which is not recorded; record the run again with "
                "rollout.replay_routes=false"
            )
        if job.temperature != config.rollout.temperature:
            faults.append(
                f"was sampled with rollout.temperature={job.temperature:g}, but this run has "
                f"{config.rollout.temperature:g}; set it to {job.temperature:g}"
            )
        if job.num_groups != config.batch.prompts_per_step:
            faults.append(
                f"is of a step with {job.num_groups} groups, but batch.prompts_per_step is "
                f"{config.batch.prompts_per_step}; set it to {job.num_groups}"
            )
        return faults

    def _groups(self, file: RecordFile) -> list[ScoredGroup]:
        """All groups of a file.

        Raises:
            DataError: there are fewer than the step had, or a row is damaged.
        """
        num_groups, samples = self._config.batch.prompts_per_step, self._config.batch.samples_per_prompt
        table = file.table(["group", "sample", "prompt_ids", "response_ids", *_SCALARS, *_TOKENS, *_KEPT])
        self._check_rows(file, table)
        plain = table.select(list(_SCALARS)).to_pylist()
        if any(part is None or None in part.values() for row in plain for part in row["reward_parts"]):
            raise DataError(f"replay: {file.path}: reward_parts has parts without a name or value")
        tokens = {name: _lists(file, table, name) for name in _TOKENS}
        prompts, responses = (_lists(file, table, name) for name in ("prompt_ids", "response_ids"))
        self._check_tokens(file, prompts, responses, tokens)
        kept = self._kept(file, table, responses)
        groups = []
        for group in range(num_groups):
            rows = range(group * samples, (group + 1) * samples)
            first = plain[rows[0]]
            prompt = Prompt(
                uid=first["uid"], token_ids=prompts[rows[0]], ground_truth=first["ground_truth"],
                data_source=first["data_source"],
            )  # fmt: skip
            rollouts = [
                Rollout(
                    prompt=prompt, response_ids=responses[row], finish_reason=plain[row]["finish_reason"],
                    kept=kept[row], **{name: arrays[row] for name, arrays in tokens.items()},
                ) for row in rows
            ]  # fmt: skip
            groups.append(ScoredGroup(rollouts, [_score(plain[row]) for row in rows]))
        return groups

    def _kept(self, file: RecordFile, table: pa.Table, responses: list[np.ndarray]) -> list[KeptTokens | None]:
        """Of each response, the tokens among which its own were chosen; None where the choice was not cut."""
        if all(table[name].null_count == len(table) for name in _KEPT):
            return [None] * len(table)
        lengths, ids = (_lists(file, table, name) for name in _KEPT)
        for response, kept_lengths, kept_ids in zip(responses, lengths, ids, strict=True):
            sound = (
                len(kept_lengths) == len(response) and kept_lengths.min() > 0 and kept_lengths.sum() == len(kept_ids)
            )
            if not sound or kept_ids.min() < 0 or kept_ids.max() >= self._vocab_size:
                raise DataError(f"replay: {file.path}: kept_lengths and kept_ids do not fit the responses or the model")
        return [KeptTokens(token_ids=own, lengths=counts) for counts, own in zip(lengths, ids, strict=True)]

    def _check_places(self, file: RecordFile, table: pa.Table) -> None:
        """Whether the sorted rows are all responses of all groups of the step."""
        batch = self._config.batch
        recorded = len(set(table["group"].to_pylist()))
        if recorded < batch.prompts_per_step:
            raise DataError(
                f"replay: {file.path} has {recorded} of the step's {batch.prompts_per_step} groups; the recorded run "
                "needs record.groups=null"
            )
        expected = [(g, i) for g in range(batch.prompts_per_step) for i in range(batch.samples_per_prompt)]
        if list(zip(table["group"].to_pylist(), table["sample"].to_pylist(), strict=True)) != expected:
            raise DataError(
                f"replay: {file.path} has {len(table)} responses, but batch.prompts_per_step * "
                f"batch.samples_per_prompt = {batch.prompts_per_step} * {batch.samples_per_prompt}; set them as in the "
                "recorded run"
            )

    def _check_rows(self, file: RecordFile, table: pa.Table) -> None:
        self._check_places(file, table)
        allowed = {"finish_reason": set(get_args(FinishReason)), "failure": {None, *get_args(ScoringFailure)}}
        for name, values in allowed.items():
            if wrong := set(table[name].to_pylist()) - values:
                raise DataError(f"replay: {file.path}: {name} has the unknown value {wrong.pop()!r}")
        for name in ("uid", "data_source", "ground_truth", "reward", "correctness", "reward_parts"):
            if table[name].null_count:
                raise DataError(f"replay: {file.path}: {name} is missing in some rows")
        for name in ("reward", "correctness"):
            if not np.isfinite(table[name].to_numpy()).all():
                raise DataError(f"replay: {file.path}: {name} is not finite in some rows")

    def _check_tokens(
        self,
        file: RecordFile,
        prompts: list[np.ndarray],
        responses: list[np.ndarray],
        tokens: dict[str, list[np.ndarray]],
    ) -> None:
        rollout = self._config.rollout
        lengths = list(map(len, responses))
        for name, arrays in tokens.items():
            if list(map(len, arrays)) != lengths:
                raise DataError(f"replay: {file.path}: {name} has another number of values than a response has tokens")
        for what, arrays, key, longest in (
            ("prompt", prompts, "rollout.max_prompt_tokens", rollout.max_prompt_tokens),
            ("response", responses, "rollout.max_response_tokens", rollout.max_response_tokens),
        ):
            if (most := max(map(len, arrays))) > longest:
                raise DataError(f"replay: {file.path} has a {what} of {most} tokens, but {key} is {longest}; raise it")
            if not min(map(len, arrays)):
                raise DataError(f"replay: {file.path} has a {what} without tokens")
            ids = np.concatenate(arrays)
            if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
                raise DataError(f"replay: {file.path} has token ids that the model, of {self._vocab_size}, lacks")
        for name in ("temperatures", "rollout_log_probs"):
            if not np.isfinite(np.concatenate(tokens[name])).all():
                raise DataError(f"replay: {file.path}: {name} is not finite in some rows")


def _file_name(step: int) -> str:
    return f"step_{step:08d}.parquet"


def _score(row: dict[str, Any]) -> Score:
    return Score(
        reward=row["reward"], correctness=row["correctness"], failure=row["failure"], answer=row["answer"],
        earned=row["earned"], parts={part["name"]: part["value"] for part in row["reward_parts"]},
    )  # fmt: skip


def _lists(file: RecordFile, table: pa.Table, name: str) -> list[np.ndarray]:
    """The array of each row."""
    column = table[name].combine_chunks()
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"replay: {file.path}: {name} is missing in some rows")
    ends = np.cumsum(np.asarray(column.value_lengths()))
    return np.split(np.asarray(values), ends[:-1])
