"""Requirements, lock and shipped configs agree with each other, with SGLang and with what is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_hapo.config import load_config
from tests.time_limits import patient

ROOT = Path(__file__).parents[1]


def read_requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def exact_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is no exact pin"
    return specifier.version


PINS, DEV, GPU_ONLY, LOCK, GPU_LOCK = (
    read_requirements(f"{name}.txt") for name in ("pins", "dev", "gpu-only", "lock-cpu", "gpu/lock")
)


@pytest.fixture(scope="module")
def sglang_requires() -> dict[str, Requirement]:
    """What SGLang needs on this platform, without its extras."""
    parsed = [Requirement(line) for line in requires("sglang") or []]
    here = [requirement for requirement in parsed if not requirement.marker or requirement.marker.evaluate()]
    return {canonicalize_name(requirement.name): requirement for requirement in here}


def test_pins_are_exact_and_installed():
    for name, requirement in PINS.items():
        assert version(name) == exact_version(requirement), name


def test_setup_takes_the_pins():
    ours = [Requirement(line) for line in requires("megatron-hapo") or []]
    core = {canonicalize_name(r.name): r.specifier for r in ours if "extra" not in str(r.marker)}
    assert core == {name: requirement.specifier for name, requirement in PINS.items()}


def test_gpu_only_packages_are_requirements_of_sglang(sglang_requires):
    unknown = GPU_ONLY.keys() - sglang_requires.keys()
    assert not unknown, f"{sorted(unknown)}: sglang {version('sglang')} does not ask for them"


def test_gpu_only_packages_are_never_installed_on_a_cpu_machine():
    for name, requirement in GPU_ONLY.items():
        assert requirement.marker is not None, name
        assert not requirement.marker.evaluate(), f"{name}: the marker must never be true"
    assert not GPU_ONLY.keys() & LOCK.keys()
    assert not GPU_ONLY.keys() & PINS.keys()


def test_the_lock_holds_everything_else_that_sglang_needs(sglang_requires):
    missing = sglang_requires.keys() - GPU_ONLY.keys() - LOCK.keys()
    assert not missing, f"{sorted(missing)}: run `make lock`, or list them in gpu-only.txt if they hold GPU code only"


def test_pins_agree_with_sglang(sglang_requires):
    for name in PINS.keys() & sglang_requires.keys():
        assert sglang_requires[name].specifier.contains(exact_version(PINS[name])), (name, sglang_requires[name])
    for name in ("torch", "transformers", "tokenizers"):
        assert exact_version(sglang_requires[name]) == exact_version(PINS[name])


def test_the_lock_agrees_with_the_pins():
    for name, requirement in {**PINS, **DEV}.items():
        assert exact_version(LOCK[name]) == exact_version(requirement), f"{name}: run `make lock`"


def test_the_lock_satisfies_what_the_pinned_packages_ask_for():
    for name in PINS:
        for needed in map(Requirement, requires(name) or []):
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            if (needed_name := canonicalize_name(needed.name)) in GPU_ONLY:
                continue
            assert needed.specifier.contains(exact_version(LOCK[needed_name]), prereleases=True), (name, str(needed))


def test_the_gpu_lock_is_the_cpu_lock_and_what_that_omits():
    for name in LOCK.keys() - {"cuda-bindings"}:  # cuda-python, which the CPU set-up omits, has one of its own
        assert exact_version(GPU_LOCK[name]) == exact_version(LOCK[name]), f"{name}: run `make lock`"
    missing = GPU_ONLY.keys() - GPU_LOCK.keys()
    assert not missing, f"{sorted(missing)}: run `make lock`"


def test_the_dockerfile_uses_the_toolkit_that_sglang_needs_and_the_pinned_transformer_engine():
    from megatron_hapo.checks.cuda_toolkit import NVCC_MAJOR

    text = (ROOT / "Dockerfile").read_text()
    assert re.search(rf"^FROM nvidia/cuda:{NVCC_MAJOR}\.\d+\.\d+-cudnn-devel-", text, re.MULTILINE)
    extras = [Requirement(line) for line in requires("megatron-hapo") or [] if "extra ==" in line]
    (engine,) = [r for r in extras if r.name == "transformer-engine"]
    command = r"""sed -n 's/.*"te": \["\([^"]*\)"\].*/\1/p' setup.py"""
    assert command in text
    pin = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert Requirement(pin).name == engine.name
    assert exact_version(Requirement(pin))


def test_packages_contain_the_pages_of_the_viewer(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=patient(60))
    assets = Path("megatron_hapo/observe/view/assets")
    assert {path.name for path in (tmp_path / assets).iterdir()} == {path.name for path in (ROOT / assets).iterdir()}


def test_requirements_name_no_index_and_no_path():
    for path in (ROOT / "requirements").rglob("*.txt"):
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line.startswith("-") or "://" in line or " @ " in line], path.name


def test_the_pinned_uv_is_named_once():
    scripts = "\n".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "tools").glob("*.sh")])
    assert len(re.findall(r"uv_version=\d+\.\d+\.\d+", scripts)) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).name


def test_the_demos_differ_in_the_method_only():
    hapo, grpo = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("demo_cpu", "demo_cpu_grpo"))
    assert grpo.model_copy(update={"name": hapo.name, "algorithm": hapo.algorithm}) == hapo
    algorithm = grpo.algorithm
    assert algorithm.advantage == "group_mean"
    assert not any(part.enabled for part in (algorithm.adaptive_temperature, algorithm.adaptive_clip))
    assert not algorithm.redistribution.enabled


def test_config_and_metrics_need_neither_torch_nor_megatron_nor_sglang():
    heavy = ("torch", "megatron", "sglang", "ray", "transformers")
    script = (
        "import sys, megatron_hapo.config, megatron_hapo.types, megatron_hapo.observe.metrics\n"
        "import megatron_hapo.data.arithmetic\n"
        f"assert not [name for name in {heavy} if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


SOURCES = {
    path.relative_to(ROOT): path for name in ("megatron_hapo", "sglang_ext") for path in (ROOT / name).rglob("*.py")
}
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): full for path, full in SOURCES.items()}


def listed_rooms() -> dict[str, int]:
    """Each module's row in the table of docs/architecture.md; a folder stands for all that is in it."""
    rows = [
        [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]]
        for line in (ROOT / "docs/architecture.md").read_text().splitlines()
        if re.match(r"\| `[^|]*(\.py|/)`[^|]*\|[^|]*\|[^|]*\|$", line)
    ]
    listed = {}
    for row, (names, _, inside) in enumerate(rows):
        for name in [f"{names[0]}{module}" for module in inside] or names:
            path = name if name.startswith("sglang_ext/") else f"megatron_hapo/{name}"
            dotted = path.removesuffix(".py").rstrip("/").replace("/", ".")
            assert dotted in MODULES, f"docs/architecture.md names {name}, which does not exist"
            within = [module for module in MODULES if module.startswith(f"{dotted}.")] if name.endswith("/") else []
            listed |= dict.fromkeys([dotted, *within], row)
        if inside:
            face = ("" if names[0].startswith("sglang_ext/") else "megatron_hapo.") + names[0].rstrip("/")
            listed[face] = row
    return listed


