"""Hostile inputs for every command, drawn with fixed seeds: files and command lines that differ from a sound run."""
# ruff: noqa: E501

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hapo.config import Config
from megatron_hapo.config.experiment import Experiment
from megatron_hapo.config.section import fields_by_key, section_types
from tests.fuzz.record_inputs import NO_PARQUET, record_inputs

CONFIG = """
name: small
steps: 3
device: cpu
model: {path: model}
rollout: {max_prompt_tokens: 100, max_response_tokens: 400, kv_cache_tokens: 2000}
data: {train: {type: file, path: train.jsonl}}
"""
ROW = {"prompt": "1+1", "reward_model": {"ground_truth": "2"}, "data_source": "math_dapo"}
METRICS = {"step": 1, "reward/mean": 0.5, "time/step": 2.0, "temperature/mean": 1.0, "eval/accuracy": 0.5}
TRAIN = ("train", "run.yaml")
PLAN = ("plan", "--model", "model", "--gpus", "8")
HUGE = "9" * 5000
DEEP = "[" * 20_000

YAML_VALUES = (
    "true", "1", "-1", "0", "0.5", "1e30", ".inf", "-.inf", ".nan", "99999999999999999999999", "''", "[]", "{}", "null",
    "x", '"a\\nb"', "[1,[2]]", "2024-01-01", '"\\ud800"', '"\\0"', "[true]", "{1: 2}", "{type: [1]}", "${seed}", "???",
    "${name}", "${oc.env:NONE}", "a" * 300, "[[[[" * 30, HUGE, "0x" + "f" * 5000, "!!binary x", "*a", "&a [*a]",
    "!!python/name:os.system",
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 7, 1e30, float("inf"), float("nan"), 10**30, "", "x", "7", [], {}, [1], ["x"],
    {"a": 1}, [None], "\ud800", [[[]]],
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    """Changes the folder of a sound run, which is the current one."""


def cases() -> Iterator[Case]:
    """All inputs; the same ones each time."""
    for generate in (
        _judges,
        _printing,
        _settings,
        _yaml_files,
        _model_configs,
        _rows,
        _tokenizers,
        _metrics,
        _records,
        _arguments,
        _named_data,
        _paths,
        _weights,
        _experiments,
    ):
        yield from generate(random.Random(generate.__name__))


def _settings(_: random.Random) -> Iterator[Case]:
    """Every setting with a few values of any type, drawn for it alone: a new setting leaves the others' as they are."""
    for key in sorted(set(_keys(Config))):
        for value in random.Random(key).sample(YAML_VALUES, 3):
            yield Case(f"setting {key}={_short(value)}", (*TRAIN, f"{key}={value}"))


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, info in fields_by_key(section).items():
        yield prefix + name
        for inner in section_types(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _yaml_files(draw: random.Random) -> Iterator[Case]:
    """Config files that are damaged, too large for a parser, or not settings at all."""
    doubled = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    interpolated = "".join(f"x{i}: '${{x{i + 1}}}${{x{i + 1}}}'\n" for i in range(40)) + "x40: a\n"
    texts = {
        "empty": "", "a list": "- 1\n", "a string": "root:x:0:0:root\nbin:x:1\n", "deep": DEEP, "deep value": "a: " + DEEP,
        "alias bomb": CONFIG + doubled, "interpolation bomb": CONFIG + interpolated, "cycle": "a: &a [*a]\n",
        "tag": "!!python/object/apply:os.system [id]\n", "bad date": CONFIG + "seed: 2024-99-99\n", "tab": "a:\t- b\n\tc",
        "key twice": CONFIG + "seed: 1\nseed: 2\n", "list as key": "? [a]\n: b\n", "number as key": CONFIG + "1: 2\n",
        "null as key": CONFIG + "optimizer: {null: 1}\n", "two documents": CONFIG + "---\n" + CONFIG, "NUL": "a: \0",
        "long": CONFIG + "#" * (2 << 20), "huge": CONFIG + f"seed: {HUGE}\n", "merge": CONFIG + "<<: [1]\n",
        "base secret": CONFIG + "base: secret\n", "base secret.yaml": CONFIG + "base: secret.yaml\n",
        "base itself": CONFIG + "base: run.yaml\n", "base folder": CONFIG + "base: model\n", "base null": CONFIG + "base:\n",
        "base number": CONFIG + "base: [1]\n", "base NUL": CONFIG + 'base: "a\\0.yaml"\n', "base device": "base: /dev/zero",
        "base long": CONFIG + f"base: {'a' * 5000}.yaml\n", "base none": CONFIG + "base: none.yaml\n",
        "base link": CONFIG + "base: link.yaml\n", "base loop": CONFIG + "base: loop.yaml\n",
    }  # fmt: skip
    for name, text in texts.items():
        yield Case(f"yaml {name}", TRAIN, lambda folder, text=text: _write(folder / "run.yaml", text))
    for number in range(40):  # damaged bytes
        content = bytearray(CONFIG.encode())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.choice(b"\0\xff:{}[]&*!|>'\"%@`#-\n\t ,?")
        yield Case(
            f"yaml damaged {number}", TRAIN, lambda folder, text=bytes(content): _write(folder / "run.yaml", text)
        )


def _model_configs(draw: random.Random) -> Iterator[Case]:
    """config.json with values of any type under the keys that are read, for three families."""
    moe = {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    families = {
        "qwen3": {"model_type": "qwen3", "rope_scaling": None, "use_sliding_window": False, "layer_types": None},
        "qwen3_moe": moe,
        "llama": {
            "model_type": "llama", "head_dim": 16, "mlp_bias": False,
            "rope_parameters": {**llama3, "original_max_position_embeddings": 512, "rope_theta": 1e4},
        },
        "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    }  # fmt: skip
    shared = (
        "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
        "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings",
        "rope_theta", "hidden_act", "attention_dropout", "attention_bias", "quantization_config", "partial_rotary_factor",
        "dtype",
    )  # fmt: skip
    for family, changes in families.items():
        for key in (*shared, *changes) if family == "qwen3" else changes:
            for value in draw.sample(JSON_VALUES, 4):
                command = draw.choice([("convert", "hf-to-megatron", "model", "out"), TRAIN, PLAN])
                yield Case(
                    f"config.json {family} {command[0]} {key}={_short(json.dumps(value))}", command,
                    _changed_model({**changes, key: value}),
                )  # fmt: skip
    rope = families["llama"]["rope_parameters"]
    for key in rope:
        for value in draw.sample(JSON_VALUES, 4):
            name = f"config.json llama rope {key}={_short(json.dumps(value))}"
            yield Case(name, PLAN, _changed_model({**families["llama"], "rope_parameters": {**rope, key: value}}))
    texts = (
        "",
        "{",
        "[]",
        "null",
        "1",
        '"x"',
        "[" * 100_000,
        '{"a":' * 100_000,
        f'{{"hidden_size": {HUGE}}}',
        "\xff\xfe",
    )
    for number, text in enumerate(texts):
        for command in (TRAIN, PLAN):
            yield Case(
                f"config.json text {number} {command[0]}", command,
                lambda folder, text=text: _write(folder / "model/config.json", text.encode("latin-1")),
            )  # fmt: skip


def _changed_model(changes: dict[str, Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return prepare


def _rows(draw: random.Random) -> Iterator[Case]:
    """Data files in which no row can be used."""
    for key in ("prompt", "reward_model", "data_source"):
        for value in draw.sample(JSON_VALUES, 8):
            yield _data_case(f"row {key}={_short(json.dumps(value))}", json.dumps(ROW | {key: value}))
    for value in draw.sample(JSON_VALUES, 10):
        shown = _short(json.dumps(value))
        yield _data_case(f"row ground_truth={shown}", json.dumps(ROW | {"reward_model": {"ground_truth": value}}))
        yield _data_case(f"row message={shown}", json.dumps(ROW | {"prompt": [value]}))
        yield _data_case(f"row content={shown}", json.dumps(ROW | {"prompt": [{"role": "user", "content": value}]}))
    texts = ("", "\n\n", "{", DEEP, "\0", "\xff", f'{{"prompt": {HUGE}}}', "[]", "null", json.dumps(ROW)[:-1])
    for number, text in enumerate(texts):
        yield _data_case(f"row text {number}", text)
    for name, content in NO_PARQUET.items():
        yield Case(
            f"parquet {name}", (*TRAIN, "data.train.path=x.parquet"),
            lambda folder, content=content: _write(folder / "x.parquet", content),
        )  # fmt: skip


def _data_case(name: str, text: str) -> Case:
    return Case(
        name, TRAIN, lambda folder: _write(folder / "train.jsonl", text.encode("latin-1", "surrogatepass") + b"\n")
    )


def _tokenizers(draw: random.Random) -> Iterator[Case]:
    """Tokenizer files and chat templates that do not work, or never end."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for number, text in enumerate(("", "{", "[]", "null", "{}", DEEP, "\xff", f'{{"a": {HUGE}}}')):
            yield Case(
                f"{name} text {number}", TRAIN,
                lambda folder, name=name, text=text: _write(folder / "model" / name, text.encode("latin-1")),
            )  # fmt: skip
    for value in draw.sample(JSON_VALUES, 10):
        for key in draw.sample(
            ("tokenizer_class", "eos_token", "model_max_length", "added_tokens_decoder", "auto_map"), 2
        ):
            yield Case(
                f"tokenizer_config.json {key}={_short(json.dumps(value))}", TRAIN,
                lambda folder, key=key, value=value: _changed_json(folder / "model/tokenizer_config.json", key, value),
            )  # fmt: skip
    templates = (
        "{% for %}", "{{ 10 ** (10 ** 10) }}", "{{ 'x' * 10 ** 11 }}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ ''.__class__.__mro__ }}",
        "{{ messages[5].x.y }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "", "{{ '\ud800' }}", "{% include 'x' %}",
        "{{ 'a'.center(10 ** 8) }}", "{" * 10_000, "{{ (" + "(" * 3000 + "1" + ")" * 3000 + ") }}",
    )  # fmt: skip
    for number, template in enumerate(templates):
        yield Case(f"template {number}", TRAIN, lambda folder, template=template: _set_template(folder, template))


def _set_template(folder: Path, template: str) -> None:
    (folder / "model/chat_template.jinja").unlink(missing_ok=True)
    _changed_json(folder / "model/tokenizer_config.json", "chat_template", template)


def _changed_json(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def _metrics(draw: random.Random) -> Iterator[Case]:
    """Rows of metrics.jsonl for the report."""
    for key in ("step", "reward/mean", "time/step"):
        for value in draw.sample(JSON_VALUES, 8):
            yield _metrics_case(f"metrics {key}={_short(json.dumps(value))}", json.dumps(METRICS | {key: value}))
    for number, text in enumerate(("", "{", "[]", "null", DEEP, "\xff", f'{{"step": {HUGE}}}')):
        yield _metrics_case(f"metrics text {number}", text)


def _metrics_case(name: str, text: str) -> Case:
    def prepare(folder: Path) -> None:
        (folder / "runs/old").mkdir(parents=True)
        _write(folder / "runs/old/metrics.jsonl", text.encode("latin-1", "surrogatepass") + b"\n")

    return Case(name, ("report", "runs/old"), prepare)


def _records(_: random.Random) -> Iterator[Case]:
    """Records for the viewer and for replays."""
    yield from (Case(*case) for case in record_inputs())


def _arguments(draw: random.Random) -> Iterator[Case]:
    """Command lines."""
    numbers = ("0", "-1", "nan", "inf", "1e30", "true", "", "x", HUGE, "99999999999", "٣", "1.5", "\ud800", "a\nb")
    for option in (
        "--gpus",
        "--nvlink-size",
        "--max-prompt",
        "--max-response",
        "--mean-response",
        "--top",
        "--gpu-memory",
    ):
        for value in draw.sample(numbers, 5):
            yield Case(f"plan {option} {_short(value)}", (*PLAN, f"{option}={value}"))
    for axis in ("--tp", "--pp", "--ep"):
        for value in draw.sample(numbers, 4):
            yield Case(
                f"convert {axis} {_short(value)}", ("convert", "hf-to-megatron", "model", "out", f"{axis}={value}")
            )
    for value in draw.sample(numbers, 5):
        yield Case(f"check --prompts {_short(value)}", ("check", "run.yaml", f"--prompts={value}"))
    for override in ("=", "a", "a.b.c=1", "seed", "seed==1", ".seed=1", "seed.=1", "seed.x=1", "model=1", "data=[]", "é=1",
                     "a[0]=1", "parallel=auto", "parallel=manual", "base=x.yaml", "optimizer.lr=", "." * 2000 + "=1",
                     "a." * 2000 + "a=1", "name=..", "name=.", "name=a/b", f"name={'a' * 250}", "output_dir=train.jsonl",
                     "output_dir=train.jsonl/x", "output_dir=/proc/x", "output_dir=/dev/null", "reward.workers=1000000000",
                     "seed=1e30", "reward.correct=nan", "optimizer.lr=inf", "data.train.path=/dev/zero",
                     "data.train.path=model", "model.path=train.jsonl", "model.path=/dev/zero", "data.train.path=loop.yaml",
                     "model.path=loop.yaml", "output_dir=loop.yaml"):  # fmt: skip
        yield Case(f"override {_short(override)}", (*TRAIN, override))
    for size in ("1000000000", "1e9", "true"):
        options = f"{{type: arithmetic, size: {size}}}"
        yield Case(f"arithmetic size={size}", (*TRAIN, f"data.train={options}"))
    for options in (
        "{min_terms: -1}",
        "{min_terms: x}",
        "{none: 1}",
        "{size: 3}",
        "{min_digits: 1e30}",
        "{min_terms: []}",
    ):
        task = f"{{type: reasoning_gym, name: chain_sum, size: 2, options: {options}}}"
        yield Case(f"task {options}", (*TRAIN, f"data.train={task}"))
    for argv in (
        ("eval", "run.yaml"), ("eval", "none.yaml"), ("eval", "run.yaml", "data.eval=1"), ("report", "none"), ("plan",),
        ("report", "\0"), ("report", "a" * 5000), ("train", "\0"), ("train", "a" * 5000), ("train", "model"), (),
        ("train", "/dev/zero"), ("train", "loop.yaml"), ("plan", "--model", "/dev/zero"), ("plan", "--model", "a" * 300),
        (*PLAN, "--write", "\0"), (*PLAN, "--write", "none/x.yaml"), (*PLAN, "--write", "model"), ("nothing",),
        (*PLAN, "--write", "train.jsonl/x.yaml"), ("plan", "run.yaml", "--gpus", "8", "--write", "run.yaml"),
        ("plan", "--model", "loop.yaml", "--gpus", "8"), ("train", "run.yaml", "\ud800=1"), ("train", "\ud800"),
    ):  # fmt: skip
        yield Case(f"argv {' '.join(map(_short, argv))}", argv)


def _named_data(draw: random.Random) -> Iterator[Case]:
    """Data sources by name, and the settings that only these have."""
    file, sums = "{type: file, path: train.jsonl}", "{type: arithmetic, size: 3}"
    sound = (f"data.train={{a: {file}, b: {sums}}}", f"data.eval={{a: {file}, b: {sums}}}")
    yield Case("named sources", (*TRAIN, *sound))
    for key in ("train.a.weight", "train.c", "train.a.path", "train.a.columns", "eval.a.samples", "eval.a.temperature",
                "eval.a.top_p", "eval.a.max_response_tokens", "eval.a.scorer", "eval.c", "eval.a"):  # fmt: skip
        for value in draw.sample(YAML_VALUES, 4):
            yield Case(f"named {key}={_short(value)}", (*TRAIN, *sound, f"data.{key}={value}"))
    for name in ("a-b", "'1'", "''", "'a b'", "a" * 100, "é", '"a.b"', '"\\0"', "null", "1"):
        yield Case(f"named {_short(name)}", (*TRAIN, f"data.train={{{name}: {sums}}}"))
    for path in (
        "hf:",
        "hf:a",
        "hf:a/b",
        "hf:a/b/c@d:e",
        "hf:./none:train",
        "hf:.:train",
        "hf:/dev/zero",
        "hf:./model",
    ):
        yield Case(f"hub {path}", (*TRAIN, f"data.train.path={path}"))
    for suffix in ("json", "csv"):
        for number, content in enumerate(
            (b"", b"[", b"[1]", b"{}", b"\0", b"\xff\xfe", b"a,a\n1,2", b'"', DEEP.encode())
        ):
            yield Case(
                f"{suffix} {number}", (*TRAIN, f"data.train.path=x.{suffix}"),
                lambda folder, suffix=suffix, content=content: _write(folder / f"x.{suffix}", content),
            )  # fmt: skip
    for model in ("none", "train.jsonl", "\0", "a" * 5000, "loop.yaml"):
        yield Case(f"eval --model {_short(model)}", ("eval", "run.yaml", *sound, "--model", model))
    for output in ("train.jsonl", "/proc/x", "\0", "loop.yaml"):
        yield Case(f"eval --output {_short(output)}", ("eval", "run.yaml", *sound, "--output", output))
    yield Case("eval twice", ("eval", "run.yaml", *sound, "--model", "model", "--model", "model"))
    yield Case("eval of sets", ("eval", "run.yaml", *sound, "--model", "model"))


def _judges(draw: random.Random) -> Iterator[Case]:
    """Judges, of which none can be reached."""
    from megatron_hapo.config import RewardConfig
    from megatron_hapo.config.section import named_types

    (judge,) = named_types(RewardConfig.model_fields["judges"].annotation)
    sound = ("reward.judges={q: {url: http://127.0.0.1:9, model: m}}", "reward.scorer=judge/q")
    yield Case("judge that is down", (*TRAIN, *sound))
    yield Case("judge without its key", (*TRAIN, *sound, "reward.judges.q.api_key_env=NO_SUCH_VARIABLE"))
    for key in (*fields_by_key(judge), "none"):
        for value in draw.sample(YAML_VALUES, 3):
            yield Case(f"judge {key}={_short(value)}", (*TRAIN, *sound, f"reward.judges.q.{key}={value}"))
    for url in ("x", "ftp://x", "http://", "http:///x", "http://x:0", "http://x:99999", "http://u:p@x", "http://x?k=1",
                "http://x#y", "http://[", "https://" + "a" * 3000, "http://a b", "http://\ud800", "http://\0"):  # fmt: skip
        yield Case(f"judge at {_short(url)}", (*TRAIN, *sound, f"reward.judges.q.url='{url}'"))
    for scorer in ("judge/", "judge/r", "judge/q/q", "[judge/q,judge/q]", "judge/q:f", "judge/" + "q" * 100):
        yield Case(f"scorer {_short(scorer)}", (*TRAIN, *sound, f"reward.scorer={scorer}"))
    for name in ("a-b", "''", "math", "é", "null", "1"):
        yield Case(
            f"judge {_short(name)}", (*TRAIN, f"reward.judges={{{name}: {{url: http://127.0.0.1:9, model: m}}}}")
        )


def _printing(draw: random.Random) -> Iterator[Case]:
    """Commands that only print."""
    yield Case("dry run", (*TRAIN, "--dry-run"))
    yield Case("completion of bash", ("completion", "bash"))
    for argv in (("completion",), ("completion", "fish"), ("completion", "bash", "zsh"), ("completion", "bash", "a=1")):
        yield Case(" ".join(argv), argv)
    for value in draw.sample(YAML_VALUES, 8):
        yield Case(f"dry run parallel.dp={_short(value)}", (*TRAIN, "--dry-run", f"parallel.dp={value}"))
    for engines in (33, 10_000):
        yield Case(f"{engines} engines", (*TRAIN, f"rollout.engines={engines}", "device=cpu"))


def _paths(draw: random.Random) -> Iterator[Case]:
    """Files in the way of what a command writes."""
    for name in ("checkpoints", "hf", "hf_steps", "profile", "tensorboard"):
        yield Case(
            f"file in the way: {name}", TRAIN, lambda folder, name=name: _write(folder / "runs/small" / name, "")
        )
    for name in ("config.yaml", "metrics.jsonl", "curves.png"):
        yield Case(
            f"folder in the way: {name}",
            TRAIN,
            lambda folder, name=name: (folder / "runs/small" / name).mkdir(parents=True),
        )
    yield Case("file in the way: runs", TRAIN, lambda folder: _write(folder / "runs", ""))
    yield Case("file in the way: runs/small", TRAIN, lambda folder: _write(folder / "runs/small", ""))
    for target in ("train.jsonl", "train.jsonl/x", "model", "/proc/x", "/dev/null", "loop.yaml", "a" * 300, "blocked"):
        for command in (("convert", "hf-to-megatron", "model"), ("quantize", "model")):
            more = ("--format", "fp8", "--calibration", "train.jsonl") if command[0] == "quantize" else ()
            yield Case(
                f"{command[0]} to {_short(target)}", (*command, target, *more),
                lambda folder: _write(folder / "blocked.partial", ""),
            )  # fmt: skip
    for data in ("none.jsonl", "model", "/dev/zero", "loop.yaml", "\0", "empty.jsonl"):
        argv = ("quantize", "model", "out", "--format", "fp8", "--calibration", data)
        yield Case(f"quantize with {_short(data)}", argv, lambda folder: _write(folder / "empty.jsonl", ""))


def _weights(draw: random.Random) -> Iterator[Case]:
    """Indices and Megatron metadata beside the weights."""
    index = "model/model.safetensors.index.json"
    texts = ("", "{", "[]", "null", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": [[1]]}', DEEP, "\xff",
             '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": null, "b": "c"}}', f'{{"weight_map": {HUGE}}}')  # fmt: skip
    for number, text in enumerate(texts):
        yield Case(
            f"index {number}", ("quantize", "model", "out", "--format", "fp8", "--calibration", "train.jsonl"),
            lambda folder, text=text: _write(folder / index, text.encode("latin-1")),
        )  # fmt: skip
        yield Case(
            f"metadata {number}", ("convert", "megatron-to-hf", "model", "out"),
            lambda folder, text=text: _write(folder / "model/metadata.json", text.encode("latin-1")),
        )  # fmt: skip


def _experiments(draw: random.Random) -> Iterator[Case]:
    """Files of experiments."""
    sound = {
        "name": "e",
        "output_dir": "runs",
        "job": "run.yaml",
        "seeds": "[1]",
        "baseline": "a",
        "methods": "{a: {}}",
    }
    for key in fields_by_key(Experiment):
        for value in draw.sample(YAML_VALUES, 10):
            text = "".join(f"{k}: {v}\n" for k, v in (sound | {key: value}).items())
            yield _experiment_case(f"experiment {key}={_short(value)}", text)
    for layer in ("{base: none.yaml}", "{base: [1]}", "{base: {}}", "[1]", "{seed: x}", "{base: experiment.yaml}", "model",
                  "{base: secret.yaml}", "{name: ..}", "{output_dir: /proc/x}", "[loop.yaml]", "{base: /dev/zero}"):  # fmt: skip
        text = "".join(f"{k}: {v}\n" for k, v in (sound | {"methods": f"{{a: {layer}}}"}).items())
        yield _experiment_case(f"experiment method {layer}", text)
    for name in ("none.yaml", "model", "/dev/zero", "loop.yaml", "\0", "secret.yaml", "train.jsonl", "run.yaml"):
        yield Case(f"experiment file {_short(name)}", ("compare", name))


def _experiment_case(name: str, text: str) -> Case:
    def prepare(folder: Path) -> None:
        _write(folder / "experiment.yaml", text.encode("utf-8", "surrogatepass"))

    return Case(name, ("compare", "experiment.yaml"), prepare)


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _short(text: str) -> str:
    """A printable name for a value."""
    return text if len(text) <= 40 and text.isprintable() else ascii(text[:40]) + f" ({len(text)})"
