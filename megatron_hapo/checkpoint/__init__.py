"""Folders of weights: Hugging Face's, Megatron's, resumable ones, and the ways between them."""
