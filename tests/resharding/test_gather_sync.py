"""Weight syncs by whole tensors, when engines or trainer ranks die: without processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_hapo.errors import RankDiedError, WeightSyncError
from megatron_hapo.weight_sync import GatherSync

BUCKETS = ["first", "second", "third"]


class Ranks:
    """Trainer ranks that yield all buckets; `dies_at` is the bucket before which one dies."""

    def __init__(self, dies_at: str = ""):
        self.dies_at = dies_at
        self.verified: list[bool] = []
        self.delivered: list[str] = []

    def weight_buckets(self, *, verify: bool) -> Iterator[str]:
        self.verified.append(verify)
        for bucket in BUCKETS:
            if bucket == self.dies_at:
                raise RankDiedError("weight_buckets: trainer rank 0: the process died")
            self.delivered.append(bucket)
            yield bucket


class Engines:
    """Two engines, of which one dies at each of the second buckets that `deaths` counts."""

    def __init__(self, deaths: int):
        self.deaths, self.is_dead, self.version = deaths, False, 0
        self.new_engines: list[int] = []
        self.loaded: list[str] = []

    def broadcast(self, verb: Callable[..., Any], *arguments: Any) -> None:
        if verb.__name__ == "begin_weight_update":
            self.loaded = []
            return
        assert verb.__name__ == "load_bucket"
        if arguments == ("second",) and self.deaths:
            self.deaths, self.is_dead = self.deaths - 1, True
            raise WeightSyncError("load_bucket: engine 1: the process died")
        self.loaded += arguments

    def replace_dead_engines(self, *, patience_seconds: float) -> list[int]:
        replaced, self.is_dead = ([1] if self.is_dead else []), False
        self.new_engines += replaced
        return replaced

    @contextmanager
    def weight_update(self, *, policy_version: int) -> Iterator[None]:
        yield
        self.version, self.new_engines = policy_version, []


def make_sync(ranks: Any, engines: Any) -> GatherSync:
    sync = GatherSync(ranks, engines, num_engines=2, verify_every=1000)
    sync.sync(policy_version=1)
    return sync


@pytest.mark.parametrize("deaths", [1, 2])
def test_an_engine_that_dies_is_replaced_and_all_receive_everything_again_verified(deaths: int) -> None:
    ranks, engines = Ranks(), Engines(0)
    sync = make_sync(ranks, engines)
    engines.deaths = deaths
    sync.sync(policy_version=2)
    assert engines.version == 2
    assert engines.loaded == BUCKETS
    assert ranks.verified == [True, False] + [True] * deaths  # the first sync, and whenever engines are new
    assert ranks.delivered == BUCKETS * (2 + deaths)  # a failed attempt takes the rest, so that ranks are free again


def test_engines_that_keep_dying_end_the_run() -> None:
    ranks, engines = Ranks(), Engines(0)
    sync = make_sync(ranks, engines)
    engines.deaths = 99
    with pytest.raises(WeightSyncError, match="engine 1: the process died"):
        sync.sync(policy_version=2)
    assert engines.deaths == 96
    assert engines.version == 1


def test_the_death_of_a_rank_replaces_no_engine() -> None:
    ranks, engines = Ranks(), Engines(0)
    sync = make_sync(ranks, engines)
    ranks.dies_at = "third"
    with pytest.raises(RankDiedError, match="trainer rank 0"):
        sync.sync(policy_version=2)
    assert engines.new_engines == []
