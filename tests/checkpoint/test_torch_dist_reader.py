"""Weights of a Megatron folder as views of its files: correct at every layout, and really mapped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hapo.config import ParallelSizes
from tests.distributed import run_ranks
from tests.tiny_families import expected_tensors, write_family

LAYOUTS = [{"tp": 1, "pp": 1}, {"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}]
CASES = ("qwen3", "qwen3_moe")


def through_megatron_folders(rank: int, folder: Path) -> list[dict[str, Any]]:
    """Each case written and read at each pair of layouts: this rank's HF tensors, and which parameters are mapped."""
    from megatron.core import parallel_state

    from megatron_hapo.checkpoint.hf_weights import load_hf_weights, owned_tensors
    from megatron_hapo.checkpoint.weights import load_weights, save_weights
    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model, named_parameters
    from megatron_hapo.model.families import read_shape

    def at(sizes: dict[str, int]) -> parallel_layout.ParallelLayout:
        return parallel_layout.initialize(
            ParallelSizes.for_world(2, **sizes), device=torch.device("cpu"), seed=0, timeout_seconds=60
        )

    seen = []
    for case in CASES:
        shape = read_shape(folder / case)
        for number, written in enumerate(LAYOUTS):
            target = folder / f"{case}_{number}"
            if rank == 0:
                target.mkdir()
            layout = at(written)
            model = build_model(shape, layout, dtype=torch.bfloat16)
            load_hf_weights(model, shape, layout, folder / case)
            torch.distributed.barrier()
            save_weights(model, layout, target)
            parallel_state.destroy_model_parallel()
            for read in LAYOUTS:
                layout = at(read)
                for in_files in (True, False):
                    model = build_model(shape, layout, dtype=torch.bfloat16)
                    load_weights(model, shape, layout, target, as_file_views=in_files)
                    in_file = {name for name, parameter in named_parameters(model) if lies_in_a_file(parameter)}
                    tensors = {
                        name: value.view(torch.int16).numpy().copy()
                        for name, value in owned_tensors(model, shape, layout)
                    }
                    key = {"case": case, "written": written, "read": read, "in_files": in_files}
                    seen.append({**key, "tensors": tensors, "in_file": in_file})
                parallel_state.destroy_model_parallel()
    return seen


def lies_in_a_file(value: torch.Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.fullmatch(r"(\w+)-(\w+) .*\.distcp", line)
        if match and int(match[1], 16) <= value.data_ptr() < int(match[2], 16):
            return True
    return False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    for case in CASES:
        write_family(folder / case, case, dtype="bfloat16")
    return folder


def test_parameters_are_correct_at_every_layout_and_mapped_if_allowed(models: Path) -> None:
    want = {
        case: {name: value.view(torch.int16).numpy() for name, value in expected_tensors(models / case, case).items()}
        for case in CASES
    }
    for parts in zip(*run_ranks(2, through_megatron_folders, models, timeout_seconds=240), strict=True):
        case, written, read, in_files = (parts[0][key] for key in ("case", "written", "read", "in_files"))
        what = f"{case} written at {written}, read at {read}, in files: {in_files}"
        got = {name: value for part in parts for name, value in part["tensors"].items()}
        assert got.keys() == want[case].keys(), what
        for name, value in want[case].items():
            assert (got[name] == value).all(), f"{what}: {name}"
        in_file = set.union(*(part["in_file"] for part in parts))
        if not in_files:
            assert not in_file, what
        elif written["tp"] == 1:
            names = {re.sub(r"decoder\.layers\.\d+\.", "", name) for name in in_file}
            assert {"self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"} <= names, what
            # Megatron joins the halves of gated layers, and a column-wise cut is not contiguous.
            assert not any("linear_fc1" in name for name in names), what
            assert ("self_attention.linear_proj.weight" in names) == (read["tp"] == 1), what
