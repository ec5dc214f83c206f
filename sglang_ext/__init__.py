"""What lives inside or around SGLang: the entropy-adaptive temperature hook and the engine that proves it."""
