"""Log-probs and entropies from vocabulary-sharded logits, or from hidden states and the sharded output weight."""

from megatron_hapo.logprobs.sharded import vocab_parallel_log_probs_and_entropy

__all__ = ["vocab_parallel_log_probs_and_entropy"]
