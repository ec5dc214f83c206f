"""The compilers that SGLang needs on a GPU machine, found as it finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hapo.checks import cuda_toolkit
from megatron_hapo.checks.preflight import check_run
from megatron_hapo.config import load_config


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole PATH, on a machine without a toolkit in its usual folder."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cuda_toolkit, "_USUAL_FOLDER", tmp_path / "cuda")
    return folder


def write_program(path: Path, answer: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{answer}'\n")
    path.chmod(0o755)


def nvcc_answer(version: str) -> str:
    return f"Cuda compilation tools, release {version}, V{version}.48"


def test_a_toolkit_of_the_right_version_is_accepted_wherever_sglang_looks(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(programs / "g++")
    folder = programs.parent
    write_program(folder / "cuda/bin/nvcc", nvcc_answer("13.0"))
    assert list(cuda_toolkit.compiler_faults()) == []
    write_program(programs / "nvcc", nvcc_answer("12.9"))  # PATH comes before the usual folder
    assert "is 12.9; install CUDA 13's compiler" in next(cuda_toolkit.compiler_faults())
    write_program(folder / "own/bin/nvcc", nvcc_answer("13.3"))
    monkeypatch.setenv("CUDA_PATH", str(folder / "own"))
    assert list(cuda_toolkit.compiler_faults()) == []
    monkeypatch.setenv("CUDA_HOME", str(folder / "none"))  # before CUDA_PATH
    assert f"there is no {folder}/none/bin/nvcc" in next(cuda_toolkit.compiler_faults())


def test_what_is_missing_is_said_with_the_line_that_installs_it(programs: Path) -> None:
    nvcc, compiler = cuda_toolkit.compiler_faults()
    assert "`apt-get install cuda-nvcc-13-0`" in nvcc
    assert "`apt-get install g++`" in compiler
    write_program(programs / "nvcc", "no version here")
    assert "does not say its version" in next(cuda_toolkit.compiler_faults())


def test_sglang_looks_where_we_look() -> None:
    """Its resolution of the compiler's folder, in the installed source."""
    from importlib.util import find_spec

    found = find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations)))
    source = (folder / "kernels/jit/utils/compile/toolchain.py").read_text()
    body = source[source.index("def cuda_home") :]
    order = ['environ.get("CUDA_HOME")', 'environ.get("CUDA_PATH")', 'shutil.which("nvcc")', '"/usr/local/cuda"']
    places = [body.index(part) for part in order]
    assert places == sorted(places)


def test_a_machine_with_gpus_is_checked_before_the_run(
    programs: Path, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: x\nsteps: 1\ndevice: cuda\nmodel: {{path: {tiny_qwen3}}}\n"
        "data: {train: {type: arithmetic, size: 64}}\nrollout: {max_prompt_tokens: 64, max_response_tokens: 64}\n"
    )

    def compilers() -> list[str]:
        return [fault.key for fault in check_run(load_config(config)) if "SGLang compiles kernels" in fault.message]

    assert compilers() == []  # the machine that checks may not be the one that runs
    write_program(programs / "nvidia-smi", "81559")
    assert compilers() == ["device", "device"]
