"""Replays the experts that the engine chose in the trainer's routers, in forward, backward and recomputed passes.

Engine and trainer round differently, so that close routing scores choose other experts, and whole tokens get other
outputs. Replaying keeps the engine's choice in the trainer's old log-probs and updates; the weights of the chosen
experts are computed from the trainer's scores, so that the router learns (R3, "Stabilizing MoE Reinforcement Learning
by Aligning Training and Inference Routers", arXiv:2510.11370).

Megatron's own `RouterReplay` (0.19.2) keeps one list per router of what the backward pass shall replay, in the order of
the forward passes, and its caller must say which pass is running, which a pipeline does not tell. Here routes travel
with the packed sequences, an argument of every layer, which recomputation passes again. A router therefore has an
object with the same method in place of Megatron's. A reference model replays the same experts, so that its KL starts
at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import checkpoint
from torch import Tensor

from megatron_hapo.model.families import Shape
from megatron_hapo.model.packed_attention import PackedBatchParams
from megatron_hapo.model.parallel_layout import ParallelLayout


class RouteReplay:
    """The replay of one router."""

    def __init__(self) -> None:
        self.routes: Tensor | None = None
        """[t, top_k] int64, experts of the tokens that the router sees next, -1 where it chooses; None: everywhere."""
        self._agreeing: list[Tensor] = []
        self._known: list[Tensor] = []
        self.counts = False
        """Whether to count how often the router agrees."""

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts of each token, [t, top_k] each. Megatron's routers call it."""
        scores_TK, own_TK = default_compute_topk(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        if self.routes is None:
            return scores_TK, own_TK
        assert self.routes.shape == own_TK.shape, f"routes {self.routes.shape} for tokens {own_TK.shape}"
        known_T1 = self.routes[:, :1] >= 0
        if self.counts:
            agrees_TK = (own_TK[:, :, None] == self.routes[:, None, :]).any(1)
            self._agreeing.append(agrees_TK.logical_and_(known_T1).sum())
            self._known.append(known_T1.sum() * topk)
        chosen_TK = torch.where(known_T1, self.routes, own_TK)
        return scores_TE.gather(1, chosen_TK), chosen_TK

    def take_counts(self) -> tuple[int, int]:
        """Of the replayed experts since the last call, those that the router would have chosen, and all."""
        agreeing, known = (int(torch.stack(values).sum()) if values else 0 for values in (self._agreeing, self._known))
        self._agreeing, self._known = [], []
        return agreeing, known


def install(model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout) -> list[RouteReplay]:
    """Makes the routers of this rank's layers replay `PackedBatchParams.routes`; empty without experts."""
    replays = []
    columns = {layer: column for column, layer in enumerate(shape.routes.expert_layers)} if shape.routes else {}
    layers: list[Any] = [layer for chunk in model for layer in chunk.decoder.layers]
    for layer in layers:
        column = columns.get(layer.layer_number - 1)
        if column is None:
            continue
        replay = RouteReplay()
        moe: Any = layer.mlp
        moe.router.router_replay = replay
        hook = _hand_over(replay, column, layout if moe.config.sequence_parallel else None)
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        if moe.moe_layer_recompute:
            _recompute_with_routes(moe, replay)
        replays.append(replay)
    return replays


def _hand_over(replay: RouteReplay, column: int, sharded: ParallelLayout | None) -> Callable[..., None]:
    """A hook that sets the routes of the pass which a layer begins, of this rank's part with sequence parallelism."""

    def hook(_layer: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packed = kwargs.get("packed_seq_params")
        assert isinstance(packed, PackedBatchParams), "layers are called with packed sequences"
        if packed.routes is None:
            replay.routes = None
            return
        routes = packed.routes[:, column]
        if sharded is not None:
            routes = routes.chunk(sharded.sizes.tp)[sharded.tp_rank]
        replay.routes = routes.long()

    return hook


def _recompute_with_routes(moe: Any, replay: RouteReplay) -> None:
    """Recomputes this layer's experts with the routes of its forward pass.

    Megatron would recompute them inside the layer, after the routers have been given those of later micro-batches.
    """
    moe.moe_layer_recompute = False
    compute = moe.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        routes = replay.routes

        def run(hidden: Tensor) -> Any:
            replay.routes = routes
            return compute(hidden, *args, **kwargs)

        return checkpoint(run, False, hidden_states) if moe.training else compute(hidden_states, *args, **kwargs)

    moe.forward = forward
