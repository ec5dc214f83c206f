"""Tiny random models of every family on disk, with uneven sizes, an odd vocabulary, and distinguishable weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_model import byte_tokenizer

VOCAB_SIZE = 263

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    # Enough layers for the chunks of an interleaved pipeline.
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "num_hidden_layers": 4}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True}),
    # One dense layer; weights of the chosen experts are not normalised; the experts are stored stacked.
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {**_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1], "num_hidden_layers": 4},
    ),
}
"""transformers' class prefix and the config of each case."""
STACKED = "qwen3_moe_mixed"
"""The case whose experts are stored stacked."""


def write_family(folder: Path, case: str, *, dtype: str = "float32", tokenizer: bool = False, **sizes: float) -> Path:
    """Write the case's model, with `sizes` overriding its config; returns the folder."""
    import torch
    import transformers
    from safetensors.torch import save_file

    prefix, changes = FAMILIES[case]
    config = getattr(transformers, f"{prefix}Config")(
        **_SIZES | changes | sizes, bos_token_id=None, eos_token_id=258, pad_token_id=256, dtype=dtype
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():  # norms start at one, biases and routers at zero: make them distinguishable
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "mlp.gate." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    if case == STACKED:  # as transformers 5 holds them in memory; it saves one tensor per expert by default
        tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def expected_tensors(folder: Path, case: str) -> dict[str, Any]:
    """The model's tensors as an export must contain them: experts one by one, without a tied head."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    if FAMILIES[case][1].get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    for name in [name for name in tensors if ".experts." in name and not name.endswith(".weight")]:
        base, stacked = name.rpartition(".")[0], tensors.pop(name)
        for expert, value in enumerate(stacked):
            if name.endswith("gate_up_proj"):
                gate, up = value.chunk(2)
                tensors |= {f"{base}.{expert}.gate_proj.weight": gate, f"{base}.{expert}.up_proj.weight": up}
            else:
                tensors[f"{base}.{expert}.down_proj.weight"] = value
    return tensors
