"""Responses that try to run code, to change scores, to escape, or to overload the scorer."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_hapo.data.reasoning_tasks import encode_task, import_reasoning_gym
from megatron_hapo.reward.answer_grammar import EVALUATED_TASKS
from megatron_hapo.reward.worker import Job

SECRET = "secret-of-the-driver"
"""Value of WANDB_API_KEY in the environment of the pool's process."""

_SCORERS_PATCHED = "__import__('megatron_hapo.reward.scorers').reward.scorers"

PAYLOADS = {
    # Code that earlier versions ran; `{canary}` must not exist afterwards. A theft that succeeds evaluates to True.
    "system": "__import__('os').system('touch {canary}')",
    "popen": "__import__('os').popen('touch {canary}').read()",
    "subprocess": "__import__('subprocess').run(['touch', '{canary}'])",
    "spawn": "__import__('os').posix_spawn('/bin/touch', ['touch', '{canary}'], {{}})",
    "open": "open('{canary}', 'w').write('x')",
    "open_cwd": "open('hostile-canary', 'w').write('x')",
    "open_home": "open(__import__('os').path.expanduser('~/hostile-canary'), 'w').write('x')",
    "open_tmp": "open('/tmp/hostile-canary', 'w').write('x')",
    "open_shm": "open('/dev/shm/hostile-canary', 'w').write('x')",
    "path": "__import__('pathlib').Path('{canary}').touch()",
    "exec": "exec('import os; os.mkdir(\"{canary}\")')",
    "eval": "eval(compile('open(\"{canary}\", \"w\")', 'x', 'eval'))",
    "lambda": "(lambda: open('{canary}', 'w'))()",
    "comprehension": "[open(path, 'w') for path in ['{canary}']]",
    "walk": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', '{canary}'])",
    "walk_globals": "[c for c in ().__class__.__base__.__subclasses__() if 'warnings' in str(c)][0].__init__"
    ".__globals__['sys'].modules['os'].system('touch {canary}')",
    "format": "'{{0.__class__}}'.format(open('{canary}', 'w'))",
    "builtins": "(__builtins__ if type(__builtins__) is dict else vars(__builtins__))['open']('{canary}', 'w')",
    "ctypes": "__import__('ctypes').CDLL(None).system(b'touch {canary}')",
    "pickle": "__import__('pickle').loads(b\"cos\\nsystem\\n(S'touch {canary}'\\ntR.\")",
    "quoted_call": "'open(chr(99), chr(119))'",
    "sympify": "__import__('sympy').sympify(\"open('{canary}', 'w')\")",
    "database": "__import__('sqlite3').connect('{canary}').execute('create table x (y)')",
    # Changes that would outlive the response.
    "patch_scorer": f"setattr({_SCORERS_PATCHED}, 'score', lambda *a, **k: 1.0)",
    "patch_settle": f"setattr({_SCORERS_PATCHED}, 'settle', lambda *a, **k: 1.0)",
    "patch_float": "setattr(__import__('builtins'), 'float', lambda x=0: 1.0)",
    "patch_modules": "__import__('sys').modules.clear()",
    "patch_struct": "setattr(__import__('struct').Struct, 'pack', None)",
    "patch_tasks": "[setattr(d[0], 'score_answer', lambda *a: 1.0) for d in"
    " __import__('reasoning_gym').factory.DATASETS.values()]",
    "patch_collector": "[d.clear() for d in __import__('gc').get_objects() if type(d) is dict and 'loaded' in d]",
    "patch_random": "__import__('random').seed(0)",
    # Thefts.
    "steal_environ": f"{SECRET!r} in str(__import__('os').environ) or None",
    "steal_proc": f"{SECRET!r} in open('/proc/self/environ').read()",
    "steal_driver": f"{SECRET!r} in open('/proc/{{pid}}/environ').read()",
    "steal_memory": "bool(open('/proc/{pid}/mem', 'rb'))",
    "steal_parent": "bool(open('/proc/%d/mem' % __import__('os').getppid(), 'rb'))",
    "steal_home": "bool(__import__('os').listdir(__import__('os').path.expanduser('~')))",
    "steal_passwords": "bool(open('/etc/passwd').read())",
    # Processes.
    "fork_bomb": "[__import__('os').fork() for _ in range(20)]",
    "fork_and_stay": "__import__('os').fork() or __import__('time').sleep(3600)",
    "kill_parent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "kill_driver": "__import__('os').kill({pid}, 9)",
    "kill_all": "__import__('os').kill(-1, 9)",
    "kill_group": "__import__('os').killpg(0, 9)",
    "stop_parent": "__import__('os').kill(__import__('os').getppid(), 19)",
    "trace": "__import__('ctypes').CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "thread": "__import__('threading').Thread(target=print).start()",
    "ignore_signals": "[__import__('signal').signal(n, 1) for n in (1, 2, 15)] and __import__('time').sleep(3600)",
    # Network.
    "tcp": "bool(__import__('socket').create_connection(('127.0.0.1', 22), 1))",
    "unix": "bool(__import__('socket').socket(1).connect('/run/dbus/system_bus_socket'))",
    "abstract": "bool(__import__('socket').socket(1).bind(chr(0) + 'hostile'))",
    "dns": "bool(__import__('socket').gethostbyname('localhost'))",
    "fetch": "bool(__import__('urllib.request').request.urlopen('http://127.0.0.1/'))",
    # Forged results.
    "write_everywhere": "[__import__('os').write(fd, b's' + b'?' + bytes(7)) for fd in (0, 1, 2, 3)]",
    "write_frames": "[__import__('os').write(fd, b'{{\"ready\": 1}}') for fd in range(3, 6)]",
    "print": "print('[1.0, null, \"\"]' * 1000)",
    "exit": "__import__('os')._exit(0)",
    "exit_code": "__import__('os')._exit(78)",
    "system_exit": "__import__('sys').exit()",
    "abort": "__import__('os').abort()",
    "segfault": "__import__('ctypes').string_at(0)",
    "close": "__import__('os').closerange(0, 256)",
    # Time and memory.
    "loop": "[None for _ in iter(int, 1)]",
    "sleep": "__import__('time').sleep(3600)",
    "power": "9**9**9",
    "power_of_power": "(9**999)**9999999",
    "factorial": "__import__('math').factorial(10**9)",
    "memory": "bytearray(1 << 40)",
    "memory_slowly": "'x' * (1 << 33)",
    "output": "__import__('os').write(3, b'1' * (1 << 20))",
    "huge_repr": "int('9' * 4000)",
    "recursion": "(lambda f: f(f))(lambda f: f(f))",
    "regex": "__import__('re').match('(a+)+$', 'a' * 40 + 'b')",
}
"""Python expressions by name."""

