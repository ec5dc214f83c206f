"""HF config to Megatron-Core model."""
