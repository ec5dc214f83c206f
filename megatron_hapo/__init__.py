"""HAPO reinforcement learning of language models on Megatron-Core, SGLang and Ray."""

__version__ = "0.1.0"
