"""Folders of weights: Hugging Face's, Megatron's, resumable checkpoints, and the conversions between them.

Entry points: `weights` (load_weights, save_weights), `hf_weights` (load, gather and write Hugging Face tensors),
`resumable` (save, load: model and optimizer), `run_checkpoints` (Checkpoints of a run), `convert` and `quantize`.
"""
