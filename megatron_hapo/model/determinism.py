"""What `deterministic: true` sets in a trainer rank, and what it leaves.

On a CPU a rank has one thread, and the same batches give the same bits anyway. On GPUs torch, cuBLAS, NCCL, Megatron
and Transformer Engine are asked for what they offer; the engines' side is in `sglang_ext/engine_config.py`.
"""

from __future__ import annotations

import logging
import warnings

logger = logging.getLogger(__name__)

_CPU = (
    "deterministic: on CPUs a run is the same to the last bit as another one on this kind of processor; scoring that "
    "hits a time limit, and scorers of your own, may still differ"
)
_GPU = (
    "deterministic: on GPUs SGLang (enable_deterministic_inference), Megatron (deterministic_mode), torch, cuBLAS and "
    "NCCL are asked for what they offer. Not covered: operations that torch has no deterministic version of, which it "
    "names in warnings; log-probs of tokens whose prefix is computed again, after a pause or a restart; other numbers "
    "or kinds of GPUs; scoring that hits a time limit, and scorers of your own. No GPU has verified this yet"
)


def announce(device: str) -> None:
    """Logs what the run can rely on."""
    logger.info(_CPU if device == "cpu" else _GPU)


def rank_variables(device: str) -> dict[str, str]:
    """Environment variables of a rank, besides NCCL's (`nccl_environment`), set before its process starts."""
    if device == "cpu":
        return {}
    return {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS would choose kernels by the work space of each stream
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Megatron's deterministic_mode requires it for Transformer Engine
    }


def enable() -> None:
    """Asks torch for deterministic algorithms in this process."""
    import torch

    # Where torch has none, it says so and goes on: otherwise a single operation would rule the mode out.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("once", message=".*does not have a deterministic implementation")
    # Else every torch.empty is filled with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
