"""Hostile inputs for every command: one line and exit code 2, or accepted and listed as right. Nothing hangs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hapo import cli
from tests.fuzz.inputs import CONFIG, ROW, Case, cases
from tests.tiny_model import write_tiny_qwen3

CASES = list(cases())
ACCEPTED = set((Path(__file__).parent / "accepted.txt").read_text().splitlines())
"""Names of the inputs that are valid, each of them looked at: values in range, and files that no command reads."""
HANG_SECONDS = 60.0
SECRET = "correct-horse"


class StartedError(BaseException):
    """Everything has been checked; the run would start now."""


class HungError(BaseException):
    """An input takes too long."""


def start(*arguments: object, **options: object) -> None:
    raise StartedError


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory) -> Path:
    """A folder whose run passes every check."""
    import json

    folder = tmp_path_factory.mktemp("sound")
    write_tiny_qwen3(folder / "model")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "train.jsonl").write_text(2 * (json.dumps(ROW) + "\n"))
    (folder / "secret").write_text(f"{SECRET}:x:0\n{SECRET}: [")
    (folder / "secret.yaml").write_text(f"{SECRET}:x:0\n'{SECRET}: *{SECRET}")
    (folder / "link.yaml").symlink_to(folder / "secret")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    return folder


@pytest.fixture
def stubs(monkeypatch) -> None:
    """Every command ends with StartedError where its work would begin."""
    from megatron_hapo.checkpoint import convert, quantize
    from megatron_hapo.checks import own_rewards
    from megatron_hapo.data import chat_template
    from megatron_hapo.launch import evaluate_models, generate, run
    from megatron_hapo.launch.compare import runs

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(run, "open_parts", start)
    monkeypatch.setattr(runs, "run_all", start)
    monkeypatch.setattr(evaluate_models, "local_ray", start)
    monkeypatch.setattr(generate, "local_ray", start)
    monkeypatch.setattr(convert, "_convert", start)
    monkeypatch.setattr(quantize, "_quantize_folder", lambda job, source, folder: start(quantize._prompts(job, source)))
    monkeypatch.setattr(chat_template, "SECONDS", 3.0)
    monkeypatch.setattr(own_rewards, "JUDGE_SECONDS", 0.05)


def outcome(argv: tuple[str, ...]) -> str:
    """accepted, rejected, or what went wrong."""

    def hang(*_: object) -> None:
        raise HungError

    previous = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        code = cli.main(argv)
    except StartedError:
        return "accepted"
    except SystemExit as error:  # argparse
        code = error.code
    except HungError:
        return f"hung for {HANG_SECONDS} s"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return {0: "accepted", 2: "rejected"}.get(code, f"exit code {code}")


def fault_of(case: Case, sound_run: Path, folder: Path, capsys) -> str | None:
    """What is wrong with the handling of an input; None if nothing is."""
    shutil.copytree(sound_run, folder, symlinks=True, copy_function=os.link)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".safetensors":
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    os.chdir(folder)
    case.prepare(folder)
    seen = outcome(case.argv)
    error = capsys.readouterr().err
    if seen == "accepted":
        return None if case.name in ACCEPTED else "accepted, and not listed as right"
    if seen != "rejected":
        return seen
    if case.name in ACCEPTED:
        return f"rejected, but listed as right: {error[:300]}"
    lines = [line for line in error.splitlines() if not line.startswith(("INFO", "WARNING"))]
    if not lines or "Traceback" in error or not all(line.isprintable() and len(line) < 2500 for line in lines):
        return f"not in readable lines: {error[:300]!r}"
    return f"quotes a file that is not its own: {error[:300]}" if SECRET in error else None


@pytest.fixture
def in_place(tmp_path) -> Iterator[Path]:
    """A folder for the inputs; the current directory is restored afterwards."""
    here = Path.cwd()
    yield tmp_path
    os.chdir(here)


def test_there_are_enough_inputs_and_all_names_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 500
    assert {case.name for case in CASES} >= ACCEPTED


@pytest.mark.parametrize("part", range(8))
def test_no_input_ends_in_a_traceback_or_hangs(sound_run, stubs, in_place, capsys, part):
    faults = {}
    for number, case in enumerate(CASES[part::8]):
        begin = time.monotonic()
        if (fault := fault_of(case, sound_run, in_place / str(number), capsys)) is not None:
            faults[case.name] = f"{fault} ({time.monotonic() - begin:.1f} s)"
    assert not faults, f"{len(faults)} inputs:\n" + "\n".join(f"{name}: {fault}" for name, fault in faults.items())


@pytest.mark.parametrize(
    "argv",
    [("train", "run.yaml", "seed=inf"), ("train", "secret"), ("plan", "--gpus=1e9"), ("report", "\udcff")],
)  # fmt: skip
def test_the_program_itself_ends_with_code_2(sound_run, argv):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hapo", *argv], cwd=sound_run, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
