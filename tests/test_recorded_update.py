"""The driver's recorded update: values of scattered mini-batches come back in the order of the step's batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from megatron_hapo.driver import Driver
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.types import TrainBatch, pack_groups
from tests.observe.test_records import make_config, make_groups


class EchoTrainer:
    """Returns each token's rollout log-prob as what the update used of it, from two ranks in a mixed order."""

    def __init__(self) -> None:
        self.kept: list[bool] = []

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float]:
        self.batch = batch
        self.kept.append(keep_tokens)
        return {"loss": float(step)}

    def updated_tokens(self, rows: list[int]) -> list[tuple[list[int], dict[str, np.ndarray]]]:
        shares = [rows[1::2], rows[::2]]
        return [(share, {"h": self.batch.select(share).rollout_log_probs}) for share in shares]


def test_values_come_back_in_batch_order(tmp_path: Path) -> None:
    batch = replace(pack_groups(make_groups()), advantages=np.ones(4, dtype=np.float32))
    trainer = EchoTrainer()
    driver = cast(Any, SimpleNamespace(config=make_config(tmp_path), trainer=trainer))
    driver._minibatches = lambda batch, step: Driver._minibatches(driver, batch, step)
    for num_rows, kept in ((4, [True, True]), (2, [False, True])):
        trainer.kept.clear()
        _, updates, updated = Driver._recorded_update(driver, batch, 1, StepClock(), num_rows)
        np.testing.assert_array_equal(updated["h"], batch.select(range(num_rows)).rollout_log_probs)
        assert updates == [{"loss": 1.0}] * 2
        assert sorted(trainer.kept) == kept
