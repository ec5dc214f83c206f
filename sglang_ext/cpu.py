"""The environment of an SGLang engine's process on a machine without a GPU. Never used on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"
"""Put on PYTHONPATH in front of SGLang's GPU-only packages."""


def environment(tp: int) -> dict[str, str]:
    """Variables for the process that will start an engine of this tensor-parallel size.

    They take effect when Python starts and when SGLang is imported, in the engine's process and in those that it
    spawns: set them before the process starts (Ray: `runtime_env={"env_vars": ...}`).
    """
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    variables = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": os.pathsep.join([str(STAND_INS), *(p for p in python_path if p and p != str(STAND_INS))]),
        "CUDA_VISIBLE_DEVICES": "",
        # SGLang compiles the seeded sampler with torch.compile, which needs a C++ compiler and a minute on a CPU.
        "TORCH_COMPILE_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Without AMX kernels SGLang binds no threads, and each rank would use every core. For models small enough for a
        # CPU one thread is the fastest: starting others costs more than a product of small matrices.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1",
        "THP_MEM_ALLOC_ENABLE": "1",  # large pages for the weights: 5 % of the rollout of 135M parameters
        "GOMP_SPINCOUNT": "10000",  # with more threads: do not spin long on cores that others need
        "GLOO_SOCKET_IFNAME": "lo",  # the ranks of an engine share a node
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if tp > 1:
        # Otherwise SGLang requires a NUMA node for each rank.
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(_cores_of_ranks(tp))
        # torch's default build contains NCCL; SGLang would use it for CPU tensors wherever it can load it.
        variables["SGLANG_NCCL_SO_PATH"] = "no-nccl-on-a-cpu"
    return variables


def _cores_of_ranks(tp: int) -> list[str]:
    """Cores of each rank, e.g. ["0,1", "2,3"]; ranks share cores where there are fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // tp
    if share == 0:
        return [str(cores[rank % len(cores)]) for rank in range(tp)]
    return [",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(tp)]
