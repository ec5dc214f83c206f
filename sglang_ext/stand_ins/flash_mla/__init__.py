"""Says at import that flash_mla is absent, in the way that Megatron-Core and SGLang expect."""

raise ImportError("flash_mla needs a GPU")
