"""Hugging Face folders in and out, and resumable checkpoints."""
