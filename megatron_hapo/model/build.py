"""Builds one rank's shard of the Megatron-Core GPTModel that a Hugging Face config describes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, assert_never

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_hapo.config import ParallelSizes
from megatron_hapo.errors import HapoError
from megatron_hapo.model.families import RopeScaling, Shape, padded_vocab_size
from megatron_hapo.model.layers import block_spec
from megatron_hapo.model.packed_attention import PackedFormat, PackedRotaryEmbedding, local_format
from megatron_hapo.model.parallel_layout import ParallelLayout

logger = logging.getLogger(__name__)

Recompute = Literal["none", "selective", "full"]
_LAYERS = "decoder.layers."


def transformer_config(
    shape: Shape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    te: bool,
    deterministic: bool = False,
) -> TransformerConfig:
    """Megatron's config for this model on this layout; `te`: with Transformer Engine's layers."""
    sizes = layout.sizes
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        num_layers_in_first_pipeline_stage=sizes.first_stage_layers,
        num_layers_in_last_pipeline_stage=sizes.last_stage_layers,
        context_parallel_size=sizes.cp,
        sequence_parallel=sequence_parallel and sizes.tp > 1,
        # Packed micro-batches differ in length. Megatron accepts that only with this dispatcher, even in dense models.
        variable_seq_lengths=True,
        batch_p2p_sync=False,  # waits for all kernels after each message, for the sake of old versions of torch
        moe_token_dispatcher_type="alltoall",
        # The loss is already divided by the mini-batch's global token count, so Megatron must not average again.
        calculate_per_token_loss=True,
        # Weights are loaded from a checkpoint, so initialising them would waste time.
        perform_initialization=False,
        use_cpu_initialization=layout.device.type == "cpu",
        attention_softmax_in_fp32=True,
        persist_layer_norm=te,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        apply_rope_fusion=te,
        masked_softmax_fusion=False,
        # Megatron's output layer takes it only with Apex. In Transformer Engine's layers alone it would spare writing
        # and reading the bfloat16 gradients of a micro-batch, 4 bytes a parameter: 10 ms of the 2 s that 8B need for
        # 16k tokens on an H100.
        gradient_accumulation_fusion=False,
        deterministic_mode=deterministic,
        **_recompute_options(recompute, te=te),
        **_interleaving_options(sizes),
        **_expert_options(shape, sizes, te=te),
    )


def build_model(
    shape: Shape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool = True,
    recompute: Recompute = "none",
    spec: Literal["auto", "te", "local"] = "auto",
    deterministic: bool = False,
) -> list[GPTModel]:
    """The model chunks of this rank, in the order of their layers, on the layout's device, with uninitialised weights.

    There is one chunk unless the pipeline is interleaved.
    """
    te = _use_transformer_engine(spec, layout.device, experts=shape.moe is not None)
    config = transformer_config(
        shape,
        layout,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        te=te,
        deterministic=deterministic,
    )
    return [_build_chunk(shape, layout, config, te=te, chunk=chunk) for chunk in range(layout.sizes.vpp)]


def _build_chunk(shape: Shape, layout: ParallelLayout, config: TransformerConfig, *, te: bool, chunk: int) -> GPTModel:
    vpp = layout.sizes.vpp
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, shape, te=te, chunk=chunk),
        vocab_size=padded_vocab_size(shape.vocab_size, layout.sizes.tp),
        max_sequence_length=shape.max_positions,
        pre_process=layout.pp_rank == 0 and chunk == 0,
        post_process=layout.is_last_stage and chunk == vpp - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,  # type: ignore[arg-type]  # annotated int, used as a number
        vp_stage=chunk if vpp > 1 else None,
    )
    if not te:
        model.rotary_pos_emb = PackedRotaryEmbedding(
            shape.head_dim,
            rotary_percent=1.0,
            rotary_base=shape.rope_base,  # type: ignore[arg-type]
            use_cpu_initialization=config.use_cpu_initialization,
        )
    if shape.rope_scaling is not None:
        _scale_rope(model, shape.rope_scaling)
    return model.to(layout.device)


def packed_format(model: Sequence[GPTModel]) -> PackedFormat:
    """How this model's attention sees packed sequences."""
    if not isinstance(model[0].rotary_pos_emb, PackedRotaryEmbedding):
        return "thd"
    first, head_dim = next(model[0].parameters()), model[0].config.kv_channels
    assert head_dim is not None, "`transformer_config` sets it"
    return local_format(first.device, first.dtype, head_dim)


