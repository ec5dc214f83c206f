"""An independent reader of folders that `megatron-hapo quantize` wrote: the formats' arithmetic in plain torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_prompts(path: Path, count: int = 24) -> Path:
    """Write a calibration file in the format of training data; returns its path."""
    rows = [
        {
            "prompt": f"What is {number * 7 % 31} + {number * number % 97} - {number}?",
            "reward_model": {"ground_truth": "1"},
            "data_source": "math_dapo",
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a quantized folder represents, in float32 if they were quantized."""
    scales = {name.removesuffix("_scale"): value for name, value in tensors.items() if name.endswith(".weight_scale")}
    weights = {name: value for name, value in tensors.items() if not name.endswith("_scale")}
    return {name: value.float() * scales[name] if name in scales else value for name, value in weights.items()}


def write_dequantized(folder: Path, source: Path, target: Path) -> Path:
    """Write a plain model folder with the weights of a quantized one, in the original's dtype; returns `target`."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    dtype = getattr(torch, json.loads((source / "config.json").read_text())["dtype"])
    tensors = {name: value.to(dtype) for name, value in dequantized(read_tensors(folder)).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def quantized_logits(
    folder: Path, source: Path, sequences: Sequence[Sequence[int]], *, exact_kv: bool = False
) -> list[Tensor]:
    """Logits of a quantized dense model in float32, with activations and KV cache rounded as the format requires.

    Args:
        source: the original model, which determines the architecture.
        exact_kv: do not round the KV cache.
    """
    import torch.nn.functional as F
    from transformers import AttentionInterface, AutoModelForCausalLM

    def float8(x: Tensor, scale: Tensor | float) -> Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    tensors = read_tensors(folder)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        scales = [tensors.get(f"model.layers.{module.layer_idx}.self_attn.{kind}_proj.{kind}_scale") for kind in "kv"]
        if not exact_kv and scales[0] is not None and scales[1] is not None:
            k, v = (float8(x, scale) for x, scale in zip((k, v), scales, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("float8_kv", attention)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="float8_kv")
    result = model.load_state_dict(dequantized(tensors), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    for name, module in model.named_modules():
        if f"{name}.weight_scale" not in tensors:
            continue
        scale = tensors.get(f"{name}.input_scale")

        def round_input(_: Any, inputs: tuple[Tensor], scale: Tensor | None = scale) -> Tensor:
            (x,) = inputs
            if scale is not None:
                return float8(x, scale)
            step = x.abs().amax(-1, keepdim=True) / 127
            return (x / step).round() * step

        module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        return [model(torch.tensor([list(tokens)]), use_cache=False).logits[0] for tokens in sequences]


def float8_row_model(source: Path, *, quantized: bool) -> Any:
    """The model in bfloat16, logits in float32; if `quantized`, as engines with `rollout.quantization: fp8` compute.

    A second implementation: weights on one scale a row, inputs of linear layers on one scale a token. The experts of a
    layer are those of transformers 5, stacked.
    """
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    def float8(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        scale[scale == 0] = 1  # the padding token, whose embedding is zero
        return (x.float() / scale).to(torch.float8_e4m3fn).float(), scale

    def product(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        rounded, scale = float8(x)
        return (F.linear(rounded, weight[0]) * scale * weight[1].t()).bfloat16()

    def experts_forward(module: Any) -> Any:
        up = [float8(weight) for weight in module.gate_up_proj.detach()]
        down = [float8(weight) for weight in module.down_proj.detach()]

        def forward(hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
            total_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
            for token, (ids, weights) in enumerate(zip(chosen_TK.tolist(), weights_TK, strict=True)):
                for expert, weight in zip(ids, weights, strict=True):
                    gate, linear = product(hidden_TH[token : token + 1], up[expert]).chunk(2, dim=-1)
                    inner = (F.silu(gate.float()) * linear.float()).bfloat16()
                    total_TH[token] += (product(inner, down[expert])[0] * weight).float()
            return total_TH.bfloat16()

        return forward

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    head = model.lm_head.weight.detach().float()
    model.lm_head.forward = lambda x: F.linear(x.float(), head)
    for name, module in model.named_modules() if quantized else ():
        if name.endswith(".experts"):
            module.forward = experts_forward(module)
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.bias is None, name
            module.forward = partial(product, weight=float8(module.weight.detach()))
    return model
