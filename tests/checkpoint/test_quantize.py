"""`megatron-hapo quantize`: the written folder, the printed comparison, and the errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_hapo import cli
from megatron_hapo.checkpoint.quantize import HELD_OUT
from megatron_hapo.data.prompts import encode_messages, load_tokenizer
from tests.quantized_model import (
    dequantized,
    quantized_logits,
    read_tensors,
    write_dequantized,
    write_prompts,
)
from tests.tiny_families import expected_tensors, write_family

CASES = [("qwen3", "fp8"), ("qwen3_moe", "fp8"), ("qwen2", "int8"), ("qwen3_moe", "int8")]
DTYPES = {"qwen2": "float32"}  # int8 is so close to the original that bfloat16 would be the larger difference
REPORT = re.compile(r"KL (\S+) nats per token, greedy agreement (\S+)% \((\d+) held-out prompts, (\d+) tokens\)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with calibration prompts and the models, named as their cases."""
    folder = tmp_path_factory.mktemp("quantize")
    write_prompts(folder / "prompts.jsonl")
    for case in {case for case, _ in CASES}:
        write_family(folder / case, case, dtype=DTYPES.get(case, "bfloat16"), tokenizer=True)
    return folder


def quantize(source: Path, target: Path, fmt: str, prompts: Path | None = None) -> int:
    prompts = prompts or source.parent / "prompts.jsonl"
    return cli.main(["quantize", str(source), str(target), "--format", fmt, "--calibration", str(prompts)])


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def quantized(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Path, str, str]:
    """Source, target, format, and what the command printed."""
    import contextlib
    import io

    (case, fmt), printed = request.param, io.StringIO()
    target = folder / f"{case}-{fmt}"
    with contextlib.redirect_stdout(printed):
        assert quantize(folder / case, target, fmt) == 0
    return folder / case, target, fmt, printed.getvalue()


def test_every_linear_weight_is_quantized_and_nothing_else(quantized: tuple[Path, Path, str, str]) -> None:
    source, target, fmt, _ = quantized
    original = expected_tensors(source, source.name)
    tensors = read_tensors(target)
    weights = dequantized(tensors)
    assert weights.keys() == original.keys()
    for name, value in original.items():
        stem = name.removesuffix(".weight")
        if not (name.endswith("_proj.weight")):
            assert torch.equal(tensors[name], value), name
            assert f"{stem}.weight_scale" not in tensors
            continue
        assert tensors[name].dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[fmt]
        scale = tensors[f"{stem}.weight_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == ((len(value), 1) if fmt == "int8" else ())
        # e4m3 has three mantissa bits; bfloat16, in which modelopt divides, rounds once more
        half_a_step = scale / 2 if fmt == "int8" else torch.maximum(value.abs() / 16, scale * 2**-10)
        assert ((weights[name] - value).abs() <= half_a_step * 1.07 + value.abs() / 250).all(), name
        if fmt == "fp8":
            assert tensors[f"{stem}.input_scale"].shape == ()
            assert 0 < tensors[f"{stem}.input_scale"] < 1
    if fmt == "fp8":
        for layer in range(2):
            attention = f"model.layers.{layer}.self_attn."
            assert len({float(tensors[f"{attention}{kind}_proj.weight_scale"]) for kind in "qkv"}) == 1
            assert all(0 < tensors[f"{attention}{kind}_proj.{kind}_scale"] < 1 for kind in "kv")
    else:
        assert not [name for name in tensors if name.endswith(("input_scale", "k_scale", "v_scale"))]


def test_the_folder_equals_the_original_except_for_the_quantization(quantized: tuple[Path, Path, str, str]) -> None:
    source, target, fmt, _ = quantized
    config, want = (json.loads((path / "config.json").read_text()) for path in (target, source))
    quantization = config.pop("quantization_config")
    assert config == want
    int8 = "w8a8_int8" if "moe" in source.name else "compressed-tensors"
    assert quantization["quant_method"] == {"fp8": "modelopt", "int8": int8}[fmt]
    assert "lm_head" in quantization["ignore"]
    assert ("model.layers.0.mlp.gate" in quantization["ignore"]) == ("moe" in source.name)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(target.parent.glob("*.partial"))
    assert (target / "hf_quant_config.json").exists() == (fmt == "fp8")


def test_the_printed_comparison_describes_the_written_weights(quantized: tuple[Path, Path, str, str]) -> None:
    """Recomputed from the folder's own numbers, in plain torch and float32."""
    source, target, _, printed = quantized
    match = REPORT.search(printed)
    assert match, printed
    assert printed.endswith(f"{target}\n")
    kl, greedy, num_prompts, num_tokens = map(float, match.groups())
    if "moe" in source.name:
        assert 0 < kl < 0.05
        return
    rows = [json.loads(line) for line in (source.parent / "prompts.jsonl").read_text().splitlines()]
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in rows[1::HELD_OUT]]
    prompts = encode_messages(conversations, load_tokenizer(source), chat_template=True)
    assert (num_prompts, num_tokens) == (len(prompts), sum(map(len, prompts)))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        original = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in prompts]).log_softmax(-1)
    tolerance = 0.02 if source.name in DTYPES else 0.15  # for the command's bfloat16 arithmetic
    found = torch.cat(quantized_logits(target, source, prompts)).log_softmax(-1)
    assert kl == pytest.approx(float((original.exp() * (original - found)).sum(-1).mean()), rel=tolerance)
    if source.name in DTYPES:  # at bfloat16 the command's own rounding flips the near-ties of a random model
        same = (original.argmax(-1) == found.argmax(-1)).float().mean()
        assert greedy / 100 == pytest.approx(float(same), abs=0.02)


