"""The order in which training sees its prompts: epochs of each source, weights between sources, a curriculum.

What is drawn depends only on the seed and on a small state, which a checkpoint holds as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from megatron_hapo.config import CurriculumConfig
from megatron_hapo.errors import DataError
from megatron_hapo.types import Prompt, ScoredGroup

SamplerState = int | Mapping[str, Any]
"""What a checkpoint holds of a sampler, as JSON."""


class PromptSource(Protocol):
    """An endless sequence of prompts."""

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        ...

    def record(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes note of how prompts that were drawn have been solved."""
        ...

    def state(self) -> SamplerState:
        """Where the sequence stands, for `restore`; it does not change any more."""
        ...

    def restore(self, state: SamplerState) -> None:
        """Continue from the state of a source that had the same prompts and seed."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the prompts that were drawn and recorded since the last call."""
        ...


class PromptSampler:
    """An endless sequence of prompts, permuted anew in each epoch.

    A batch never contains a prompt twice unless it is larger than the set of prompts; each repetition then gets its own
    uid, so that it is given different responses. With shuffling, the prompts at the end of an epoch that do not fill a
    batch are therefore skipped; without shuffling, the batch continues at the beginning.

    With a curriculum, a prompt whose last groups were all solved completely or not at all is left out of most epochs.
    A batch then continues in the next epoch, without the prompts that it already has.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, curriculum: CurriculumConfig | None = None
    ):
        if not prompts:
            raise DataError("no prompts to sample from")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._curriculum = curriculum if curriculum is not None and curriculum.enabled else None
        self._position = 0
        self._unvaried: dict[str, int] = {}
        """By uid: the number of its last groups that were solved by all responses or by none; absent: 0."""
        self._order = (-1, np.zeros(0, dtype=np.int64))
        self._draws = (-1, np.zeros(0))

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        rows = self._next_rows(count) if self._curriculum is None else self._next_useful_rows(count, self._curriculum)
        times: Counter[int] = Counter()
        prompts = []
        for row in rows:
            prompt, again = self._prompts[row], times[row]
            prompts.append(replace(prompt, uid=f"{prompt.uid}#{again}") if again else prompt)
            times[row] += 1
        return prompts

    def record(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes note of how prompts that were drawn have been solved; without a curriculum nothing is kept."""
        if self._curriculum is None:
            return
        for group in groups:
            uid = _uid_in_set(group)
            if group.informative:
                self._unvaried.pop(uid, None)
            else:
                self._unvaried[uid] = self._unvaried.get(uid, 0) + 1

    def state(self) -> SamplerState:
        """Position in the sequence; with a curriculum also what is known of the prompts."""
        if self._curriculum is None:
            return self._position
        return {"position": self._position, "unvaried": dict(self._unvaried)}

    def restore(self, state: SamplerState) -> None:
        """Continue from the state of a sampler that had the same prompts and seed.

        The state of one without a curriculum says nothing of the prompts; that of a mixture belongs to other data, and
        the sequence begins anew.
        """
        if isinstance(state, int):
            self._position, self._unvaried = state, {}
        else:
            self._position, self._unvaried = int(state.get("position", 0)), dict(state.get("unvaried", {}))

    def metrics(self) -> dict[str, float]:
        """With a curriculum, the share of the prompts that are drawn less often now."""
        if self._curriculum is None:
            return {}
        rare = sum(times >= self._curriculum.after for times in self._unvaried.values())
        return {"curriculum/rare_share": rare / len(self._prompts)}

    def _next_rows(self, count: int) -> list[int]:
        size = len(self._prompts)
        if self._shuffle and count <= size < self._position % size + count:
            self._position += -self._position % size
        positions = range(self._position, self._position + count)
        self._position += count
        return [self._row(position) for position in positions]

    def _next_useful_rows(self, count: int, curriculum: CurriculumConfig) -> list[int]:
        """The next rows that are due, each once; once all are in the batch, each a second time, and so on."""
        rows: list[int] = []
        taken: set[int] = set()
        while len(rows) < count:
            row = self._row(self._position)
            if row not in taken and self._is_due(row, curriculum):
                rows.append(row)
                taken.add(row)
                if len(taken) == len(self._prompts):
                    taken.clear()
            self._position += 1
        return rows

    def _is_due(self, row: int, curriculum: CurriculumConfig) -> bool:
        """Whether the epoch of the current position has this row."""
        if self._unvaried.get(self._prompts[row].uid, 0) < curriculum.after:
            return True
        epoch = self._position // len(self._prompts)
        if self._draws[0] != epoch:
            # The third number sets these draws apart from the permutation of the same epoch.
            generator = np.random.default_rng([self._seed % 2**64, epoch, 1])
            self._draws = (epoch, generator.random(len(self._prompts)))
        return bool(self._draws[1][row] < curriculum.revisit)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._prompts))
        if not self._shuffle:
            return offset
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed % 2**64, epoch])
            self._order = (epoch, generator.permutation(len(self._prompts)))
        return int(self._order[1][offset])


