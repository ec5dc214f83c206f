"""Output processors of GPTModel: from the last layer's hidden states to log-probs and entropies of response tokens.

Only positions that predict a response token reach a head. `N` such tokens of a micro-batch, `V` vocabulary columns of a
rank, `H` hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
from megatron_hapo.logprobs.fused_head import CHUNK_BYTES, fused_log_probs_and_entropy, fused_scores
from megatron_hapo.logprobs.head_products import float32_logits
from megatron_hapo.logprobs.kept_tokens import Kept


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of a micro-batch to score: the context of an output head."""

    positions: Tensor
    """[N] int64, positions in the packed sequence that predict the tokens."""
    targets: Tensor
    """[N] int64 token ids."""
    temperatures: tuple[float | Tensor, ...]
    """Numbers or [N] each. A backward pass through `FusedHead` needs exactly one."""
    kept: Kept | None = None
    """Token ids among which the log-probs are normalised; None: the whole vocabulary. Not the entropies."""


@dataclass(frozen=True)
class OutputHead(ABC):
    """An output processor of GPTModel; all ranks that share the vocabulary must call it."""

    tp_group: dist.ProcessGroup | None
    """Ranks that share the vocabulary; None if it is not sharded."""
    vocab_size: int
    """Real size, without padding."""
    entropy_gradient: bool = False
    """Whether entropies are differentiable, which costs a little more in the backward pass."""
    float32_logits: bool = False
    """Whether logits are kept as the product has summed them, in float32, instead of rounded to the weights' dtype."""

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: ScoredTokens,
        **_: Any,
    ) -> Tensor:
        """Log-probs and entropies in nats at each temperature, equal on all ranks of tp_group. [temperatures, 2, N]

        float32. Log-probs carry gradient; entropies only with `entropy_gradient`.
        """
        if output_layer.sequence_parallel:
            # Gather all rows, then select. The gather's backward reduce-scatters the partial gradients of the
            # vocabulary shards, so no head has to sum them.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
        weight_VH = output_layer.weight if output_weight is None else output_weight
        scores = self._score(hidden_states[:, 0][context.positions], weight_VH, output_layer, context)
        if not self.entropy_gradient:
            scores = [(log_probs_N, entropies_N.detach()) for log_probs_N, entropies_N in scores]
        return torch.stack([torch.stack(pair) for pair in scores])

    @abstractmethod
    def _score(
        self, hidden_NH: Tensor, weight_VH: Tensor, output_layer: Any, tokens: ScoredTokens
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-probs and entropies [N] at each temperature."""


class LogitsHead(OutputHead):
    """Computes the logits of all tokens at once; the backward pass overwrites them with their gradient."""

    def _score(
        self, hidden_NH: Tensor, weight_VH: Tensor, output_layer: Any, tokens: ScoredTokens
    ) -> list[tuple[Tensor, Tensor]]:
        logits_NV = self._logits(hidden_NH, weight_VH, output_layer)
        return [
            vocab_parallel_log_probs_and_entropy(
                logits_NV,
                tokens.targets,
                tp_group=self.tp_group,
                vocab_size=self.vocab_size,
                temperature=temperature,
                kept=tokens.kept,
            )
            for temperature in tokens.temperatures
        ]

    def _logits(self, hidden_NH: Tensor, weight_VH: Tensor, output_layer: Any) -> Tensor:
        if self.float32_logits:
            return float32_logits(
                hidden_NH, weight_VH, tp_group=None if output_layer.sequence_parallel else self.tp_group
            )
        return linear_with_grad_accumulation_and_async_allreduce(
            input=hidden_NH,
            weight=weight_VH,
            bias=None,
            gradient_accumulation_fusion=output_layer.gradient_accumulation_fusion,
            allreduce_dgrad=not output_layer.sequence_parallel and self.tp_group is not None,
            sequence_parallel=False,
            tp_group=output_layer.tp_group,
        )


@dataclass(frozen=True)
class FusedHead(OutputHead):
    """Computes the logits of one chunk of tokens at a time, in the forward and again in the backward pass."""

    chunk_bytes: int = CHUNK_BYTES

    def _score(
        self, hidden_NH: Tensor, weight_VH: Tensor, output_layer: Any, tokens: ScoredTokens
    ) -> list[tuple[Tensor, Tensor]]:
        if not torch.is_grad_enabled():
            return fused_scores(
                hidden_NH,
                weight_VH,
                tokens.targets,
                temperatures=tokens.temperatures,
                tp_group=self.tp_group,
                vocab_size=self.vocab_size,
                kept=tokens.kept,
                chunk_bytes=self.chunk_bytes,
                float32_logits=self.float32_logits,
            )
        [temperature] = tokens.temperatures
        scores = fused_log_probs_and_entropy(
            hidden_NH,
            weight_VH,
            tokens.targets,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            temperature=temperature,
            kept=tokens.kept,
            chunk_bytes=self.chunk_bytes,
            reduce_hidden_gradient=not output_layer.sequence_parallel,
            float32_logits=self.float32_logits,
        )
        return [scores]


OUTPUT_HEADS: dict[str, type[OutputHead]] = {"logits": LogitsHead, "fused": FusedHead}
"""Head for each value of `trainer.output_head`."""