def imported(node: ast.AST) -> Iterator[str]:
    """Our modules that the code imports, inside functions too; not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        elif isinstance(child, ast.ImportFrom) and child.module in MODULES:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        yield from imported(child)


def our_imports() -> dict[str, set[str]]:
    """What each module imports of ours."""
    return {module: set(imported(ast.parse(path.read_text()))) for module, path in MODULES.items()}


def test_every_module_is_in_a_room_and_rooms_import_one_way():
    listed, imports = listed_rooms(), our_imports()
    entry_points = {"megatron_hapo", "megatron_hapo.__main__"}
    assert not sorted(MODULES.keys() - listed.keys() - entry_points)
    backwards = [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others - entry_points
        if module not in entry_points and listed[other] > listed[module]
    ]
    assert not backwards


def test_there_are_few_rooms_and_few_modules_beside_them():
    folder = ROOT / "megatron_hapo"
    assert len([path for path in folder.glob("*.py") if not path.stem.startswith("__")]) <= 12
    assert len([path for path in folder.iterdir() if (path / "__init__.py").is_file()]) <= 14


def test_module_names_are_unique():
    names = [path.stem for path in SOURCES if path.stem not in ("__init__", "__main__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_there_is_no_import_circle():
    graph = {module: sorted(others - {module}) for module, others in our_imports().items()}
    TopologicalSorter(graph).prepare()


def test_only_launch_imports_ray_and_sglang_ext():
    def outside_of_launch(package: str) -> list[str]:
        found = []
        for module, path in MODULES.items():
            if module.startswith("megatron_hapo.launch"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{module} imports {name}" for name in names if name.split(".")[0] == package]
        return found

    assert not outside_of_launch("ray")
    assert not [line for line in outside_of_launch("sglang_ext") if not line.startswith("sglang_ext")]


@pytest.fixture
def uv() -> Path:
    """The program with which `make setup` installs, which it leaves in the environment."""
    program = Path(sys.executable).parent / "uv"
    assert program.is_file(), "uv is not beside this Python: run `make setup`"
    return program


@pytest.mark.slow
def test_the_gpu_set_up_resolves(uv, tmp_path):
    """What `pip install .` takes on a GPU machine: nothing left out. Needs the package index."""
    out = tmp_path / "resolved.txt"
    command = [uv, "pip", "compile", "--quiet", "setup.py", "--output-file", out]
    subprocess.run(
        [*map(str, command), "--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34"],
        check=True, cwd=ROOT, timeout=patient(600),
    )  # fmt: skip
    resolved = {canonicalize_name(line.split("==")[0]) for line in out.read_text().splitlines() if "==" in line}
    assert GPU_ONLY.keys() <= resolved


@pytest.mark.slow
def test_the_gpu_lock_can_be_installed(uv, tmp_path):
    """What `make setup-gpu` asks for resolves to exactly the lock, whose GPU packages all have wheels. Reads metadata
    only. Needs the package index."""
    lock, out, wheels = ROOT / "requirements/gpu/lock.txt", tmp_path / "resolved.txt", tmp_path / "gpu.txt"
    asked = [ROOT / "requirements" / name for name in ("pins.txt", "dev.txt")]
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--constraints", lock, *asked]
    platform = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34"]
    subprocess.run(
        [*map(str, command), *platform, "--output-file", str(out)], check=True, cwd=ROOT, timeout=patient(600)
    )
    assert [line for line in out.read_text().splitlines() if "==" in line] == [
        line for line in lock.read_text().splitlines() if "==" in line
    ]
    wheels.write_text("".join(f"{GPU_LOCK[name]}\n" for name in sorted(GPU_LOCK.keys() - LOCK.keys())))
    command = [uv, "pip", "install", "--dry-run", "--no-deps", "--only-binary", ":all:", "--requirements", wheels]
    subprocess.run(
        [*map(str, command), *platform, "--target", str(tmp_path / "packages")], check=True, timeout=patient(600)
    )


def test_the_project_is_installed_with_its_entry_points():
    from importlib.metadata import entry_points

    try:
        version("megatron-hapo")
    except PackageNotFoundError:
        pytest.fail("megatron-hapo is not installed: run `make setup`")
    names = {(point.group, point.name) for point in entry_points() if point.value.startswith(("megatron_", "sglang_"))}
    assert {("console_scripts", "megatron-hapo"), ("sglang.srt.plugins", "megatron_hapo")} <= names
