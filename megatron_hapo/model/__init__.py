"""Hugging Face config to Megatron-Core model, and the process that holds a part of it."""
