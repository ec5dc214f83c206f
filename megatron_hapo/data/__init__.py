"""Prompts: read from files or generated, tokenized, and ordered for training."""
