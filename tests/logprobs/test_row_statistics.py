"""The Triton kernels of the row statistics against their twins in torch: interpreted, and compiled without a GPU."""

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


def compare_gradient_with_twin(device: str) -> None:
    """Targets here and on other ranks, forbidden tokens, with and without a temperature and an entropy gradient."""
    from megatron_hapo.logprobs.row_statistics_triton import BLOCK, overwrite_with_gradient

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (1, 7, BLOCK, 2 * BLOCK + 100):
            padded_NV = torch.randn(5, columns + 3, generator=generator).mul_(4).to(device, dtype)
            padded_NV[2, ::2] = -torch.inf
            padded_NV[:, columns - 1] = 1.0  # no row is forbidden altogether
            targets_N = torch.tensor([0, columns - 1, columns - 1, columns, -1]).to(device)
            for with_temperature in (False, True):
                temperature_N = torch.rand(5, generator=generator).add_(0.5).to(device) if with_temperature else None
                shard = row_statistics.VocabShard.of(columns, tp_group=None, vocab_size=None)
                statistics = row_statistics.combine(
                    row_statistics.local_statistics_in_tiles(padded_NV[:, :columns], targets_N, temperature_N),
                    targets_N, temperature_N, shard,
                )  # fmt: skip
                log_prob_gradient_N, entropy_gradient_N = torch.randn(2, 5, generator=generator).to(device)
                for of_entropies in (None, entropy_gradient_N):
                    gradient = row_statistics.row_gradient(statistics, temperature_N, log_prob_gradient_N, of_entropies)
                    got, want = padded_NV.clone(), padded_NV.clone()
                    overwrite_with_gradient(got[:, :columns], targets_N, gradient)
                    row_statistics.overwrite_with_gradient_in_tiles(want[:, :columns], targets_N, gradient)
                    ulp = torch.finfo(dtype).eps
                    torch.testing.assert_close(got[:, :columns], want[:, :columns], rtol=max(ulp, 2e-6), atol=1e-7)
                    assert torch.equal(got[:, columns:], padded_NV[:, columns:]), "padding is left alone"


def compare_entropy_with_twin(device: str) -> None:
    """The sampling hook's entropy, with forbidden tokens, near certainty, and at every row's own temperature."""
    from megatron_hapo.entropy import entropy_from_logits
    from megatron_hapo.logprobs.row_statistics_triton import BLOCK, local_statistics
    from sglang_ext.temperature import entropy_of

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits_RV = torch.randn(6, 2 * BLOCK + 100, generator=generator).mul_(3).to(dtype)
        logits_RV[1, 5] = 60
        logits_RV[2, ::2] = -torch.inf
        temperature_R = torch.rand(6, generator=generator).add_(0.5)
        expected = entropy_from_logits(logits_RV.double().div(temperature_R[:, None]).float())
        got = entropy_of(local_statistics(logits_RV.to(device), None, temperature_R.to(device)))
        torch.testing.assert_close(got.cpu(), expected, rtol=5e-6, atol=5e-6)
        assert float(got.min()) >= 0


def compare_interpreted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the infinities
        compare_with_twin("cpu")
        compare_gradient_with_twin("cpu")
        compare_entropy_with_twin("cpu")


def test_the_kernels_equal_their_torch_counterparts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since Triton reads the variable on import."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(compare_interpreted).result(timeout=patient(120))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code for an H100: the interpreter accepts types that the compiler rejects."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hapo.logprobs.row_statistics_triton import (
        BLOCK,
        NUM_WARPS,
        row_gradient_kernel,
        row_statistics_kernel,
    )

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
            "HAS_TARGETS": "constexpr",
            "HAS_TEMPERATURE": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"HAS_TARGETS": True, "HAS_TEMPERATURE": True, "BLOCK": BLOCK},
    )
    gradient = ASTSource(
        fn=row_gradient_kernel,
        signature={
            "logits": f"*{dtype}",
            "local_targets": "*i64",
            **dict.fromkeys(("maxima", "temperatures", "offsets", "slopes", "target_gradients"), "*fp32"),
            **dict.fromkeys(("row_stride", "num_columns", "blocks_per_row"), "i32"),
            **dict.fromkeys(("HAS_TEMPERATURE", "HAS_SLOPE", "BLOCK"), "constexpr"),
        },
        constexprs={"HAS_TEMPERATURE": True, "HAS_SLOPE": True, "BLOCK": BLOCK},
    )
    for kernel in (source, gradient):
        compiled = triton.compile(kernel, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
        assert compiled.asm["cubin"]
