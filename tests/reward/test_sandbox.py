"""Tests of the sandbox with code that runs in it; the attempts are in tests/reward/attempts.py."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from megatron_hapo.errors import RewardError
from megatron_hapo.reward import pool as pool_module
from megatron_hapo.reward import syscall_filter
from megatron_hapo.reward.sandbox import Isolation, python_paths
from megatron_hapo.reward.worker import Job, parse_outcome
from megatron_hapo.reward.worker_pool import WorkerPool
from tests.reward.test_hostile import descendants

ATTEMPTS = Path(__file__).with_name("attempts.py")
NOBODY = 65534

READING = {"read_secret_file", "list_home", "see_secret_file", "read_users"}
STARTING = {"fork", "fork_by_clone3", "start_thread"}
NOT_PREVENTED = {
    # Disabled layers: the attempts that may succeed without them.
    (): set(),
    ("landlock",): set(),
    ("namespaces",): {"see_secret_file"},
    # Only Yama or its own permissions then protect the memory of a driver of the same user.
    ("namespaces", "landlock"): READING | {"read_driver_memory", "read_driver_environment"},
    # Processes end with the call, and private memory is harmless.
    ("landlock", "seccomp"): STARTING | {"io_uring", "memory_file"},
}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """Servers, files and memory that the attempts target."""
    folder = tmp_path_factory.mktemp("surroundings")
    for path in (folder, *list(folder.parents)[:2]):  # pytest's folders are closed to other users
        path.chmod(0o755)
    home = folder / "home"
    home.mkdir()
    (home / "secret").write_text("a secret")
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    memory = ctypes.CDLL(None).shmget(0, 4096, 0o1666)  # IPC_PRIVATE: reached by its id
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        unix.listen()
        with socket.socket(socket.AF_UNIX) as abstract:
            name = f"hapo-{os.getpid()}"
            abstract.bind("\0" + name)
            abstract.listen()
            yield {
                "port": tcp.getsockname()[1],
                "unix": str(folder / "socket"),
                "abstract": name,
                "canary": str(folder / "open" / "canary"),
                "victim": str(folder / "open" / "victim"),
                "secret": str(home / "secret"),
                "driver": os.getpid(),
                "shared_memory": memory,
                "scratch": None,
            }
    ctypes.CDLL(None).shmctl(memory, 0, None)  # IPC_RMID


def try_everything(surroundings, *, off: tuple[str, ...] = (), user: int | None = None) -> set[str]:
    """The attempts that succeeded with these layers of isolation disabled."""
    Path(surroundings["victim"]).write_text("")
    Path(surroundings["victim"]).chmod(0o666)
    facts = json.dumps(surroundings | {"off": off, "user": user})
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("WANDB_API_KEY", None)  # removing it is the pool's task, not the sandbox's
    command = [sys.executable, str(ATTEMPTS), facts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    missing = [layer for layer, fault in report["isolation"].items() if fault and layer not in off]
    if missing:
        pytest.skip(f"this system does not offer {', '.join(missing)}: {report['isolation']}")
    assert report["alive"] == "alive", "an attempt harmed the inner process"
    assert not any(result.startswith("exit code") for result in report["results"].values()), report["results"]
    return {name for name, result in report["results"].items() if result == "done"}


@pytest.mark.parametrize("user", [None, NOBODY])
@pytest.mark.parametrize("off", list(NOT_PREVENTED), ids="-".join)
def test_the_sandbox_prevents_the_attempts(surroundings, off, user):
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user; the other case ran as an ordinary one")
    assert try_everything(surroundings, off=off, user=user) <= NOT_PREVENTED[off]
    assert not Path(surroundings["canary"]).exists()


def test_the_attempts_succeed_where_nothing_confines_them(surroundings):
    done = try_everything(surroundings, off=("namespaces", "landlock", "seccomp"))
    for name in ("canary", "canary-link"):
        Path(surroundings["canary"]).with_name(name).unlink()
    expected = {"connect_tcp", "connect_unix", "connect_abstract", "send_udp", "kill_driver", "shared_memory"}
    expected |= READING | {"change_mode", "link_file", "delete_file", "limit_driver", "signal_by_fcntl", "memory_file"}
    assert done >= expected


def run_confined(source: str, *, before: str = "", policy: str = "", timeout: float = 60.0) -> str:
    """What a program prints that enters a sandbox, named `sandbox`, and then runs `source`."""
    program = textwrap.dedent(
        """
        import json, os, sys, time
        from pathlib import Path
        from megatron_hapo.reward import sandbox as room
        {before}
        lifeline, kept = os.pipe()
        policy = room.Policy(readable=room.python_paths(), memory_bytes=1 << 30, {policy})
        sandbox = room.enter_sandbox(policy, lifeline=lifeline)
        """
    ).format(before=before, policy=policy) + textwrap.dedent(source)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_call_starts_from_the_same_state():
    printed = run_confined("""
        state = [0]
        def call():
            state[0] += 1
            room.Policy = None
            os.environ["X"] = "1"
            return json.dumps([state, room.Policy is None, "X" in os.environ]).encode()
        for _ in range(3):
            print(sandbox.run(call, timeout_seconds=5).output.decode())
    """)
    assert printed.splitlines() == ["[[1], true, true]"] * 3


def test_a_call_ends_at_its_exit_its_deadline_or_its_output_limit():
    printed = run_confined("""
        def spin():
            while True: pass
        def close():
            os.close(3)
            time.sleep(60)
        calls = {
            "fine": lambda: b"x" * 10, "spin": spin, "sleep": lambda: time.sleep(60), "close": close,
            "exit": lambda: os._exit(3), "memory": lambda: bytearray(1 << 40), "raise": lambda: 1 / 0,
            "much": lambda: b"x" * (1 << 20), "leave": lambda: sys.exit(0),
        }
        for name, call in calls.items():
            start = time.monotonic()
            ending = sandbox.run(call, timeout_seconds=0.5, max_bytes=10)
            assert time.monotonic() - start < 5
            print(name, len(ending.output), ending.exit_code, ending.late)
    """)
    assert printed.splitlines() == [
        "fine 10 0 False",
        "spin 0 -9 True",
        "sleep 0 -9 True",
        "close 0 -9 False",
        "exit 0 3 False",
        "memory 0 77 False",
        "raise 0 1 False",
        "much 10 -9 False",
        "leave 0 1 False",
    ]


def test_processes_of_a_call_end_with_it():
    printed = run_confined(
        """
        def call():
            for _ in range(5):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(600)
            return b"started"
        import resource
        room._lower_limit = lambda limit, value: None if limit == resource.RLIMIT_NPROC else lower(limit, value)
        print(sandbox.isolation.namespaces, sandbox.run(call, timeout_seconds=5).output.decode())
        try:
            os.kill(-1, 0) if os.getpid() == 1 else None
            print("processes are left")
        except ProcessLookupError:
            print("no process is left")
        """,
        before="lower = room._lower_limit; found = room.probe\n"
        "room.probe = lambda policy: room.Isolation(**{**vars(found(policy)), 'seccomp': 'off', 'landlock': 'off'})",
    )
    if not printed.startswith(" "):
        pytest.skip("this system does not offer namespaces")
    assert printed.splitlines() == [" started", "no process is left"]


def test_only_the_scratch_folder_is_writable(tmp_path):
    (tmp_path / "scratch").mkdir()
    printed = run_confined(
        f"""
        def call():
            Path("a").write_text("made")
            os.mkdir("folder")
            os.rename("a", "folder/a")
            found = [Path("{tmp_path}/scratch/folder/a").read_text()]
            for path in ("{tmp_path}/beside", "{tempfile.gettempdir()}/beside"):
                try:
                    Path(path).write_text("x")
                    found.append("written")
                except OSError:
                    found.append("refused")
            try:
                Path("large").write_bytes(bytes(2000))
            except OSError:
                found.append("too large")
            return " ".join(found).encode()
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        print(sandbox.run(call, timeout_seconds=5).output.decode())
        """,
        policy=f"scratch=Path('{tmp_path}/scratch'), scratch_bytes=1000",
    )
    assert printed == "made refused refused too large\n"
    assert (tmp_path / "scratch" / "folder" / "a").read_text() == "made"


@pytest.mark.parametrize("ending", ["killed", "closed"])
def test_a_sandbox_ends_with_its_parent(ending, tmp_path):
    program = textwrap.dedent("""
        import os, sys, time
        from megatron_hapo.reward import sandbox as room
        policy = room.Policy(readable=room.python_paths(), memory_bytes=1 << 30)
        sandbox = room.enter_sandbox(policy, lifeline=0)
        def call():
            os.write(3, b"x")
            time.sleep(600)
        print("ready", flush=True)
        sandbox.run(call, timeout_seconds=600)
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    before = descendants()
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=theirs.fileno(), stdout=subprocess.PIPE, text=True, env=environment
        ) as process,
    ):
        theirs.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        inside = sorted(set(descendants()) - {*before, process.pid})
        time.sleep(0.2)
        inside = sorted({*inside, *(set(descendants()) - {*before, process.pid})})
        assert len(inside) == 2, "the inner process and its child"
        if ending == "killed":
            process.send_signal(signal.SIGKILL)
        else:
            ours.close()
        process.wait(timeout=10)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]


