"""The optimizer's settings are those of the resumed run, not those of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_hapo.checkpoint.disk_space import checkpoint_bytes
from megatron_hapo.checkpoint.torch_dist_metadata import read_metadata
from megatron_hapo.model.families import num_parameters, read_shape
from tests.distributed import run_ranks
from tests.tiny_families import write_family
from tests.trainer.test_trainer import make_batch, make_config, make_grid, with_everything

BEFORE = {
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "clip_grad": 1.0,
    "lr": 1e-3,
    "schedule": "constant",
}
AFTER = {
    "weight_decay": 0.9,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-3,
    "clip_grad": 0.01,
    "lr": 2e-3,
    "schedule": "cosine",
}
CASES = {
    "distributed": ({"dp": 2}, "float32"),
    "replicated": ({"tp": 2, "distributed_optimizer": False}, "float32"),
    "master weights": ({"dp": 2}, "bfloat16"),
    "replicated master weights": ({"tp": 2, "distributed_optimizer": False}, "bfloat16"),
}


def resume_with_other_settings(rank: int, folder: Path) -> dict[str, Any]:
    """For each case the settings of the parameter groups, of a new run and of a resumed one, and effects on weights."""
    import numpy as np
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_hapo.checkpoint.resumable import chained_optimizers
    from megatron_hapo.trainer.trainer_rank import TrainerRank
    from megatron_hapo.types import merge_scores

    def groups_of(trainer: Any) -> list[dict[str, Any]]:
        groups = [group for part in chained_optimizers(trainer._optimizer) for group in part.param_groups]
        return [{name: value for name, value in group.items() if name not in ("params", "step")} for group in groups]

    results = {}
    for case, (layout, dtype) in CASES.items():

        def config_with(settings: dict[str, Any], *, layout: Any = layout, dtype: Any = dtype) -> Any:
            config = make_config(folder / "model", layout, **settings)
            return config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": dtype})})

        grid = make_grid(config_with(BEFORE))
        trainer = TrainerRank(config_with(BEFORE), grid)
        scores: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(scores, trainer.log_probs(make_batch()))
        batch = with_everything(make_batch(), merge_scores(scores, make_batch()))
        trainer.update(batch, step=1)
        checkpoint = folder / case
        if rank == 0:
            checkpoint.mkdir()
        dist.barrier()
        written = trainer.save_checkpoint(checkpoint)
        seen: dict[str, Any] = {"written": sorted(written)}
        for name, settings in {"same": BEFORE, **{key: BEFORE | {key: AFTER[key]} for key in AFTER}}.items():
            resumed = TrainerRank(config_with(settings), grid)
            fresh = groups_of(resumed)
            resumed.load_checkpoint(checkpoint)
            assert groups_of(resumed) == fresh, (case, name)
            resumed.update(batch, step=2)
            parameters = [value.detach().float().flatten().numpy() for _, value in resumed._named_parameters()]
            seen[name] = np.concatenate(parameters)
        results[case] = seen
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resumed")
    write_family(folder / "model", "qwen3")
    return folder, run_ranks(2, resume_with_other_settings, folder, timeout_seconds=600)


@pytest.mark.parametrize("case", CASES)
def test_each_changed_setting_of_the_optimizer_changes_the_next_update(
    resumed: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    view = resumed[1][0][case]
    for setting in AFTER:
        assert (view[setting] != view["same"]).any(), setting


@pytest.mark.parametrize("case", CASES)
def test_ranks_hash_what_they_have_written_and_its_size_is_as_estimated(
    resumed: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    folder, ranks = resumed
    files = [path for path in (folder / case).iterdir() if path.suffix == ".distcp"]
    assert sorted(name for view in ranks for name in view[case]["written"]) == sorted(path.name for path in files)
    layout, dtype = CASES[case]
    config = make_config(folder / "model", layout)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"dtype": dtype})})
    estimated = checkpoint_bytes(num_parameters(read_shape(folder / "model")), config)
    stored = [
        entry.size.numel() * entry.properties.dtype.itemsize
        for entry in read_metadata(folder / case).state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    # Files also have about a kilobyte per tensor, which only counts for a model as small as this.
    assert estimated == pytest.approx(sum(stored), rel=0.03)
