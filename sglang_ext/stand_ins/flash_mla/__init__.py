"""Fails to import, which is how Megatron-Core and SGLang detect that flash_mla is absent."""

raise ImportError("flash_mla needs a GPU")
