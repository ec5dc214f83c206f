"""What an engine needs to start, its faults, and the same as SGLang's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hapo.errors import RolloutError
from megatron_hapo.types import InFlight
from sglang_ext import receive, verify


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one engine needs to start."""

    model_path: Path
    """Hugging Face folder."""
    device: Literal["cpu", "cuda"]
    dtype: str
    """float32 or bfloat16."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: linear weights in float8 with a scale a row, quantized after loading and at each sync."""
    float32_logits: bool = False
    """Keep the logits of 16-bit weights in float32; they are rounded to 16 bits otherwise."""
    tp: int
    ep: int = 1
    """1, or tp: each rank holds whole experts."""
    max_running_requests: int
    memory_fraction: float
    """Share of each GPU's memory for weights and KV cache; without effect on a CPU."""
    kv_cache_tokens: int | None
    """Required on a CPU; on a GPU None lets the memory fraction decide."""
    context_tokens: int
    """Maximum length of prompt and response together."""
    seed: int
    read_weights: bool = True
    """False: start with random weights, whatever the folder holds; the first weight update brings the real ones."""
    releases_memory: bool = False
    """Whether a trainer uses the same GPUs in turn, so that `release_memory` will be called."""
    in_flight: InFlight = "finish"
    """What a weight update does with unfinished responses."""
    returns_routes: bool = False
    """Whether responses can ask for the experts of their tokens; without effect for a model without experts."""
    deterministic: bool = False
    """Whether a response must be the same to the last bit whatever is generated beside it, and after a restart."""
    name: str = "engine"
    """The engine's name in profiles."""


def check_engine_config(config: EngineConfig) -> None:
    """Raises RolloutError with every reason for which this config cannot work."""
    faults = []
    if config.device == "cpu" and config.kv_cache_tokens is None:
        faults.append("kv_cache_tokens is required on a CPU")
    if config.kv_cache_tokens is not None and config.kv_cache_tokens < config.context_tokens:
        faults.append(
            f"kv_cache_tokens={config.kv_cache_tokens} must be at least context_tokens={config.context_tokens}, so "
            "that the cache can hold one sequence"
        )
    if config.device == "cuda" and config.dtype == "float32":
        faults.append(
            "dtype=float32 is for CPUs: SGLang's attention on a GPU needs 16 bits; set rollout.dtype: bfloat16"
        )
    if config.quantization == "fp8" and config.dtype != "bfloat16":
        faults.append(
            f"quantization=fp8 needs dtype=bfloat16, got {config.dtype}; set rollout.dtype: bfloat16, or "
            "rollout.quantization: none"
        )
    model_config = config.model_path / "config.json"
    if not model_config.is_file():
        faults.append(f"no config.json in {config.model_path}")
    elif config.device == "cpu":
        # On a GPU SGLang replicates key and value heads; on a CPU it pads the model with heads of zeros instead, a
        # layout that `verify` does not know.
        kv_heads = json.loads(model_config.read_text()).get("num_key_value_heads", config.tp)
        if kv_heads % config.tp:
            faults.append(f"on a CPU tp={config.tp} must divide the model's {kv_heads} key/value heads")
    if config.deterministic and config.device == "cpu" and config.tp > 2:
        faults.append(f"tp={config.tp} must be 1 or 2 with deterministic: true on a CPU")
    if faults:
        raise RolloutError("; ".join(faults))


def server_arguments(config: EngineConfig, *, returns_routes: bool) -> dict[str, Any]:
    """The keyword arguments of `sglang.Engine`."""
    arguments = {
        "model_path": str(config.model_path),
        "skip_tokenizer_init": True,  # token ids in and out
        "dtype": config.dtype,
        "enable_fp32_lm_head": config.float32_logits,
        "tp_size": config.tp,
        "ep_size": config.ep,
        "random_seed": config.seed,
        "context_length": config.context_tokens,
        "max_running_requests": config.max_running_requests,
        "max_total_tokens": config.kv_cache_tokens,
        "mem_fraction_static": config.memory_fraction,
        # flashinfer's sampler takes no seeds; without top-p both draw straight from the softmax.
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "weight_version": "0",
        "custom_weight_loader": [verify.VERIFY, receive.RECEIVE],
        # The prefix cache stays on: the samples of a group share their prompt. Weight updates flush it.
        "disable_radix_cache": False,
        # An idle scheduler would otherwise poll on a whole core, which the trainer can use.
        "sleep_on_idle": True,
        "log_level": "error",
        "enable_return_routed_experts": returns_routes,
        "enable_memory_saver": config.releases_memory and config.device == "cuda",
    }
    if config.device == "cuda":
        # With it SGLang's matrix products, norms and attention do not depend on the batch (on a CPU it is refused, and
        # `batch_invariance` takes its place); it chooses the attention backend, and NCCL's algorithm and channels.
        arguments["enable_deterministic_inference"] = config.deterministic
        # Graphs stay allocated while a trainer uses the GPU. Those of prefills are on by default (SGLang 0.5.23). Those
        # of decoding serve few requests each, and none more than max_running_requests.
        arguments["disable_prefill_cuda_graph"] = True
    if config.quantization == "fp8":
        arguments["quantization"] = "w8a8_fp8"
    if not config.read_weights:
        arguments["load_format"] = "dummy"
        if config.quantization == "fp8":
            # As if the folder held float8: SGLang would otherwise allocate the whole model in 16 bits first.
            arguments["json_model_override_args"] = json.dumps({"quantization_config": {"quant_method": "w8a8_fp8"}})
    if config.device == "cpu":
        arguments |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            # A share of the machine's memory, in which other processes count too: the engine would refuse to start
            # beside them. kv_cache_tokens bounds the cache.
            "mem_fraction_static": 0.95,
        }
        if config.dtype == "bfloat16":
            arguments["kv_cache_dtype"] = "bfloat16"  # SGLang refuses a quantized model's float8 one without AMX
    return arguments
