import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hapo.config import ArithmeticData, Fault, FileData, dump_config, load_config, read_config
from megatron_hapo.errors import ConfigError

MINIMAL = """
name: small
steps: 3
model: {path: models/tiny}
data: {train: {type: arithmetic, size: 100}}
"""

ASYNC = ("async.max_staleness=1", "algorithm.importance_correction.level=token")


def write(folder: Path, text: str = MINIMAL, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    """The faults that load_config reports, with file names instead of paths."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [fault.replace(f"{path.parent}/", "") for fault in caught.value.faults]


def test_importing_the_config_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'megatron', 'sglang', 'transformers', 'numpy'}"
    code = f"import sys, megatron_hapo.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_file_and_then_the_overrides_replace_defaults(tmp_path):
    path = write(tmp_path, MINIMAL + "optimizer: {lr: 1e-5, beta1: 0.8}\n")
    config = load_config(path, ["optimizer.lr=2e-6", "rollout.stop_token_ids=[1,2]", "name=other"])
    assert (config.optimizer.lr, config.optimizer.beta1, config.optimizer.beta2) == (2e-6, 0.8, 0.999)
    assert config.rollout.stop_token_ids == (1, 2)
    assert config.run_dir == Path("runs/other")


def test_a_file_builds_on_its_bases_in_order(tmp_path):
    write(tmp_path, MINIMAL + "seed: 1\noptimizer: {lr: 1e-5}\n", "first.yaml")
    write(tmp_path, "seed: 2\noptimizer: {beta1: 0.5}\n", "second.yaml")
    config = load_config(write(tmp_path, "base: [first.yaml, second.yaml]\nsteps: 9\n"))
    assert (config.seed, config.steps, config.optimizer.lr, config.optimizer.beta1) == (2, 9, 1e-5, 0.5)


def test_a_section_of_another_type_does_not_inherit_the_old_types_settings(tmp_path):
    write(tmp_path, MINIMAL, "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\ndata: {train: {type: file, path: x.jsonl}}\n"))
    assert isinstance(config.data.train, FileData)
    kept = load_config(write(tmp_path, "base: base.yaml\ndata: {train: {seed: 4}}\n"))
    assert isinstance(kept.data.train, ArithmeticData)
    assert (kept.data.train.size, kept.data.train.seed) == (100, 4)


def test_overrides_beside_a_type_count_in_any_order(tmp_path):
    path = write(tmp_path)
    train = load_config(path, ["data.train.size=77", "data.train.type=arithmetic", "data.train.seed=4"]).data.train
    assert (train.size, train.seed) == (77, 4)
    fresh = load_config(path, ["data.train.limit=5", "data.train.type=file", "data.train.path=x.jsonl"]).data.train
    assert fresh == FileData(type="file", path=Path("x.jsonl"), limit=5)
    assert load_config(path, ["data.train.path=x.jsonl", "data.train.type=file"]).data.train.limit is None


def test_a_setting_of_another_type_and_a_value_that_must_be_a_list_are_explained(tmp_path):
    assert faults_of(write(tmp_path), "data.train.limit=3", "profile.steps=2") == [
        "command line: data.train.limit: unknown key; it belongs to another data.train.type",
        "command line: profile.steps: must be a list, e.g. [2]",
    ]


def test_a_dumped_config_loads_as_the_same_config(tmp_path):
    config = load_config(write(tmp_path), ["rollout.stop_token_ids=[7]", "data.eval={type: file, path: a.parquet}"])
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_all_faults_come_at_once_and_name_their_origin(tmp_path):
    write(tmp_path, MINIMAL + "algorithm: {clip_low: 1.5}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nbatch: {prompts_per_step: 10, prompts_per_minibatch: 4}\nstep: 3\n")
    assert faults_of(path, "algorithm.clip_high=-0.2", "algorithm.entropy.sign=positive", "parallel.tp=two") == [
        "command line: parallel.tp: must be a whole number, got 'two'",
        "base.yaml: algorithm.clip_low: must be at most 1, got 1.5",
        "command line: algorithm.clip_high: must be greater than 0, got -0.2",
        "command line: algorithm.entropy.sign: must be 'signed' or 'reference', got 'positive'",
        "run.yaml: step: unknown key; did you mean steps?",
        "run.yaml: batch.prompts_per_minibatch: must divide batch.prompts_per_step=10, got 4",
    ]


def test_unknown_keys_get_a_suggestion_at_any_depth(tmp_path):
    path = write(tmp_path, MINIMAL.replace("size: 100", "size: 100, max_term: 4") + "clip_high: 0.3\n")
    assert faults_of(path, "algorithm.entropy.pivott=0.7", "parallel.qqq=1") == [
        "command line: parallel.qqq: unknown key; allowed here: tp, pp, vpp, first_stage_layers, last_stage_layers, "
        "cp, dp, ep, etp, sequence_parallel, gpu_memory",
        "command line: algorithm.entropy.pivott: unknown key; did you mean pivot?",
        "run.yaml: data.train.max_term: unknown key; did you mean max_terms?",
        "run.yaml: clip_high: unknown key; did you mean algorithm.clip_high?",
    ]


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        (
            "{type: arithmetik, size: 1}",
            "type: must be one of 'file', 'reasoning_gym', 'arithmetic', 'checked_sums', got 'arithmetik'",
        ),
        ("{size: 1}", "type: is required"),
        ("{type: file}", "path: is required"),
        ("{type: arithmetic, size: 5, min_terms: 6}", "min_terms: must be at most data.train.max_terms=5, got 6"),
    ],
)
def test_faults_of_a_choice_by_type_name_the_plain_key(tmp_path, train, fault):
    path = write(tmp_path, MINIMAL.replace("{type: arithmetic, size: 100}", train))
    assert faults_of(path) == [f"run.yaml: data.train.{fault}"]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["batch.samples_per_prompt=1"], "batch.samples_per_prompt: must be at least 2, got 1"),
        (
            ["batch.samples_per_prompt=1", "algorithm.advantage=group_mean"],
            "batch.samples_per_prompt: must be at least 2, got 1: algorithm.advantage=group_mean compares",
        ),
        (
            ["reward.overlong.buffer_tokens=10240"],
            "reward.overlong.buffer_tokens: must be less than rollout.max_response_tokens=10240, got 10240",
        ),
        (
            ["algorithm.entropy.source=micro_batch", "parallel.cp=2"],
            "algorithm.entropy.source: must be old or current with parallel.cp=2, got micro_batch",
        ),
        (
            ["algorithm.importance_correction.max_weight=3"],
            "algorithm.importance_correction.max_weight: has no effect: algorithm.importance_correction.level is none",
        ),
        (
            ["algorithm.dual_constraint.kl=0.1"],
            "algorithm.dual_constraint.kl: has no effect: algorithm.dual_constraint.enabled is false",
        ),
        (["weight_sync.in_flight=pause"], "weight_sync.in_flight: has no effect: async.max_staleness is 0"),
        (["async.stale_groups=drop"], "async.stale_groups: has no effect: async.max_staleness is 0"),
        (["parallel.vpp=2"], "parallel.vpp: needs parallel.pp of at least 2, got 2"),
        (["parallel.last_stage_layers=1"], "parallel.last_stage_layers: needs parallel.pp of at least 2, got 1"),
        (
            ["trainer.overlap_communication=true"],
            "trainer.overlap_communication: has no effect: parallel.dp and parallel.cp are 1",
        ),
        (
            ["device=cuda", "rollout.dtype=float32"],
            "rollout.dtype: must be bfloat16 with device=cuda, got float32: SGLang's attention on a GPU "
            "(Flash Attention 3) takes 16-bit types only",
        ),
        (
            ["trainer.quantization=fp8", "trainer.dtype=float32"],
            "trainer.quantization: fp8 needs trainer.dtype=bfloat16, got float32",
        ),
        (
            ["rollout.quantization=fp8", "rollout.dtype=float32"],
            "rollout.quantization: fp8 needs rollout.dtype=bfloat16, got float32: SGLang's float8 layers take 16-bit",
        ),
        (
            ["rollout.quantization=fp8", "weight_sync.method=gather"],
            "weight_sync.method: must be direct with rollout.quantization=fp8, got gather: SGLang cannot load whole",
        ),
        (
            ["rollout.quantization=fp8", "trainer.quantization=fp8"],
            "trainer.quantization: must be none with rollout.quantization=fp8, got fp8: the engines would round its",
        ),
        (["rollout.quantization=int8"], "rollout.quantization: must be 'none' or 'fp8', got 'int8'"),
        (
            ["deterministic=true", "rollout.tp=4", "device=cpu", "rollout.kv_cache_tokens=20000"],
            "rollout.tp: must be 1 or 2 with deterministic=true and device=cpu, got 4: the order in which gloo adds",
        ),
        (
            ["deterministic=true", *ASYNC, "weight_sync.in_flight=pause"],
            "weight_sync.in_flight: must be finish with deterministic=true, got pause: how far responses are when",
        ),
        (
            ["deterministic=true", *ASYNC, "async.stale_groups=drop"],
            "async.stale_groups: must be wait with deterministic=true, got drop: which groups finish too late",
        ),
        (
            ["deterministic=true", "reward.scorer=judge/one", "reward.judges={one: {url: 'http://h/v1', model: m}}"],
            "reward.judges: must be empty with deterministic=true, got one: a served model need not answer the same",
        ),
        (
            ["placement=colocated", "async.max_staleness=1", "algorithm.importance_correction.level=token"],
            "async.max_staleness: must be 0 with placement=colocated, got 1: engines that share the trainer's GPUs",
        ),
        (
            ["placement=colocated", "rollout.engines=2", "rollout.tp=2", "parallel.dp=3"],
            "rollout.engines: rollout.engines * rollout.tp must be at most the 3 trainer ranks",
        ),
        (
            ["placement=colocated", "launch.engines=own_nodes"],
            "launch.engines: must be trainer_nodes with placement=colocated, got own_nodes",
        ),
        (["memory_turns.engines=kv_cache"], "memory_turns.engines: has no effect: placement is disaggregated"),
        (
            ["optimizer.cpu_offload=true", "device=cpu", "rollout.kv_cache_tokens=20000"],
            "optimizer.cpu_offload: needs GPUs, got device=cpu",
        ),
        (
            ["optimizer.cpu_offload=true", "trainer.distributed_optimizer=false"],
            "optimizer.cpu_offload: needs trainer.distributed_optimizer=true, got false",
        ),
        (
            ["optimizer.cpu_offload=true", "trainer.dtype=float32"],
            "optimizer.cpu_offload: needs trainer.dtype=bfloat16, got float32",
        ),
        (
            ["launch.ray_worker_ports=[20000, 20010]", "rollout.engines=4"],
            "launch.ray_worker_ports: must span at least 14 ports, from the first to the last, got [20000, 20010]",
        ),
        (
            ["optimizer.schedule=cosine", "optimizer.warmup_steps=3"],
            "optimizer.warmup_steps: must be less than steps=3 with optimizer.schedule=cosine, got 3",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.warmup_steps=1", "optimizer.decay_steps=3"],
            "optimizer.decay_steps: must be at most steps - optimizer.warmup_steps = 2, got 3",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.warmup_steps=195", "steps=200"],
            "optimizer.decay_steps: must be at most steps - optimizer.warmup_steps = 5, got 20, a tenth of steps",
        ),
        (
            ["optimizer.schedule=linear", "optimizer.warmup_steps=0", "optimizer.min_lr=1e-5"],
            "optimizer.min_lr: must be at most optimizer.lr=1e-06, got 1e-05",
        ),
        (["optimizer.min_lr=1e-7"], "optimizer.min_lr: has no effect: optimizer.schedule is constant"),
        (
            ["optimizer.schedule=cosine", "optimizer.warmup_steps=0", "optimizer.decay_steps=1"],
            "optimizer.decay_steps: has no effect: optimizer.schedule is cosine",
        ),
        (
            ["algorithm.kl.enabled=true", "algorithm.kl.estimator=k1"],
            "algorithm.kl.estimator: must be k2 or k3 with algorithm.kl.where=loss, got k1: its gradient does not",
        ),
        (
            ["algorithm.kl.enabled=true", "algorithm.kl.horizon=5"],
            "algorithm.kl.horizon: has no effect: algorithm.kl.target is not set",
        ),
        (["reward.correct=-1"], "reward.correct: must be greater than reward.wrong=-1.0, got -1.0"),
        (["reward.scorer=reasoning_gym"], "reward.scorer: reasoning_gym cannot score data.train.type=arithmetic"),
        (
            ["rollout.kv_cache_tokens=99"],
            "rollout.kv_cache_tokens: must hold one prompt and response of max_prompt_tokens + max_response_tokens = "
            "11264, got 99",
        ),
        (["eval.samples=4", "eval.temperature=0", "data.eval={type: file, path: x}"], "eval.samples: must be 1 with"),
        (["eval.samples=4"], "eval.samples: has no effect: data.eval is not set"),
        (
            ["algorithm.redistribution.enabled=false", "algorithm.redistribution.beta=0.5"],
            "algorithm.redistribution.beta: has no effect: algorithm.redistribution.enabled is false",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(tmp_path, overrides, fault):
    (line,) = faults_of(write(tmp_path), *overrides)
    assert line.startswith(f"command line: {fault}")


def test_a_cpu_run_needs_the_size_of_the_kv_cache(tmp_path):
    path = write(tmp_path, MINIMAL + "device: cpu\n")
    assert faults_of(path) == ["run.yaml: rollout.kv_cache_tokens: is required with device=cpu"]
    assert load_config(path, ["rollout.kv_cache_tokens=20000"]).rollout.kv_cache_tokens == 20000


def test_a_rejected_setting_causes_no_second_fault(tmp_path):
    """Its default replaces it while the others are checked: 512 is not a multiple of 7 either."""
    path = write(tmp_path, MINIMAL + "batch: {prompts_per_step: -7, prompts_per_minibatch: 7}\n")
    assert faults_of(path) == ["run.yaml: batch.prompts_per_step: must be greater than 0, got -7"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: [1\n", "run.yaml: cannot be read: while parsing a flow sequence"),
        ("steps: 1\nsteps: 2\n", "run.yaml: cannot be read: while constructing a mapping"),
        ("- 1\n", "run.yaml: must be a mapping of settings, got a list"),
        ("base: none.yaml\n", "none.yaml: no such config file"),
        ("base: run.yaml\n", "run.yaml: base: the file builds on itself"),
        ("base: 3\n", "run.yaml: base: must be a file name or a list of file names, got 3"),
        (MINIMAL + "seed: ${sede}\n", "run.yaml: Interpolation key 'sede' not found"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, text, fault):
    (line,) = faults_of(write(tmp_path, text))
    assert line.startswith(fault)
    assert "\n" not in line


def test_a_missing_file_and_bad_overrides_are_one_line_each(tmp_path):
    assert faults_of(tmp_path / "none.yaml", "steps", "=3", "a..b=1", "steps=[1") == [
        "none.yaml: no such config file",
        "command line: steps: must have the form key=value, e.g. optimizer.lr=1e-6",
        "command line: =3: must have the form key=value, e.g. optimizer.lr=1e-6",
        "command line: a..b=1: must have the form key=value, e.g. optimizer.lr=1e-6",
        "command line: steps=[1: cannot be read: while parsing a flow sequence: expected ',' or ']', but got "
        "'<stream end>' in line 1, column 10",
    ]


def test_bases_that_double_at_every_level_are_refused_in_time(tmp_path):
    for level in range(30):
        write(tmp_path, f"base: [{level + 1}.yaml, {level + 1}.yaml]\n", f"{level}.yaml")
    write(tmp_path, MINIMAL, "30.yaml")
    assert any("files in all" in fault for fault in faults_of(tmp_path / "0.yaml"))


def test_missing_settings_are_reported_with_the_file(tmp_path):
    assert faults_of(write(tmp_path, "name: x\n")) == [
        "run.yaml: steps: is required",
        "run.yaml: model: is required",
        "run.yaml: data: is required",
    ]


def test_a_draft_takes_further_faults_before_it_is_accepted(tmp_path):
    draft = read_config(write(tmp_path, MINIMAL + "parallel: {tp: 3, pp: 0}\n"))
    found = [Fault("parallel.tp", "8 heads"), Fault("rollout.tp", "8 of pp", involves=("parallel.pp",))]
    with pytest.raises(ConfigError) as caught:
        draft.with_checks(found).accept()
    assert caught.value.faults == [
        f"{tmp_path}/run.yaml: parallel.pp: must be greater than 0, got 0",
        f"{tmp_path}/run.yaml: parallel.tp: 8 heads",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=inf", "optimizer.lr: must be a finite number, got 'inf'"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number, got inf"),
        ("reward.correct=.nan", "reward.correct: must be a finite number, got nan"),
        ("seed=1e30", "seed: must be a whole number of at most 64 bits, got 1e+30"),
        ("reward.workers=1000000000", "reward.workers: must be at most 1024, got 1000000000"),
        ("optimizer.lr=true", "optimizer.lr: must be a number, got True"),
        ("async.max_staleness=true", "async.max_staleness: must be a number, got True"),
        ("rollout.stop_token_ids=[true]", "rollout.stop_token_ids: must be a number, got [True]"),
        ("trainer.distributed_optimizer=1", "trainer.distributed_optimizer: must be true or false, got 1"),
        ("name=..", "name: must be the name of a folder, of at most 200 bytes, and not . or .., got '..'"),
        ("output_dir=" + "a" * 300, f"output_dir: is too long for a path, got '{'a' * 99}..."),
    ],
)
def test_a_value_without_sense_is_a_fault(tmp_path, override, message):
    (fault,) = faults_of(write(tmp_path), override)
    assert fault.startswith(f"command line: {message}")


def test_a_base_that_is_not_a_file_of_settings_is_not_quoted(tmp_path):
    secret = "correct-horse"
    files = {"shadow": f"{secret}:x", "a.yaml": f"{secret}:x", "b.yaml": f"a: *{secret}", "c.yaml": f"{secret}: 1"}
    for name, text in files.items():
        write(tmp_path, text, name)
        (fault,) = faults_of(write(tmp_path, MINIMAL + f"base: {name}\n"))
        assert secret not in fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: " + "[" * 5000, "nested more than 50 levels deep"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), "more than 100000"),
        (MINIMAL + "#" * (2 << 20), "more than 1048576 bytes"),
    ],
    ids=["deep nesting", "cycle", "alias bomb", "long file"],
)  # fmt: skip
def test_a_file_that_would_exhaust_the_parser_is_refused(tmp_path, text, fault):
    (message,) = faults_of(write(tmp_path, text))
    assert message.startswith("run.yaml: cannot be read: ")
    assert message.count(fault) == 1


def test_a_message_with_control_characters_is_still_one_line():
    assert ConfigError(["a\nb \x1b[31m \ud800"]).faults == ["a b \\x1b[31m \\ud800"]
