"""The compilers with which SGLang builds kernels when an engine starts. Imports neither torch nor SGLang."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

NVCC_MAJOR = 13
"""SGLang's kernels (0.5.23) and torch's CUDA are of this major version; they do not compile with an older nvcc."""
_USUAL_FOLDER = Path("/usr/local/cuda")


def compiler_faults() -> Iterator[str]:
    """What is missing, or too old, and the line that installs it; nothing if SGLang can compile."""
    nvcc = find_nvcc()
    install = (
        f"install CUDA {NVCC_MAJOR}'s compiler, e.g. `apt-get install cuda-nvcc-{NVCC_MAJOR}-0` from NVIDIA's "
        f"repository, and set CUDA_HOME=/usr/local/cuda-{NVCC_MAJOR}.0"
    )
    if not os.access(nvcc, os.X_OK):
        places = f"CUDA_HOME, CUDA_PATH, PATH, {_USUAL_FOLDER}"
        yield f"SGLang compiles kernels, but there is no {nvcc} (it looks in {places}); {install}"
    elif (version := _version(nvcc)) is None:
        yield f"SGLang compiles kernels, but {nvcc} does not say its version; {install}"
    elif version[0] < NVCC_MAJOR:
        found = ".".join(map(str, version))
        yield f"SGLang compiles kernels with nvcc {NVCC_MAJOR} or newer, but {nvcc} is {found}; {install}"
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        yield f"SGLang compiles kernels, but there is no C++ compiler {compiler}; `apt-get install g++`, or set CXX"


def find_nvcc() -> Path:
    """Where SGLang (0.5.23) looks for nvcc: it does not find the one in pip's nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    return _USUAL_FOLDER / "bin" / "nvcc" if on_path is None else Path(on_path)


def _version(nvcc: Path) -> tuple[int, int] | None:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", answer)
    return None if found is None else (int(found[1]), int(found[2]))