def _uid_in_set(group: ScoredGroup) -> str:
    """The uid of a group's prompt without the number of its repetition in the batch."""
    file, _, row = group.rollouts[0].prompt.uid.rpartition("/")
    return f"{file}/{row.partition('#')[0]}"


class PromptMixture:
    """An endless sequence that takes from several samplers in proportion to their weights.

    The next prompt is always taken from the source whose share is furthest behind. A batch thus has the same
    composition every time, up to rounding, and each source has epochs of its own.

    Args:
        samplers: by name; the prompts of each have the uids NAME/UID.
        weights: by name; their sum is of no importance.
    """

    def __init__(self, samplers: Mapping[str, PromptSampler], weights: Mapping[str, float]):
        self._samplers = dict(samplers)
        total = sum(Fraction(weights[name]) for name in samplers)
        self._shares = {name: Fraction(weights[name]) / total for name in samplers}
        self._taken = dict.fromkeys(self._samplers, 0)
        self._solved: dict[str, list[bool]] = {}
        """By source: which responses were correct, since the metrics were last read."""

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        names = [self._next_name() for _ in range(count)]
        prompts = {name: iter(self._samplers[name].next(number)) for name, number in Counter(names).items()}
        return [next(prompts[name]) for name in names]

    def record(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes note of how prompts that were drawn have been solved."""
        for name, sampler in self._samplers.items():
            ours = [group for group in groups if group.rollouts[0].prompt.uid.startswith(f"{name}/")]
            self._solved.setdefault(name, []).extend(score.correct for group in ours for score in group.scores)
            sampler.record(ours)

    def state(self) -> SamplerState:
        """How many prompts each source has given, and its own state."""
        return {
            "taken": dict(self._taken),
            "sources": {name: sampler.state() for name, sampler in self._samplers.items()},
        }

    def restore(self, state: SamplerState) -> None:
        """Continue from the state of a mixture of the same sources. A source that it did not have begins anew, and so
        do the shares if the sources are others."""
        known = state if isinstance(state, Mapping) else {}
        sources, taken = known.get("sources", {}), known.get("taken", {})
        for name, sampler in self._samplers.items():
            sampler.restore(sources.get(name, 0))
        same = taken.keys() == self._samplers.keys()
        self._taken = {name: int(taken[name]) if same else 0 for name in self._samplers}

    def metrics(self) -> dict[str, float]:
        """The accuracy of each source since the last call, and the means of the sources' metrics by their shares."""
        solved, self._solved = self._solved, {}
        accuracy = {f"source/{name}/accuracy": sum(right) / len(right) for name, right in solved.items() if right}
        parts = {name: sampler.metrics() for name, sampler in self._samplers.items()}
        names = dict.fromkeys(metric for part in parts.values() for metric in part)
        means = {metric: float(sum(self._shares[n] * Fraction(parts[n][metric]) for n in parts)) for metric in names}
        return accuracy | means

    def _next_name(self) -> str:
        # Fractions: rounding would make the choice depend on the order of additions.
        number = sum(self._taken.values()) + 1
        name = max(self._samplers, key=lambda name: self._shares[name] * number - self._taken[name])
        self._taken[name] += 1
        return name
