"""One trainer rank: Megatron model and optimizer, the forward pass, the update, its weights. Knows no launcher.

All ranks call the same methods in the same order. Shape letters: `N` response tokens of a micro-batch, `V` vocabulary
columns of a rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_hapo.algorithm.batching import MicroBatch, pack, plan_microbatches
from megatron_hapo.algorithm.objective import policy_loss
from megatron_hapo.checkpoint import distributed as checkpoint
from megatron_hapo.checkpoint.hf import place_of, spoken_tensors, write_stage
from megatron_hapo.checkpoint.weights import load_weights
from megatron_hapo.config import Config
from megatron_hapo.entropy import EntropyStats
from megatron_hapo.errors import TrainingError
from megatron_hapo.logprobs.output_head import OUTPUT_HEADS, ScoredTokens
from megatron_hapo.model.build import build_model, named_parameters, packed_format
from megatron_hapo.model.fake_quantization import round_to_float8
from megatron_hapo.model.families import hf_tensor_shapes, is_expert, read_shape
from megatron_hapo.model.layers import packed_params
from megatron_hapo.model.parallel_layout import ParallelLayout
from megatron_hapo.resharding.expected import partial_checksums
from megatron_hapo.resharding.layouts import rank_parameters
from megatron_hapo.resharding.plan import Parameter, SendingTask
from megatron_hapo.resharding.transfer import Transfer, as_matrix
from megatron_hapo.resharding.transports import Sender
from megatron_hapo.resharding.weight_buckets import BucketBuilder, EngineCut, engine_cut
from megatron_hapo.trainer.offload import TrainerMemory
from megatron_hapo.types import TokenScores, TrainBatch, WeightBucket

logger = logging.getLogger(__name__)


class TrainerRank:
    """The policy's shard on this rank.

    Args:
        config: of the run.
        layout: this rank's place; process groups must exist.
    """

    def __init__(self, config: Config, layout: ParallelLayout):
        self.config, self.layout = config, layout
        self.shape = read_shape(config.model.path)
        dtype = getattr(torch, config.trainer.dtype)
        self.model = build_model(
            self.shape,
            layout,
            dtype=dtype,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.trainer.recompute,
            spec=config.model.spec,
        )
        self._packed_format = packed_format(self.model)
        load_weights(self.model, self.shape, layout, config.model.path)
        self._output_head = OUTPUT_HEADS[config.trainer.output_head](
            tp_group=layout.tp_group if layout.tp_size > 1 else None, vocab_size=self.shape.vocab_size
        )
        checkpoint.keep_torch_adam_steps()
        self._wrap_for_training(dtype)
        self._memory = TrainerMemory(self._ddp, self._optimizer, layout.device)
        self._round_weights()  # after the optimizer has taken its masters
        self._sending: SendingTask | None = None
        self._sender = Sender(dist.get_rank())

    def _wrap_for_training(self, dtype: torch.dtype) -> None:
        config, bf16 = self.config, dtype == torch.bfloat16
        overlap, sharded = config.trainer.overlap_communication, config.trainer.distributed_optimizer
        self._gathers_late = overlap and sharded
        self._megatron_config = megatron_config = self.model[0].config
        for name, parameter in named_parameters(self.model):
            if is_expert(name):
                # Where experts are replicated over the same ranks as all else (ep = 1, etp = tp), Megatron would put
                # them into one optimizer with it, whose checkpoint no other layout can load.
                parameter.allreduce = False  # type: ignore[attr-defined]
        self._ddp: list[Any] = [  # Megatron's functions differ in the type of list that they are annotated with
            DistributedDataParallel(
                megatron_config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=sharded,
                    overlap_grad_reduce=overlap,
                    overlap_param_gather=self._gathers_late,
                ),
                Float16Module(megatron_config, chunk) if bf16 else chunk,
                # Of the chunks of an interleaved pipeline one is communicated while another computes.
                disable_bucketing=number > 0,
            )
            for number, chunk in enumerate(self.model)
        ]
        if overlap:
            no_sync: Any = [chunk.no_sync for chunk in self._ddp]  # annotated without the list that a schedule takes
            megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if self._gathers_late:
            self._gather_output_head_in_time()
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.optimizer.lr,
                weight_decay=config.optimizer.weight_decay,
                adam_beta1=config.optimizer.beta1,
                adam_beta2=config.optimizer.beta2,
                adam_eps=config.optimizer.eps,
                clip_grad=config.optimizer.clip_grad,
                bf16=bf16,
                params_dtype=dtype,
                use_distributed_optimizer=sharded,
                overlap_param_gather=self._gathers_late,
                optimizer_cpu_offload=config.optimizer.cpu_offload,
                optimizer_offload_fraction=1.0,
                overlap_cpu_optimizer_d2h_h2d=True,
                # Else a second master, a float32 copy of the weights, stays on the GPU.
                use_precision_aware_optimizer=config.optimizer.cpu_offload,
            ),
            self._ddp,
            use_gloo_process_groups=False,
        )
        megatron_config.grad_scale_func = self._optimizer.scale_loss
        # Our loss is divided by the mini-batch's token count already, so Megatron gets no count to divide by.
        megatron_config.finalize_model_grads_func = lambda model, num_tokens=None, **rest: finalize_model_grads(
            model, None, **rest
        )

    def _gather_output_head_in_time(self) -> None:
        """Megatron waits for a layer's weights when the layer is called; the output processor never calls its own."""
        model, ddp = self.model[-1], self._ddp[-1]
        if model.post_process:
            wait_for = ddp._make_forward_pre_hook()
            final_norm: Any = model.decoder.final_layernorm
            final_norm.register_forward_pre_hook(lambda *_: wait_for(model.output_layer))

    def _finish_gathering(self) -> None:
        """Before weights are read outside a forward pass; the ranks of a dp x cp group call it together."""
        for chunk in self._ddp if self._gathers_late else ():
            chunk.start_param_sync(force_sync=True)

    # ----- forward pass

    def log_probs(self, batch: TrainBatch) -> tuple[list[int], TokenScores] | None:
        """Score the responses of this rank's data-parallel slice with the current weights.

        Returns:
            On ranks that report (last stage, tp and cp rank 0): rows of the batch, and their scores in that order. Else
            None.
        """
        microbatches = self._microbatches(batch)
        adaptive = bool((batch.temperatures != self.config.rollout.temperature).any())
        collected = self._run(microbatches, self._score, forward_only=True, rollout_temperatures=adaptive)
        if not self.layout.is_last_stage:
            return None
        columns = self._whole_responses(microbatches, collected).cpu().numpy()
        if not self.layout.reports:
            return None
        rows = [row for microbatch in microbatches for row in microbatch.rows]
        return rows, TokenScores(log_probs=columns[0], rollout_temperature_log_probs=columns[1], entropies=columns[2])

    def _whole_responses(self, microbatches: list[MicroBatch], collected: list[tuple[Tensor, ...]]) -> Tensor:
        """[3, tokens]: the micro-batches' scores with the tokens of the other context-parallel ranks filled in."""
        parts = []
        for microbatch, scores in zip(microbatches, collected, strict=True):
            part = torch.zeros(len(scores), microbatch.num_response_tokens, device=self.layout.device)
            part[:, microbatch.response_index] = torch.stack(scores)
            parts.append(part)
        whole = torch.cat(parts, dim=1)
        if self.layout.cp_size > 1:
            dist.all_reduce(whole, group=self.layout.cp_group)
        return whole

    def _score(self, scores: Tensor, microbatch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        (log_probs_N, entropies_N), (rollout_N, _) = scores[0], scores[-1]
        return log_probs_N, rollout_N, entropies_N

    # ----- update

    def update(self, batch: TrainBatch, *, step: int) -> dict[str, float] | None:
        """One optimizer step on a mini-batch that carries old_log_probs, advantages and what its loss needs.

        Returns:
            On ranks of the last stage the mini-batch's metrics, equal on all of them. Else None.
        Raises:
            TrainingError: the loss or the gradient is not finite; the weights are unchanged.
        """
        self._needs_its_memory("update")
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_of = partial(self._loss, num_tokens=batch.num_response_tokens, stats=batch.stats)
        collected = self._run(self._microbatches(batch), loss_of, forward_only=False)
        learning_rate = self._set_learning_rate(step)
        # step() would clip by and then apply a NaN norm, so the norm is looked at before it.
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {step}: gradient norm is {grad_norm} on rank {dist.get_rank()}; the weights were not changed. "
                "Look at loss/* and rollout/logprob_abs_diff of the last steps; a lower optimizer.lr often helps."
            )
        self._optimizer.step()
        self._round_weights()
        if not self.layout.is_last_stage:
            return None
        sums = {name: torch.stack([part[name].double() for part in collected]).sum() for name in collected[0]}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals, group=self.layout.dp_cp_group)
        means = dict(zip(sums, (totals / batch.num_response_tokens).tolist(), strict=True))
        return {
            "loss/policy": means["loss"] * batch.num_response_tokens,
            "loss/clip_fraction_low": means["clipped_low"],
            "loss/clip_fraction_high": means["clipped_high"],
            "loss/dual_clip_fraction": means["dual_clipped"],
            "loss/approx_kl": -means["log_ratio"],
            "loss/importance_ratio": means["ratio"],
            "grad_norm": grad_norm,
            "lr": learning_rate,
        }

    def _loss(
        self, scores: Tensor, microbatch: MicroBatch, *, num_tokens: int, stats: EntropyStats | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs_N, entropies_N = scores[0]
        return policy_loss(
            log_probs_N,
            entropies_N,
            microbatch,
            self.config.algorithm,
            num_tokens=num_tokens,
            stats=stats,
            cp_group=self.layout.cp_group if self.layout.cp_size > 1 else None,
        )

    def _round_weights(self) -> None:
        if self.config.trainer.quantization == "fp8":
            self._finish_gathering()
            round_to_float8(self.model, self.layout)

    def _set_learning_rate(self, step: int) -> float:
        """Linear warm-up over steps; step counts from 1, so the first step already moves the weights."""
        optimizer = self.config.optimizer
        rate = optimizer.lr * min(1.0, step / max(1, optimizer.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        return rate

    # ----- weights

    def weight_buckets(self, *, verify: bool) -> Iterator[WeightBucket]:
        """Whole HF tensors in the engines' dtype, in buckets, from the ranks that speak for them.

        The ranks of a tp group iterate in lockstep, each group on its own.
        """
        config = self.config
        dtype = getattr(torch, config.rollout.dtype)
        bucket = BucketBuilder(
            max_bytes=config.weight_sync.bucket_bytes,
            checksums=self._engine_cut() if verify else None,
        )
        self._finish_gathering()
        for name, tensor in spoken_tensors(self.model, self.shape, self.layout):
            yield from bucket.add(name, tensor.to(dtype))
        yield from bucket.rest()

    def own_parameters(self) -> tuple[Parameter, ...]:
        """What this rank holds of the policy, in Hugging Face coordinates; a tied output head is not repeated."""
        return rank_parameters(
            self._named_parameters(), lambda name: place_of(name, self.shape, self.layout), self.shape
        )

    def prepare_sending(self, task: SendingTask) -> None:
        """Take this rank's part of the plan, for all `send_weights` to come."""
        self._sending = task

    def send_weights(self, transfer: Transfer, *, verify: bool) -> dict[str, list[int]] | None:
        """Send this rank's pieces to every engine rank; all ranks call it, in no order.

        Returns:
            What this rank adds to the checksums of the engines' slices, if the sync is verified.
        """
        assert self._sending is not None, "prepare_sending comes first"
        self._finish_gathering()
        matrices = {name: as_matrix(parameter) for name, parameter in self._named_parameters()}
        with torch.no_grad():
            self._sender.send(self._sending.channels, matrices, transfer)
            if not verify:
                return None
            return partial_checksums(
                self._sending.own_blocks,
                matrices,
                shapes=hf_tensor_shapes(self.shape),
                cut=self._engine_cut(),
                dtype=getattr(torch, transfer.dtype),
            )

    def _engine_cut(self) -> EngineCut:
        return engine_cut(self.shape, tp=self.config.rollout.tp, ep=self.config.rollout.ep)

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in named_parameters(self.model):
            if not (name == "output_layer.weight" and self.shape.tied_embeddings):
                yield name, parameter

    def export_hf(self, folder: Path) -> dict[str, str] | None:
        """Write this rank's part of an HF folder; returns tensor name to file name where it wrote any."""
        self._finish_gathering()
        return write_stage(self.model, self.shape, self.layout, folder)

    def save_checkpoint(self, folder: Path) -> None:
        self._needs_its_memory("save_checkpoint")
        self._finish_gathering()
        checkpoint.save(self.model, self._optimizer, self.layout, folder)

    def load_checkpoint(self, folder: Path) -> None:
        self._needs_its_memory("load_checkpoint")
        checkpoint.load(self.model, self._optimizer, self.layout, folder)
        self._round_weights()  # the checkpoint may be of a run without quantization

    # ----- memory

    def release_memory(self, parts: Sequence[str]) -> None:
        """Give back `gradients` or `optimizer` until `take_memory`; weights stay, and can be sent and exported."""
        self._finish_gathering()
        self._memory.release(parts)

    def take_memory(self, parts: Sequence[str]) -> None:
        self._memory.take(parts)

    def _needs_its_memory(self, what: str) -> None:
        assert not self._memory.given_back, f"{what}: take_memory comes first: {sorted(self._memory.given_back)}"

    # ----- the pipeline schedule

    def _microbatches(self, batch: TrainBatch) -> list[MicroBatch]:
        plan = plan_microbatches(
            batch.sequence_lengths,
            dp_size=self.layout.dp_size,
            max_tokens=self.config.trainer.max_tokens_per_microbatch,
            # The interleaved schedule takes micro-batches in groups of as many as there are stages.
            multiple=self.layout.pp_size if len(self.model) > 1 else 1,
        )
        multiple = self.layout.tp_size if self._megatron_config.sequence_parallel else 1
        return [
            pack(
                batch,
                rows,
                device=self.layout.device,
                multiple=multiple,
                cp_size=self.layout.cp_size,
                cp_rank=self.layout.cp_rank,
            )
            for rows in plan[self.layout.dp_rank]
        ]

    def _run(
        self,
        microbatches: list[MicroBatch],
        on_scores: Callable[[Tensor, MicroBatch], Any],
        *,
        forward_only: bool,
        rollout_temperatures: bool = False,
    ) -> list[Any]:
        """Run the schedule; `on_scores` sees what the output head makes of each micro-batch; results come in order.

        For a backward pass `on_scores` returns the loss and what is to be collected.
        """

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
            microbatch = next(iterator)
            output = model(
                microbatch.input_ids,
                microbatch.position_ids,
                None,
                packed_seq_params=packed_params(
                    microbatch.sequence_lengths,
                    self.layout.device,
                    qkv_format=self._packed_format,
                    cp_size=self.layout.cp_size,
                    cp_rank=self.layout.cp_rank,
                ),
                output_processor=self._output_head,
                output_processor_context=self._scored_tokens(microbatch, rollout_temperatures=rollout_temperatures),
            )

            def on_output(scores: Tensor, non_loss_data: bool = False) -> Any:
                result = on_scores(scores, microbatch)
                if non_loss_data:
                    return result
                loss, collected = result
                return loss, torch.tensor(0, dtype=torch.int, device=self.layout.device), collected

            return output, on_output

        longest = max(sum(microbatch.sequence_lengths) for microbatch in microbatches)
        with torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(microbatches) for _ in self._ddp],
                model=self._ddp,
                num_microbatches=len(microbatches),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _scored_tokens(self, microbatch: MicroBatch, *, rollout_temperatures: bool) -> ScoredTokens:
        """At the base temperature first; where asked for, at those of the rollout too."""
        temperatures: tuple[float | Tensor, ...] = (self.config.rollout.temperature,)
        if rollout_temperatures:
            temperatures += (microbatch.temperatures,)
        return ScoredTokens(microbatch.predicting_positions, microbatch.targets, temperatures)