def test_only_modules_of_a_folder_on_the_path_are_readable(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "key.txt").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    paths = python_paths()
    assert [path.name for path in paths if tmp_path in path.parents] == ["module.py", "package"]
    assert not {Path("/"), Path.home(), Path.cwd(), tmp_path} & set(paths)


def test_the_system_call_numbers_match_the_kernel_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"no {header}")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    allowed = syscall_filter.COMPUTING | syscall_filter.WRITING
    assert {name: int(numbers[name]) for name in allowed} == allowed


# --- in the pool


@pytest.fixture
def runs_responses(tmp_path, monkeypatch) -> str:
    """A scorer module that runs the response as a program; the score is what it stores in `result`."""
    (tmp_path / "runs_responses.py").write_text(
        "def resolve_scorer(scorer, data_source): return scorer\n"
        "def evaluates(scorer, data_source): return scorer == 'math'\n"
        "def preload(scorer): pass\n"
        "def settle(response, ground_truth, data_source, *, scorer): return None\n"
        "def answer_of(response, data_source, *, scorer): return response\n"
        "def score(response, ground_truth, data_source, *, scorer):\n"
        "    names = {}\n"
        "    exec(response, names)\n"
        "    return names['result']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "runs_responses"


def run_responses(module: str, *responses: str, scorer: str = "exact", allow_unisolated: bool = False):
    pool = WorkerPool(
        num_workers=1, timeout_seconds=5.0, memory_bytes=1 << 30, module=module, allow_unisolated=allow_unisolated
    )
    try:
        return pool.run([Job(text, "1", "any", scorer) for text in responses])  # pyright: ignore[reportArgumentType]
    finally:
        pool.close()


def test_no_variable_of_the_environment_reaches_a_worker(runs_responses, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    known = "{'LANG', 'LC_ALL', 'LC_CTYPE', 'LD_LIBRARY_PATH', 'TZ', 'PYTHONPATH', 'OMP_NUM_THREADS',"
    known += " 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'}"
    (outcome,) = run_responses(runs_responses, f"import os; result = float(set(os.environ) <= {known})")
    assert outcome.correctness == 1.0


@pytest.mark.parametrize("result", ["2.0", "-1.0", "float('nan')", "float('inf')", "'1'", "None", "10**400"])
def test_a_score_outside_0_to_1_is_a_failure_of_its_response(runs_responses, result):
    bad, good = run_responses(runs_responses, f"result = {result}", "result = 0.5")
    assert (bad.correctness, bad.failure) == (0.0, "crash")
    assert (good.correctness, good.failure) == (0.5, None)


@pytest.mark.parametrize(
    "forged", ["b's'", "b's' + bytes([255]) * 8", "b's' + bytes(9)", "b'x' * 9", "b''", "b'f' + bytes([255]) * 100"]
)
def test_a_forged_answer_affects_only_its_own_response(runs_responses, forged):
    forge = f"import os; os.write(3, {forged}); os._exit(0)"
    outcomes = run_responses(runs_responses, forge, "result = 0.25", forge, "result = 0.75")
    assert [o.correctness for o in outcomes[1::2]] == [0.25, 0.75]
    assert [(o.correctness, o.failure) for o in outcomes[::2]] == [(0.0, "crash")] * 2
    assert all(o.reason.isprintable() for o in outcomes)


@pytest.mark.parametrize(
    "message",
    [[1.0, None], [2.0, None, ""], [True, None, ""], ["1", None, ""], [0.0, "bad", ""], [0.0, None, "x" * 999], {}, 1],
)
def test_an_outcome_from_a_worker_is_validated(message):
    with pytest.raises(ValueError, match=r"outcome|score"):
        parse_outcome(message)


def test_evaluating_scorers_are_refused_without_isolation(runs_responses, monkeypatch, tmp_path):
    # A module on the worker's path that disables its isolation.
    (tmp_path / "sitecustomize.py").write_text(
        "from megatron_hapo.reward import sandbox\n"
        "sandbox.probe = lambda policy: sandbox.Isolation(namespaces='EPERM', landlock='ENOSYS', seccomp='EINVAL')\n"
    )
    message = (
        r"Answers to any .*no namespaces \(EPERM\), no Landlock \(ENOSYS\), no seccomp \(EINVAL\)"
        r".*reward\.allow_unisolated=true"
    )
    with pytest.raises(RewardError, match=message):
        run_responses(runs_responses, "result = 1.0", scorer="math")
    assert run_responses(runs_responses, "result = 1.0", scorer="exact")[0].correctness == 1.0
    assert run_responses(runs_responses, "result = 1.0", scorer="math", allow_unisolated=True)[0].correctness == 1.0


def test_the_isolation_is_described_in_one_line():
    everything = Isolation(namespaces="", landlock="", seccomp="")
    assert str(everything) == "namespaces, Landlock, seccomp"
    little = Isolation(namespaces="Operation not permitted", landlock="not in this kernel", seccomp="")
    assert str(little) == (
        "no namespaces (Operation not permitted), no Landlock (not in this kernel), seccomp; "
        "files can be read, but not written"
    )
    assert pool_module.unisolated_message("Answers", little).startswith("Answers would be passed to parsers")
