"""The stand-ins for SGLang's CUDA operators, without SGLang."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

MASK = 0xFFFFFFFF


@pytest.fixture(scope="module")
def sgl_kernel() -> ModuleType:
    """The stand-in under a name of its own, as its folder is on the path only in engine processes."""
    path = Path(__file__).parents[2] / "sglang_ext/stand_ins/sgl_kernel/__init__.py"
    spec = importlib.util.spec_from_file_location("sgl_kernel_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def murmur3(blocks: list[int]) -> int:
    """MurmurHash3_x86_32 of 32-bit blocks with seed 0, after its public-domain reference."""

    def rotate(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & MASK

    h = 0
    for block in blocks:
        h ^= rotate(block * 0xCC9E2D51 & MASK, 15) * 0x1B873593 & MASK
        h = (rotate(h, 13) * 5 + 0xE6546B64) & MASK
    h ^= 4 * len(blocks)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (3, 40_000)])
def test_hashes_are_murmur3_of_seed_position_and_column(sgl_kernel: ModuleType, rows: int, columns: int) -> None:
    seeds = torch.tensor([(1 << 63) - 1 - 12345678901 * row for row in range(rows)])
    positions = torch.arange(rows) * 1000
    hashes = torch.ops.sgl_kernel.murmur_hash32_cpu(seeds, positions, torch.arange(columns))
    assert (hashes.dtype, tuple(hashes.shape)) == (torch.uint32, (rows, columns))
    for row in range(rows):
        seed, position = int(seeds[row]), int(positions[row])
        for column in {0, columns // 2, columns - 1}:
            assert int(hashes[row, column].item()) == murmur3([seed & MASK, seed >> 32, position, column])