def test_weights_that_float8_can_represent_are_written_exactly(folder: Path, tmp_path: Path) -> None:
    """So the fp8 export of a policy trained with trainer.quantization=fp8 has exactly the policy's weights."""
    prompts = folder / "prompts.jsonl"
    assert quantize(folder / "qwen3", tmp_path / "first", "fp8", prompts) == 0
    rounded = write_dequantized(tmp_path / "first", folder / "qwen3", tmp_path / "rounded")
    assert quantize(rounded, tmp_path / "second", "fp8", prompts) == 0
    want = read_tensors(rounded)
    for name, value in dequantized(read_tensors(tmp_path / "second")).items():
        assert torch.equal(value.to(torch.bfloat16), want[name]), name


@pytest.mark.slow
def test_a_megatron_checkpoint_gives_the_same_folder(folder: Path, tmp_path: Path) -> None:
    source, megatron = folder / "qwen2", tmp_path / "megatron"
    assert cli.main(["convert", "hf-to-megatron", str(source), str(megatron)]) == 0
    assert quantize(source, tmp_path / "from_hf", "fp8") == 0
    assert quantize(megatron, tmp_path / "from_megatron", "fp8", folder / "prompts.jsonl") == 0
    want, got = read_tensors(tmp_path / "from_hf"), read_tensors(tmp_path / "from_megatron")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name].float(), value.float()), name
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("from_hf", "from_megatron")]
    assert names[0] == names[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvfp4_without_a_gpu_is_rejected(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert quantize(folder / "qwen3", tmp_path / "out", "nvfp4") == cli.EXIT_FAULT
    assert capsys.readouterr().err == (
        "--format: nvfp4 needs a GPU and none is visible; fp8 and int8 work on a CPU too\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_all_faults_are_reported_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "prompts.jsonl").write_text('{"question": "1+1"}\n')
    assert quantize(folder / "qwen3", tmp_path / "full", "fp8", tmp_path / "prompts.jsonl") == cli.EXIT_FAULT
    error = capsys.readouterr().err
    assert f"--calibration: {tmp_path / 'prompts.jsonl'} has no column prompt" in error
    assert f"{tmp_path / 'full'}: exists and is not empty" in error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "prompts.jsonl"]


@pytest.mark.parametrize("fault", ["truncated", "quantized already", "one prompt"])
def test_an_unusable_source_leaves_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, fault: str
) -> None:
    source, prompts = tmp_path / "source", folder / "prompts.jsonl"
    source.mkdir()
    for path in (folder / "qwen3").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    if fault == "truncated":
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "quantized already":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    else:
        prompts = write_prompts(tmp_path / "prompts.jsonl", count=1)
    capsys.readouterr()
    assert quantize(source, tmp_path / "out", "fp8", prompts) == cli.EXIT_FAULT
    error = capsys.readouterr().err.splitlines()[-1]
    expected = {"truncated": "incomplete download", "quantized already": "quantiz", "one prompt": "at least one each"}
    assert expected[fault] in error
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
