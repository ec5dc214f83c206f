"""What a setting that was changed between a checkpoint and the run that resumes from it does: nothing is ignored.

A checkpoint restores weights, optimizer state, the position in the prompts, the entropy statistics of the last step,
the state of the method's controllers, a reference model that was replaced, and groups that wait to be trained on (these
only if they would be sampled and scored the same way now). Everything else is read from the
settings of the resumed run, so a change has its effect from the next step on. Settings that the restored state embodies
are refused instead.
`tests/config/test_resumption.py` holds the table to the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from megatron_hapo.config.effects import declared_conditions
from megatron_hapo.config.section import is_named
from megatron_hapo.config.settings import Config

OnResume = Literal["effective", "refused", "irrelevant"]
"""`effective`: the new value holds from the next step on. `refused`: the run does not start. `irrelevant`: the setting
does not change what the run computes, or names the run."""

ON_RESUME: Mapping[str, OnResume] = {
    # ----- names of the run; with another name there is nothing to resume
    "name": "irrelevant",
    "output_dir": "irrelevant",
    # ----- the run
    "seed": "effective",  # of prompts, mini-batches and samples still to come
    # Fewer than the checkpoint has are refused (`refusals`). A schedule of the learning rate then follows the curve
    # over the new number of steps, where its rate may jump.
    "steps": "effective",
    "device": "effective",
    "deterministic": "effective",
    "replay": "effective",  # a run may continue from records, and one from records with engines
    "placement": "effective",
    # ----- what the restored state embodies
    "model.path": "irrelevant",  # a moved folder; that it holds the same model is checked (checkpoint.run_checkpoints)
    "trainer.dtype": "refused",
    "trainer.distributed_optimizer": "refused",
    # ----- checkpoints load at any layout
    "model.spec": "effective",
    **dict.fromkeys(
        (
            *(
                "parallel.tp",
                "parallel.pp",
                "parallel.vpp",
                "parallel.cp",
                "parallel.dp",
                "parallel.ep",
                "parallel.etp",
            ),
            *("parallel.first_stage_layers", "parallel.last_stage_layers", "parallel.sequence_parallel"),
        ),
        "effective",
    ),
    "parallel.gpu_memory": "irrelevant",  # of the check before the start
    # ----- how a rank computes
    **dict.fromkeys(
        (
            *("trainer.max_tokens_per_microbatch", "trainer.overlap_communication", "trainer.recompute"),
            *("trainer.output_head", "trainer.float32_logits", "trainer.quantization", "trainer.timeout_seconds"),
        ),
        "effective",
    ),
    # ----- the optimizer: its parameter groups get the settings again after a load (checkpoint.resumable)
    **dict.fromkeys(
        (
            *("optimizer.lr", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2"),
            *("optimizer.eps", "optimizer.clip_grad", "optimizer.cpu_offload"),
            *("optimizer.schedule", "optimizer.min_lr", "optimizer.decay_steps"),
        ),
        "effective",
    ),
    "batch.prompts_per_step": "effective",
    "batch.samples_per_prompt": "effective",
    "batch.prompts_per_minibatch": "effective",
    # ----- sections that no restored state depends on
    "rollout.*": "effective",
    "algorithm.*": "effective",  # the last step's statistics, by the old settings, steer one more step's sampling
    "dynamic_sampling.*": "effective",
    "async.*": "effective",
    "data.*": "effective",  # the next prompts are those of the new data, at the same position
    "reward.*": "effective",
    "eval.*": "effective",
    "checkpoint.*": "effective",
    "weight_sync.*": "effective",
    "memory_turns.*": "effective",
    "launch.*": "effective",
    "metrics.*": "effective",
    "record.*": "effective",
    "profile.*": "effective",
}
"""By dotted key, or by section. Sections whose values could reach the restored state list each setting."""

_WHY_REFUSED = {
    "trainer.dtype": "the optimizer state of one data type cannot be loaded into the other's",
    "trainer.distributed_optimizer": "the optimizer state is stored in another form",
}


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from the one that the checkpoint was written with."""

    key: str
    before: Any
    now: Any
    on_resume: OnResume

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.before)} -> {_text(self.now)}"


def setting_keys(schema: type[BaseModel] = Config) -> list[str]:
    """The dotted keys of all settings, each once."""
    return list(dict.fromkeys(key for key, _ in declared_conditions(schema)))


def on_resume(key: str) -> OnResume:
    """What a change of this setting does.

    Raises:
        KeyError: the table does not say.
    """
    return ON_RESUME[key] if key in ON_RESUME else ON_RESUME[f"{key.partition('.')[0]}.*"]


def changed_settings(before: Mapping[str, Any], config: Config) -> list[Change]:
    """The settings that differ from those of a checkpoint, as `config.model_dump(mode="json")` wrote them.

    Settings that the version which wrote the checkpoint did not have are left out.
    """
    now = config.model_dump(mode="json")
    changes = []
    for key in setting_keys():
        old, new = _find(before, key), _find(now, key)
        if old is not _ABSENT and old != (None if new is _ABSENT else new):
            changes.append(Change(key, old, None if new is _ABSENT else new, on_resume(key)))
        elif old is _ABSENT and new is not _ABSENT and _is_inside_choice(before, key):
            changes.append(Change(key, None, new, on_resume(key)))
    for key in ("data.train", "data.eval"):
        changes += _changes_of_named(key, _find(before, key), _find(now, key))
    return changes


def _changes_of_named(key: str, before: Any, now: Any) -> Iterator[Change]:
    """The changed settings of the named sections under a key; none if there is a single section both times."""
    if is_named(before) or is_named(now):
        old, new = _flat(before, key), _flat(now, key)
        for changed in dict.fromkeys((*old, *new)):
            if old.get(changed) != new.get(changed):
                yield Change(changed, old.get(changed), new.get(changed), on_resume(key))


def _flat(value: Any, key: str) -> dict[str, Any]:
    """The values of nested sections by their dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    return {inner: leaf for name, section in value.items() for inner, leaf in _flat(section, f"{key}.{name}").items()}


def refusals(changes: list[Change], config: Config, *, step: int, checkpoint: object) -> list[str]:
    """Why the run cannot resume from a checkpoint of this step with these changes; each line names both values."""
    faults = [
        f"{change.key}: is {_text(change.now)}, but {checkpoint} was written with {_text(change.before)}, and "
        f"{_WHY_REFUSED[change.key]}; set it back, or start over with checkpoint.resume=false"
        for change in changes
        if change.on_resume == "refused"
    ]
    if config.steps < step:
        faults.append(
            f"steps: is {config.steps}, but {checkpoint} has made {step} steps; set it to at least {step}, or start "
            "over with checkpoint.resume=false"
        )
    return faults


_ABSENT = object()


def _find(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _is_inside_choice(settings: Mapping[str, Any], key: str) -> bool:
    """Whether the key is of a section chosen by its `type`, which was another one or none before."""
    section = _find(settings, key.rpartition(".")[0])
    return section is None or (isinstance(section, Mapping) and "type" in section) or key.startswith("data.eval.")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "not set" if value is None else str(value)
