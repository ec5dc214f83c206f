"""A model with experts trains alike however its experts are dealt out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.test_trainer import assert_parameters_are_those_of_the_planned_grid, first_report, train_on, whole
from tests.tiny_families import write_family

LAYOUTS = [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True}]


@pytest.mark.slow
def test_every_expert_layout_updates_as_one_process(tmp_path: Path) -> None:
    model = write_family(tmp_path / "model", "qwen3_moe")
    single = run_ranks(1, train_on, model, [{"tp": 1}], tmp_path, timeout_seconds=240)[0][0]
    ranks = run_ranks(2, train_on, model, LAYOUTS, tmp_path, timeout_seconds=400)
    for number, layout in enumerate(LAYOUTS):
        views = [rank[number] for rank in ranks]
        np.testing.assert_allclose(
            first_report(views, "scores").log_probs, single["scores"].log_probs, atol=1e-5, err_msg=str(layout)
        )
        for got, want in zip(first_report(views, "updates"), single["updates"], strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6), layout
        weights = whole(views, "weights")
        assert weights.keys() == single["weights"].keys(), layout
        for name, want in single["weights"].items():
            np.testing.assert_allclose(weights[name], want, atol=1e-4, err_msg=f"{layout} {name}")
        sent = [name for view in views for bucket in view["buckets"] for name in bucket.names]
        assert sorted(sent) == sorted(weights), layout
        assert_parameters_are_those_of_the_planned_grid(model, layout, views)
