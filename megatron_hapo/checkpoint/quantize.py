"""Writes quantized copies of a model for serving, calibrated by nvidia-modelopt, in formats that SGLang loads."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_hapo.checkpoint.checkpoint_errors import explain_write_errors
from megatron_hapo.checkpoint.convert import Conversion, convert, target_faults
from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.manifest import check_manifest
from megatron_hapo.checkpoint.model_folder import (
    DTYPE_BYTES,
    atomic_folder,
    config_dtype,
    copy_companions,
    is_megatron_folder,
)
from megatron_hapo.config import FileData
from megatron_hapo.data.problems import file_faults
from megatron_hapo.data.prompts import load_prompts, load_tokenizer
from megatron_hapo.errors import ConfigError, DataError
from megatron_hapo.model.families import num_parameters, read_shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MAX_PROMPTS = 512
"""Rows of the calibration file that are read."""
HELD_OUT = 8
"""One prompt in this many is held out of the calibration, for the comparison with the original."""
MAX_PROMPT_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantization job.

    Formats:
        fp8: weights and activations e4m3 with one scale per tensor, KV cache e4m3 with one scale per layer; SGLang's
            `modelopt_fp8`. Queries, keys and values share a weight scale, and so do gate and up, because SGLang stacks
            them and would round again if their scales differed.
        int8: weights with one scale per row, activations with one scale per token, computed by the engine (so there is
            nothing to calibrate); KV cache not quantized. Written as `compressed-tensors` or, with experts, as SGLang's
            `w8a8_int8`, since no engine loads modelopt's own int8.
        nvfp4: weights and activations e2m1 in blocks of 16, KV cache as in fp8; `modelopt_fp4`. Needs a GPU.
    """

    source: Path
    """A Hugging Face folder, or a Megatron checkpoint."""
    target: Path
    format: Literal["fp8", "int8", "nvfp4"]
    calibration: Path
    """Parquet or JSONL file of prompts, in the format of a run's `data.train.path`."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How closely the quantized model agrees with the original, over all tokens of the held-out prompts."""

    kl: float
    """Mean KL(original || quantized) of the next-token distribution, in nats."""
    greedy: float
    """Fraction of tokens after which both models consider the same next token the most probable."""
    num_prompts: int
    num_tokens: int


def quantize(job: Quantization) -> Agreement:
    """Write the target folder, atomically, on a GPU if there is one; returns the comparison with the original.

    Raises:
        ConfigError: source, calibration data or target cannot be used; the target is unchanged.
        DataError: a row of the calibration data cannot be used.
    """
    check(job)
    with atomic_folder(job.target) as folder:
        if not is_megatron_folder(job.source):
            return _quantize_folder(job, job.source, folder)
        original = folder / "original"  # the disk that was checked for space
        convert(Conversion(direction="megatron-to-hf", source=job.source, target=original))
        agreement = _quantize_folder(job, original, folder)
        shutil.rmtree(original)
        return agreement


def check(job: Quantization) -> None:
    """Check everything that can be known from the files before any work starts, with the values of the weights.

    Raises:
        ConfigError: lists all faults at once.
    """
    import torch

    if not job.source.is_dir():
        raise ConfigError([f"{job.source}: no such folder"])
    check_manifest(job.source, quick=True)
    shape, is_megatron = read_shape(job.source), is_megatron_folder(job.source)
    bytes_per_parameter = 1 + (DTYPE_BYTES[config_dtype(job.source)] if is_megatron else 0)
    faults = [
        *(f"--calibration: {message}" for message in file_faults(_calibration(job))),
        *target_faults(job.target, num_parameters(shape) * bytes_per_parameter),
    ]
    if job.format == "nvfp4" and not torch.cuda.is_available():
        faults.append("--format: nvfp4 needs a GPU and none is visible; fp8 and int8 work on a CPU too")
    if faults:
        raise ConfigError(faults)
    if not is_megatron:
        HfReader(job.source, shape).check(values=not check_manifest(job.source))


def _quantize_folder(job: Quantization, source: Path, folder: Path) -> Agreement:
    # modelopt reports on stdout, and warns about every package that is not installed
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _calibrate_and_write(job, source, folder)


def _calibrate_and_write(job: Quantization, source: Path, folder: Path) -> Agreement:
    from modelopt.torch.export import export_hf_checkpoint
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers shows one for each file
    calibration, held_out = _split(_prompts(job, source), job.calibration)
    model = _load(source)
    with Progress(console=Console(stderr=True)) as progress:
        _calibrate(model, job.format, progress.track(calibration, description="calibrating"))
        agreement = compare(model, progress.track(held_out, description="comparing"))
    with explain_write_errors(folder):
        export_hf_checkpoint(model, export_dir=folder)
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        if job.format == "int8":
            _rewrite_int8(folder)
            experts = read_shape(source).moe is not None
            quantization = _int8_config(ignore=quantization["ignore"], experts=experts)
        # transformers writes its own version of the config; other software knows the original's keys
        copy_companions(source, folder, config_dtype(source))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
    return agreement


