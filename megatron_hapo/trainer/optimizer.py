"""Megatron's gradient buffers and optimizer around a rank's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from megatron_hapo.checkpoint import resumable
from megatron_hapo.config import Config
from megatron_hapo.model.build import named_parameters
from megatron_hapo.model.families import is_expert


def wrap_for_training(model: Sequence[GPTModel], config: Config) -> tuple[list[Any], MegatronOptimizer]:
    """The chunks, each wrapped in Megatron's DistributedDataParallel, and the optimizer of their parameters.

    All ranks call it together. It also connects both to the chunks' TransformerConfig, which Megatron's pipeline
    schedule reads.
    """
    resumable.keep_torch_adam_steps()
    _norm_on_the_device()
    for name, parameter in named_parameters(model):
        if is_expert(name):
            # Where experts are replicated over the same ranks as all else (ep = 1, etp = tp), Megatron would put all
            # parameters into one optimizer, whose checkpoint no other layout can load.
            parameter.allreduce = False  # type: ignore[attr-defined]
    chunks = _data_parallel_chunks(model, config)
    megatron_config = model[0].config
    if config.trainer.overlap_communication:
        no_sync: Any = [chunk.no_sync for chunk in chunks]  # annotated without the list that a schedule accepts
        megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if _gathers_during_forward(config):
        _gather_output_layer_in_time(model[-1], chunks[-1])
    optimizer = get_megatron_optimizer(
        _optimizer_config(config, params_dtype=megatron_config.params_dtype), chunks, use_gloo_process_groups=False
    )
    _step_in_one_pass(optimizer)
    megatron_config.grad_scale_func = optimizer.scale_loss
    # Our loss is divided by the mini-batch's token count already, so Megatron gets no count to divide by.
    megatron_config.finalize_model_grads_func = lambda model, num_tokens=None, **rest: finalize_model_grads(
        model, None, **rest
    )
    return chunks, optimizer


def take_step(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the prepared gradients by their norm, and take the optimizer's step.

    Megatron's `step` would prepare them, and read all of them for their norm, once more.
    """
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters:
            clip_grads.clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def wait_for_weights(chunks: Sequence[Any]) -> None:
    """Finish gathering the weights of the last update, where that overlaps the next forward pass.

    Call it before reading weights outside a forward pass; the ranks of a dp x cp group call it together.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _gathers_during_forward(config: Config) -> bool:
    return config.trainer.overlap_communication and config.trainer.distributed_optimizer


def _data_parallel_chunks(model: Sequence[GPTModel], config: Config) -> list[Any]:
    """Typed as Any because Megatron's functions are annotated with different kinds of lists."""
    megatron_config = model[0].config
    return [
        DistributedDataParallel(
            megatron_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.trainer.distributed_optimizer,
                overlap_grad_reduce=config.trainer.overlap_communication,
                overlap_param_gather=_gathers_during_forward(config),
            ),
            Float16Module(megatron_config, chunk) if megatron_config.bf16 else chunk,
            # In an interleaved pipeline one chunk communicates while another computes.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(model)
    ]


def _optimizer_config(config: Config, *, params_dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_eps=config.optimizer.eps,
        clip_grad=config.optimizer.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=config.trainer.distributed_optimizer,
        overlap_param_gather=_gathers_during_forward(config),
        optimizer_cpu_offload=config.optimizer.cpu_offload,
        optimizer_offload_fraction=1.0,
        overlap_cpu_optimizer_d2h_h2d=True,
        # Otherwise a second set of float32 master weights stays on the GPU.
        use_precision_aware_optimizer=config.optimizer.cpu_offload,
    )


def _gather_output_layer_in_time(chunk: GPTModel, wrapped: Any) -> None:
    """Megatron waits for a layer's weights when the layer is called, but the output head never calls its own."""
    if chunk.post_process:
        wait_for = wrapped._make_forward_pre_hook()
        final_norm: Any = chunk.decoder.final_layernorm
        final_norm.register_forward_pre_hook(lambda *_: wait_for(chunk.output_layer))


def _step_in_one_pass(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW on a CPU: one pass over each parameter and its state in place of a dozen, five times as fast.

    Megatron 0.19 asks for it only where a GPU's optimizer runs on the host. A loaded checkpoint leaves it, like all of
    a group's settings (`resumable.load`). On GPUs nothing changes.
    """
    for part in resumable.chained_optimizers(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                if any(parameter.device.type == "cpu" for parameter in group["params"]):
                    group["fused"] = True


def _norm_on_the_device() -> None:
    """Without Transformer Engine and Apex, Megatron 0.19 makes a tensor of the norms of all gradients on the host: one
    wait for the device per parameter."""
    module: Any = clip_grads
    if module.l2_norm_impl is local_multi_tensor_l2_norm:
        module.l2_norm_impl = _l2_norm


def _l2_norm(
    _chunk_size: int, _overflow: Tensor, tensor_lists: Sequence[list[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """L2 norm of all tensors of the first list together, [1]; the signature is Apex's `multi_tensor_l2norm`."""
    (tensors,) = tensor_lists
    return torch.nn.utils.get_total_norm(tensors)[None], None
