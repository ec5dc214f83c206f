"""One small module a method: what it has of its own. The rest of a method is settings, in `configs/methods/NAME.yaml`.

All methods share the rollouts, rewards, entropies, mini-batches and the clipped objective of `megatron_hapo.loss`,
which is homogeneous in the advantages. So an aggregation, a token filter or an importance correction is a constant
weight of each token, known before the first micro-batch, and the result stays independent of the layout.

`B` responses, `N` response tokens.
"""