def _calibration(job: Quantization) -> FileData:
    return FileData(type="file", path=job.calibration, limit=MAX_PROMPTS)


def _prompts(job: Quantization, source: Path) -> list[list[int]]:
    """Token ids of each prompt."""
    tokenizer = load_tokenizer(source)
    prompts = load_prompts(
        _calibration(job),
        tokenizer,
        chat_template=tokenizer.chat_template is not None,
        max_prompt_tokens=min(MAX_PROMPT_TOKENS, read_shape(source).max_positions),
    )
    return [prompt.token_ids.tolist() for prompt in prompts.prompts]


def _split(prompts: list[list[int]], path: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts for the calibration, and the held-out ones for the comparison."""
    if len(prompts) < 2:
        raise DataError(f"{path}: contains one prompt, but calibration and comparison need at least one each")
    held_out = prompts[1::HELD_OUT]
    return [prompt for number, prompt in enumerate(prompts) if number % HELD_OUT != 1], held_out


def _load(folder: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=config_dtype(folder),
        use_safetensors=True,
        trust_remote_code=False,
        # modelopt recognises the experts' matrix products in no other form, and would silently calibrate nothing
        experts_implementation="eager",
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _calibrate(model: PreTrainedModel, fmt: str, prompts: Iterable[list[int]]) -> None:
    """Insert modelopt's quantizers and calibrate their scales on these prompts."""
    import modelopt.torch.quantization as mtq

    def forward_loop(_: Any) -> None:
        for tokens in prompts:
            _logits(model, tokens)

    mtq.quantize(model, _modelopt_config(fmt), forward_loop)
    if fmt == "fp8":
        for module in model.modules():
            _share_scale(module, "q_proj", "k_proj", "v_proj")
            _share_scale(module, "gate_proj", "up_proj")


def _modelopt_config(fmt: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    if fmt == "int8":
        config = copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
        for entry in config["quant_cfg"]:
            if "cfg" in entry:
                entry["cfg"]["num_bits"] = 8
        return config
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG if fmt == "fp8" else mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    return config


def _share_scale(module: Any, *names: str) -> None:
    """Set the weight scales of linear layers that an engine stacks to the largest of them."""
    layers = [getattr(module, name, None) for name in names]
    if all(hasattr(layer, "weight_quantizer") for layer in layers):
        quantizers = [layer.weight_quantizer for layer in layers]  # type: ignore[union-attr]
        largest = max(quantizer.amax for quantizer in quantizers)
        for quantizer in quantizers:
            quantizer.amax = largest


def compare(model: PreTrainedModel, prompts: Iterable[list[int]]) -> Agreement:
    """How closely a model with modelopt's quantizers agrees with itself without them."""
    import torch
    from modelopt.torch.quantization import set_quantizer_by_cfg_context

    num_prompts = num_tokens = num_same = 0
    kl = 0.0
    for tokens in prompts:
        with set_quantizer_by_cfg_context(model, [{"quantizer_name": "*", "enable": False}]):
            original_TV = torch.log_softmax(_logits(model, tokens), -1)
        quantized_TV = torch.log_softmax(_logits(model, tokens), -1)
        kl += float((original_TV.exp() * (original_TV - quantized_TV)).sum())
        num_same += int((original_TV.argmax(-1) == quantized_TV.argmax(-1)).sum())
        num_prompts, num_tokens = num_prompts + 1, num_tokens + len(tokens)
    return Agreement(kl=kl / num_tokens, greedy=num_same / num_tokens, num_prompts=num_prompts, num_tokens=num_tokens)


def _logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits of a token sequence, [T, V] float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()


def _rewrite_int8(folder: Path) -> None:
    """Rewrite modelopt's scales, file by file, in the shape that engines read."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(".weight_scale"):
                tensors[name] = tensors[name].float().reshape(-1, 1)
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "hf_quant_config.json").unlink()


def _int8_config(*, ignore: Sequence[str], experts: bool) -> dict[str, Any]:
    """The quantization_config of int8 weights; with experts, SGLang (0.5.23) serves only its own w8a8_int8."""
    if experts:
        return {"quant_method": "w8a8_int8", "is_dynamic": True, "ignore": list(ignore)}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    weights, activations = {"strategy": "channel", "dynamic": False}, {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": int8 | weights, "input_activations": int8 | activations}
        },
        "ignore": list(ignore),
    }
