"""One trainer rank: log-probs, updates, and access to its weights and memory. Independent of the launcher.

All ranks call the same methods in the same order. Shape letter: `N` response tokens of a micro-batch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.algorithm.methods import enabled_parts
from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.algorithm.objective import UPDATED_TOKENS, policy_loss
from megatron_hapo.checkpoint import resumable
from megatron_hapo.checkpoint.hf_weights import local_placement, owned_tensors, write_hf_shards
from megatron_hapo.checkpoint.weights import load_weights
from megatron_hapo.config import Config
from megatron_hapo.errors import TrainingError
from megatron_hapo.logprobs.kept_tokens import Kept
from megatron_hapo.logprobs.output_head import OUTPUT_HEADS, ScoredTokens
from megatron_hapo.model.build import build_model, named_parameters, packed_format
from megatron_hapo.model.fake_quantization import round_to_float8
from megatron_hapo.model.families import hf_tensor_shapes, linear_tensors, read_shape
from megatron_hapo.model.parallel_layout import ParallelLayout
from megatron_hapo.model.route_replay import install
from megatron_hapo.observe.running_stages import WorkCount
from megatron_hapo.resharding.expected import float8_checksums, partial_checksums
from megatron_hapo.resharding.layouts import rank_parameters
from megatron_hapo.resharding.plan import Parameter, SendingTask
from megatron_hapo.resharding.transfer import Transfer, as_matrix
from megatron_hapo.resharding.transports import Sender
from megatron_hapo.resharding.weight_buckets import BucketBuilder, EngineCut, engine_cut
from megatron_hapo.trainer.learning_rate import LearningRate
from megatron_hapo.trainer.offload import ReleasableMemory
from megatron_hapo.trainer.optimizer import take_step, wait_for_weights, wrap_for_training
from megatron_hapo.trainer.reference import ReferenceWeights
from megatron_hapo.trainer.schedule import run_microbatches, split_into_microbatches
from megatron_hapo.types import TokenScores, TrainBatch, WeightBucket, ragged_index

_NAMED_SUMS = ("loss", "clipped_low", "clipped_high", "dual_clipped", "log_ratio", "ratio")
"""Sums of every surrogate, whose metrics have names of their own."""


class _Updated(NamedTuple):
    """What an update keeps for `updated_tokens`."""

    response_lengths: np.ndarray
    """[B] int64, of the mini-batch."""
    microbatches: list[MicroBatch]
    collected: list[dict[str, Tensor]]


class TrainerRank:
    """The policy's shard on this rank, with its optimizer.

    Args:
        config: of the run.
        layout: this rank's position in the process grid; its process groups must exist.
    """

    def __init__(self, config: Config, layout: ParallelLayout):
        self.config, self.layout = config, layout
        self.shape = read_shape(config.model.path)
        self.model = build_model(
            self.shape,
            layout,
            dtype=getattr(torch, config.trainer.dtype),
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.trainer.recompute,
            spec=config.model.spec,
            deterministic=config.deterministic,
        )
        self._replays = install(self.model, self.shape, layout)
        load_weights(self.model, self.shape, layout, config.model.path)
        self._output_head = OUTPUT_HEADS[config.trainer.output_head](
            tp_group=layout.tp_group if layout.sizes.tp > 1 else None,
            vocab_size=self.shape.vocab_size,
            entropy_gradient=any(part.entropy_gradient for part in enabled_parts(config.algorithm)),
            float32_logits=config.trainer.float32_logits,
        )
        self._chunks, self._optimizer = wrap_for_training(self.model, config)
        self._learning_rate = LearningRate(self._optimizer, config)
        self._memory = ReleasableMemory(self._chunks, self._optimizer, layout.device)
        self._round_weights()  # after the optimizer has copied its master weights
        self._reference = ReferenceWeights(self.model) if config.algorithm.kl.enabled else None
        self._updated: _Updated | None = None
        self._sending: SendingTask | None = None
        self._sender = Sender(dist.get_rank())
        self.count = WorkCount()
        """How far it is; replaced by whoever shows it."""

    # ----- forward pass

    def log_probs(self, batch: TrainBatch) -> tuple[list[int], TokenScores] | None:
        """Score the responses of this rank's data-parallel slice with the current weights.

        Returns:
            On reporting ranks (last stage, tp and cp rank 0) the rows of the batch that it scored, and their scores in
            that order. None on the others.
        """
        microbatches = self._microbatches(batch)
        adaptive = bool((batch.temperatures != self.config.rollout.temperature).any())
        for replay in self._replays:
            replay.counts = True
        collected = self._run(microbatches, self._score, forward_only=True, rollout_temperatures=adaptive)
        for replay in self._replays:
            replay.counts = False
        if not self.layout.is_last_stage:
            return None
        columns = self._whole_responses(microbatches, collected).cpu().numpy()
        if not self.layout.reports:
            return None
        rows = [row for microbatch in microbatches for row in microbatch.rows]
        return rows, TokenScores(log_probs=columns[0], rollout_temperature_log_probs=columns[1], entropies=columns[2])

    def reference_log_probs(self, batch: TrainBatch) -> tuple[list[int], np.ndarray] | None:
        """Score the responses of this rank's data-parallel slice with the reference model, at the base temperature.

        Returns:
            As `log_probs`: rows and log-probs, [N] float32.
        """
        assert self._reference is not None, "algorithm.kl is not enabled"
        microbatches = self._microbatches(batch)
        wait_for_weights(self._chunks)
        with self._reference.in_place_of_policy():
            collected = self._run(microbatches, lambda scores, _: (scores[0, 0],), forward_only=True)
        if not self.layout.is_last_stage:
            return None
        (log_probs_N,) = self._whole_responses(microbatches, collected).cpu().numpy()
        if not self.layout.reports:
            return None
        return [row for microbatch in microbatches for row in microbatch.rows], log_probs_N

    def replace_reference(self) -> None:
        """Make the current weights the reference model."""
        assert self._reference is not None, "algorithm.kl is not enabled"
        wait_for_weights(self._chunks)
        self._reference.replace()

    def route_agreement(self) -> tuple[int, int]:
        """Of the experts that `log_probs` has replayed on this rank, how many its routers chose as well, and all."""
        counts = [replay.take_counts() for replay in self._replays]
        return sum(agreeing for agreeing, _ in counts), sum(known for _, known in counts)

    def _whole_responses(self, microbatches: list[MicroBatch], collected: list[tuple[Tensor, ...]]) -> Tensor:
        """The micro-batches' values, [values, tokens], with the tokens of other context-parallel ranks filled in."""
        parts = []
        for microbatch, scores in zip(microbatches, collected, strict=True):
            part = torch.zeros(len(scores), microbatch.num_response_tokens, device=self.layout.device)
            part[:, microbatch.response_index] = torch.stack(scores)
            parts.append(part)
        whole = torch.cat(parts, dim=1)
        if self.layout.sizes.cp > 1:
            dist.all_reduce(whole, group=self.layout.cp_group)
        return whole

    def _score(self, scores: Tensor, microbatch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        (log_probs_N, entropies_N), (rollout_N, _) = scores[0], scores[-1]
        return log_probs_N, rollout_N, entropies_N

    # ----- update

    def update(self, batch: TrainBatch, *, step: int, keep_tokens: bool = False) -> dict[str, float] | None:
        """Take one optimizer step on a mini-batch with old_log_probs, advantages and whatever else its loss needs.

        Args:
            keep_tokens: keep what the loss used of each token until `updated_tokens` fetches it.
        Returns:
            The mini-batch's metrics, and sums `measured/NAME` (`Part.sums`), on ranks of the last stage, where they are
            equal. None on the others.
        Raises:
            TrainingError: the loss or the gradient is not finite; the weights are unchanged.
        """
        self._require_memory("update")
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_of = partial(self._loss, batch=batch, keep_tokens=keep_tokens)
        microbatches = self._microbatches(batch)
        collected = self._run(microbatches, loss_of, forward_only=False)
        learning_rate = self._learning_rate.set(step=step)
        # A NaN norm would clip the gradients to NaN, so check it first.
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {step}: gradient norm is {grad_norm} on rank {dist.get_rank()}; the weights were not changed. "
                "Check loss/* and rollout/logprob_abs_diff of the last steps; a lower optimizer.lr often helps."
            )
        take_step(self._optimizer, grad_norm)
        self._round_weights()
        if not self.layout.is_last_stage:
            return None
        names = [name for name in collected[0] if name not in (*UPDATED_TOKENS, "h")]
        if keep_tokens:
            self._updated = _Updated(batch.response_lengths, microbatches, collected)
        sums = {name: torch.stack([part[name].double() for part in collected]).sum() for name in names}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals, group=self.layout.dp_cp_group)
        measured = [name for name in names if name.startswith("measured/")]
        means = dict(zip(sums, (totals / batch.num_response_tokens).tolist(), strict=True))
        return {
            "loss/policy": means["loss"] * batch.num_response_tokens,
            "loss/clip_fraction_low": means["clipped_low"],
            "loss/clip_fraction_high": means["clipped_high"],
            "loss/dual_clip_fraction": means["dual_clipped"],
            "loss/approx_kl": -means["log_ratio"],
            "loss/importance_ratio": means["ratio"],
            **{f"loss/{name}": means[name] for name in names if name not in (*_NAMED_SUMS, *measured)},
            **{name: means[name] * batch.num_response_tokens for name in measured},
            "grad_norm": grad_norm,
            "lr": learning_rate,
        }

    def updated_tokens(self, rows: Sequence[int]) -> tuple[list[int], dict[str, np.ndarray]] | None:
        """What the last update's loss used of each token of these rows of its mini-batch (`policy_loss`).

        Returns:
            On reporting ranks the rows that it holds, and [N] float32 by name, in that order. None on the others.
        """
        updated, self._updated = self._updated, None
        if not self.layout.is_last_stage:
            return None
        assert updated is not None, "call update with keep_tokens first"
        names = [name for name in (*UPDATED_TOKENS, "h") if name in updated.collected[0]]
        columns = [tuple(part[name].float() for name in names) for part in updated.collected]
        values = self._whole_responses(updated.microbatches, columns).cpu().numpy()
        if not self.layout.reports:
            return None
        held = [row for microbatch in updated.microbatches for row in microbatch.rows]
        chosen = np.flatnonzero(np.isin(held, rows))
        index = ragged_index(np.asarray(updated.response_lengths)[held], chosen)
        return [held[place] for place in chosen], {
            name: values_N[index] for name, values_N in zip(names, values, strict=True)
        }

    def _loss(
        self,
        scores: Tensor,
        microbatch: MicroBatch,
        *,
        batch: TrainBatch,
        keep_tokens: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs_N, entropies_N = scores[0]
        return policy_loss(
            log_probs_N,
            entropies_N,
            microbatch,
            self.config.algorithm,
            num_tokens=batch.num_response_tokens,
            stats=batch.stats,
            controls=batch.controls,
            cp_group=self.layout.cp_group if self.layout.sizes.cp > 1 else None,
            keep_tokens=keep_tokens,
        )

    def _round_weights(self) -> None:
        if self.config.trainer.quantization == "fp8":
            wait_for_weights(self._chunks)
            round_to_float8(self.model, self.layout)

    # ----- weights

    def weight_buckets(self, *, verify: bool) -> Iterator[WeightBucket]:
        """The whole HF tensors that this rank owns, in the engines' dtype, in buckets.

        The ranks of a tp group iterate in lockstep; different groups are independent.
        """
        config = self.config
        dtype = getattr(torch, config.rollout.dtype)
        bucket = BucketBuilder(
            max_bytes=config.weight_sync.bucket_bytes,
            checksums=self._engine_cut() if verify else None,
        )
        wait_for_weights(self._chunks)
        for name, tensor in owned_tensors(self.model, self.shape, self.layout):
            yield from bucket.add(name, tensor.to(dtype))
        yield from bucket.rest()

    def own_parameters(self) -> tuple[Parameter, ...]:
        """This rank's parameters in Hugging Face coordinates; a tied output head is not repeated."""
        return rank_parameters(
            self._named_parameters(), lambda name: local_placement(name, self.shape, self.layout), self.shape
        )

    def prepare_sending(self, task: SendingTask) -> None:
        """Set this rank's part of the plan, which all later calls of `send_weights` carry out."""
        self._sending = task

    def send_weights(self, transfer: Transfer, *, verify: bool) -> dict[str, list[int]] | None:
        """Send this rank's pieces to every engine rank. All ranks call it, in any order.

        With rollout.quantization and `verify`, the ranks of a tp group first gather whole tensors: before they send, so
        that a rank whose engine dies keeps no other waiting.

        Returns:
            This rank's contribution to the checksums of the engines' slices if `verify`, else None.
        """
        assert self._sending is not None, "call prepare_sending first"
        wait_for_weights(self._chunks)
        matrices = {name: as_matrix(parameter) for name, parameter in self._named_parameters()}
        cut, dtype = self._engine_cut(), getattr(torch, transfer.dtype)
        quantized = self.config.rollout.quantization == "fp8"
        sums = None
        with torch.no_grad():
            if verify and quantized:
                tensors = owned_tensors(self.model, self.shape, self.layout)
                sums = float8_checksums(tensors, linear=linear_tensors(self.shape), cut=cut, dtype=dtype)
            self._sender.send(self._sending.channels, matrices, transfer)
            if verify and not quantized:
                shapes = hf_tensor_shapes(self.shape)
                sums = partial_checksums(self._sending.owned_blocks, matrices, shapes=shapes, cut=cut, dtype=dtype)
        return sums

    def _engine_cut(self) -> EngineCut:
        return engine_cut(self.shape, tp=self.config.rollout.tp, ep=self.config.rollout.ep)

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in named_parameters(self.model):
            if not (name == "output_layer.weight" and self.shape.tied_embeddings):
                yield name, parameter

    def export_hf(self, folder: Path) -> dict[str, str] | None:
        """Write the tensors that this rank owns into an HF folder; returns tensor name to file name, or None."""
        wait_for_weights(self._chunks)
        return write_hf_shards(self.model, self.shape, self.layout, folder)

    def save_checkpoint(self, folder: Path) -> dict[str, str]:
        """Write this rank's shard of a resumable checkpoint into an existing folder; returns when all ranks have.

        A reference model that is not the model of the run's start goes into a folder inside it.

        Returns:
            The files that this rank has written, and their hashes.
        """
        self._require_memory("save_checkpoint")
        wait_for_weights(self._chunks)
        written = resumable.save(self.model, self._optimizer, self.layout, folder)
        if self._reference is None or self._reference.is_initial:
            return written
        with self._reference.in_place_of_policy():
            return written | resumable.save_reference(self.model, self.layout, folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Load model, optimizer and reference from a checkpoint of any layout; raises ConfigError if it is damaged.

        Without a reference in the checkpoint it stays the model of the run's start, which this rank has loaded.
        """
        self._require_memory("load_checkpoint")
        resumable.load(self.model, self._optimizer, self.layout, folder)
        self._round_weights()  # the checkpoint may come from a run without quantization
        if self._reference is not None and resumable.has_reference(folder):
            with self._reference.in_place_of_policy():
                resumable.load_reference(self.model, self.shape, self.layout, folder)
                self._round_weights()
            self._reference.is_initial = False

    # ----- memory

    def release_memory(self, parts: Sequence[str]) -> None:
        """Release `gradients` or `optimizer` until `take_memory`. The weights stay, and can be sent and exported."""
        wait_for_weights(self._chunks)
        self._memory.release(parts)

    def take_memory(self, parts: Sequence[str]) -> None:
        """Restore released parts; gradients become zero."""
        self._memory.restore(parts)

    def _require_memory(self, method: str) -> None:
        released = sorted(self._memory.released)
        assert not released, f"{method}: call take_memory first; released: {released}"

    # ----- micro-batches

    def _microbatches(self, batch: TrainBatch) -> list[MicroBatch]:
        return split_into_microbatches(
            batch,
            self.layout,
            max_tokens=self.config.trainer.max_tokens_per_microbatch,
            sequence_parallel=self.model[0].config.sequence_parallel,
            packed_format=packed_format(self.model),
        )

    def _run(
        self,
        microbatches: list[MicroBatch],
        on_scores: Callable[[Tensor, MicroBatch], Any],
        *,
        forward_only: bool,
        rollout_temperatures: bool = False,
    ) -> list[Any]:
        """See `run_microbatches`. `rollout_temperatures`: score at the rollout's temperatures, too."""

        def scored_tokens(microbatch: MicroBatch) -> ScoredTokens:  # once in each forward pass, on every stage
            self.count.begin_next()
            return self._scored_tokens(microbatch, rollout_temperatures=rollout_temperatures)

        self.count.start(len(microbatches) * len(self._chunks))
        collected = run_microbatches(
            self._chunks,
            microbatches,
            self.layout,
            output_head=self._output_head,
            scored_tokens=scored_tokens,
            on_scores=on_scores,
            forward_only=forward_only,
            packed_format=packed_format(self.model),
        )
        self.count.end()
        return collected

    def _scored_tokens(self, microbatch: MicroBatch, *, rollout_temperatures: bool) -> ScoredTokens:
        temperatures: tuple[float | Tensor, ...] = (self.config.rollout.temperature,)
        if rollout_temperatures:
            temperatures += (microbatch["temperatures"],)
        cut, kept = microbatch.kept, None
        if cut is not None and self.layout.is_last_stage:
            kept = Kept.of(cut.token_ids, cut.lengths, device=self.layout.device)
        return ScoredTokens(microbatch.predicting_positions, microbatch.targets, temperatures, kept)