ODDITIES = {
    "nul": "\0" * 100,
    "nul_inside": "1\x002",
    "surrogates": "\ud800\udfff" * 50,
    "nesting": "[" * 100_000,
    "parentheses": "(" * 5000 + "1" + ")" * 5000,
    "braces": "{" * 300,
    "fractions": "\\frac{" * 50,
    "giant": "9" * 1_000_000,
    "giant_sum": "+".join(["9"] * 200_000),
    "minus": "-" * 100_000 + "1",
    "tower": "9^{9^{9^{9}}}",
    "factorials": "9!!!!!!!!!!",
    "latex_input": "\\input{/etc/passwd}",
    "latex_write": "\\write18{touch canary}",
    "newlines": "answer\n" * 20_000,
    "answers": "answer:" * 20_000,
    "tags": "<answer>" * 20_000,
    "escape_codes": "\x1b[2J\x1b]0;owned\x07",
    "emoji": "\U0001f4a3" * 1000,
    "json": '{"a": ' * 5000,
    "nan": "nan",
    "infinity": "inf",
    "exponent": "1e999999999",
    "outcome": '[1.0, null, ""]',
}


def payloads(canary: Path, driver: int) -> dict[str, str]:
    """The payloads, with the canary's path and the driver's process id filled in."""
    return {name: text.format(canary=canary, pid=driver) for name, text in PAYLOADS.items()}


def task_job(dataset: str, response: str) -> Job:
    """A response to a dataset's first task."""
    entry = import_reasoning_gym().create_dataset(dataset, size=1, seed=1)[0]
    truth = encode_task(answer=str(entry["answer"]), index=0, size=1, seed=1, options={})
    return Job(response, truth, f"reasoning_gym/{dataset}", "auto")


def right_answer(dataset: str) -> Job:
    """The response that gives a dataset's own answer to its first task."""
    job = task_job(dataset, "")
    return Job(f"<answer>{json.loads(job.ground_truth)['answer']}</answer>", *list(vars(job).values())[1:])


def hostile_jobs(canary: Path, driver: int) -> list[Job]:
    """Every payload as an answer for some scorers, and every oddity for scorers of all kinds."""
    datasets = sorted(EVALUATED_TASKS)
    truths = {name: task_job(name, "") for name in (*datasets, "number_sorting", "jugs", "propositional_logic")}
    jobs = []
    for number, text in enumerate(payloads(canary, driver).values()):
        for dataset in (datasets[number % 9], datasets[(number + 4) % 9]):
            job = truths[dataset]
            jobs.append(Job(f"<answer>{text}</answer>", job.ground_truth, job.data_source, "auto"))
        jobs.append(Job(f"Answer: {text}", "31337", "math_dapo", "auto"))
    for number, text in enumerate(ODDITIES.values()):
        for dataset in (datasets[number % 9], ("number_sorting", "jugs", "propositional_logic")[number % 3]):
            job = truths[dataset]
            jobs.append(Job(f"<answer>{text}</answer>", job.ground_truth, job.data_source, "auto"))
        jobs.append(Job(f"so \\boxed{{{text}}}", "1", "math_dapo", "auto"))
        jobs.append(Job(f"Answer: {text}", "31337", "arithmetic", "auto"))
    for job in truths.values():
        jobs.append(Job("<answer>" * 20_000, job.ground_truth, job.data_source, "auto"))
    return jobs
