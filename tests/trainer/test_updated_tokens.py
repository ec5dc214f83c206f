"""What records get of an update's tokens does not depend on the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_hapo.types import merge_scores, merge_tokens
from tests.distributed import run_ranks
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch, make_config, make_grid, with_everything

SOME_ROWS = [0, 2, 3]
NAMES = {"token_advantages", "importance_ratios", "clip_low", "clip_high", "h"}


def tokens_of_updates(rank: int, model: Path, layouts: list[dict[str, Any]]) -> list[Any]:
    """What a rank returns of the second of two updates on one batch, for each layout."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo.trainer.trainer_rank import TrainerRank

    seen = []
    for layout in layouts:
        config = make_config(model, layout, lr=1e-2)
        trainer = TrainerRank(config, make_grid(config))
        batch = make_batch()
        scores: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(scores, trainer.log_probs(batch))
        scored = with_everything(batch, merge_scores(scores, batch))
        trainer.update(scored, step=1)
        trainer.update(scored, step=2, keep_tokens=True)
        seen.append(trainer.updated_tokens(SOME_ROWS))
        parallel_state.destroy_model_parallel()
    return seen


def test_every_layout_returns_the_same_tokens(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path)
    layouts: list[dict[str, Any]] = [{"cp": 2}, {"pp": 2}, {"dp": 2}]
    (single,) = run_ranks(1, tokens_of_updates, tmp_path, [{"tp": 1}])
    pairs = run_ranks(2, tokens_of_updates, tmp_path, layouts)
    lengths = make_batch().response_lengths[SOME_ROWS]

    def merged(parts: list[Any]) -> dict[str, np.ndarray]:
        present = [part for part in parts if part is not None]
        return merge_tokens([([SOME_ROWS.index(row) for row in rows], values) for rows, values in present], lengths)

    want = merged(single)
    assert set(want) == NAMES
    assert {len(values) for values in want.values()} == {int(lengths.sum())}
    assert np.abs(want["importance_ratios"] - 1).max() > 1e-3  # the first update has moved the policy
    for number, layout in enumerate(layouts):
        got = merged([rank[number] for rank in pairs])
        for name, values in want.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{layout} {name}")