def named_parameters(model: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of this rank's chunks; layers are numbered as in the whole model."""
    for chunk in model:
        offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
        for name, parameter in chunk.named_parameters():
            if name.startswith(_LAYERS):
                number, rest = name.removeprefix(_LAYERS).split(".", 1)
                name = f"{_LAYERS}{offset + int(number)}.{rest}"
            yield name, parameter


def _interleaving_options(sizes: ParallelSizes) -> dict[str, Any]:
    if sizes.vpp == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": sizes.vpp,
        # Otherwise one exchange carries activations and gradients, and where a stage's two neighbours are the same
        # rank (pp = 2) Megatron 0.19.2 confuses the shapes of the two.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _expert_options(shape: Shape, sizes: ParallelSizes, *, te: bool) -> dict[str, Any]:
    if shape.moe is None:
        return {}
    return {
        "num_moe_experts": shape.moe.num_experts,
        "moe_ffn_hidden_size": shape.moe.ffn_size,
        "moe_layer_freq": [int(shape.has_experts(layer)) for layer in range(shape.num_layers)],
        "moe_router_topk": shape.moe.top_k,
        # Softmax over all experts before top-k, or over the chosen experts after it, which normalises.
        "moe_router_pre_softmax": not shape.moe.normalize_top_k,
        "moe_router_load_balancing_type": "none",
        # Scores, and the sum of the experts' outputs that they weigh. The engine's scores are float32 as well.
        "moe_router_dtype": "fp32",
        # Megatron 0.19 has both with Transformer Engine only.
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.etp,
    }


def _recompute_options(recompute: Recompute, *, te: bool) -> dict[str, Any]:
    match recompute:
        case "none":
            return {}
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case "selective":
            # Transformer Engine's fused attention stores only its inputs and output anyway.
            modules = ["mlp", "moe"] if te else ["core_attn", "mlp", "moe"]
            return {"recompute_granularity": "selective", "recompute_modules": modules}
        case _:
            assert_never(recompute)


def _scale_rope(model: GPTModel, scaling: RopeScaling) -> None:
    """Set Llama 3's frequencies. GPTModel's own rope_scaling takes only the factor and fixes the other three values."""
    rotary: Any = model.rotary_pos_emb
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )


def _use_transformer_engine(spec: str, device: torch.device, *, experts: bool) -> bool:
    try:
        import transformer_engine  # noqa: F401

        present = device.type == "cuda"
    except ImportError:
        present = False
    if spec == "te" and not present:
        raise HapoError("model.spec: te needs a GPU and the package transformer-engine (extra [te]); use local or auto")
    te = present and spec != "local"
    if spec == "auto" and not te and device.type == "cuda" and experts:
        raise HapoError(
            "model.spec: auto needs Transformer Engine for a model with experts, and the package is not installed: "
            "Megatron has grouped matrix products with it only, and without them a GPU computes one expert after "
            "another. Install it as docs/launching.md says, or set model.spec: local to accept this"
        )
    if spec == "auto" and not te and device.type == "cuda" and dist.get_rank() == 0:
        logger.warning(
            "model.spec: auto: TRANSFORMER ENGINE IS NOT INSTALLED: the layers are torch's own, slower and with more "
            "memory; install it as docs/launching.md says, or set model.spec: local to accept this"
        )
    logger.info("layer spec: %s", "Transformer Engine" if te else "local (torch SDPA)")
    return te
