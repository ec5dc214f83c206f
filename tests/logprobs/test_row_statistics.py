"""The Triton kernel of the row statistics against its torch counterpart, without a GPU: interpreted, and compiled."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_hapo.logprobs import row_statistics
from tests.time_limits import patient


def compare_with_twin(device: str) -> None:
    """Ordinary rows, and forbidden tokens (some, all), NaN, infinity and outlying maxima."""
    from megatron_hapo.logprobs.row_statistics_triton import BLOCK, local_statistics

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (1, 7, BLOCK, 2 * BLOCK + 100):
            logits_NV = torch.randn(8, columns + 3, generator=generator).mul_(4)[:, :columns].to(dtype)
            logits_NV[1] = -torch.inf
            logits_NV[2] = torch.arange(columns) * 4.0  # the maximum rises all along
            logits_NV[3] = -logits_NV[2]
            logits_NV[4, columns // 2] = torch.nan
            logits_NV[5, columns // 3] = torch.inf
            logits_NV[6, ::2] = -torch.inf
            targets_N = torch.tensor([0, columns - 1, columns, -1, columns // 2, columns // 3, 0, columns // 4])
            logits_NV, targets_N = logits_NV.to(device), targets_N.to(device)
            for temperature_N in (None, torch.rand(8, generator=generator).add_(0.5).to(device)):
                got = local_statistics(logits_NV, targets_N, temperature_N)
                want = row_statistics.local_statistics_in_tiles(logits_NV, targets_N, temperature_N)
                fine = [0, 1, 2, 3, 6, 7]
                torch.testing.assert_close(got[:, fine], want[:, fine], rtol=2e-6, atol=1e-6)
                assert got[1:3, 4:6].isnan().all(), "a fault must reach the sums"
                torch.testing.assert_close(got[3], want[3], rtol=0, atol=0, equal_nan=True)


def compare_interpreted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the infinities
        compare_with_twin("cpu")


def test_the_kernel_equals_its_torch_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since Triton reads the variable on import."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(compare_interpreted).result(timeout=patient(120))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code for an H100: the interpreter accepts types that the compiler rejects."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hapo.logprobs.row_statistics_triton import BLOCK, NUM_WARPS, row_statistics_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(
        fn=row_statistics_kernel,
        signature={
            "logits": f"*{dtype}",
            "local_targets": "*i64",
            "temperatures": "*fp32",
            "result": "*fp32",
            "row_stride": "i32",
            "num_rows": "i32",
            "num_columns": "i32",
            "HAS_TEMPERATURE": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"HAS_TEMPERATURE": True, "BLOCK": BLOCK},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
    assert compiled.asm["cubin"]
