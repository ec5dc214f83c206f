"""Code inside and around SGLang: the plugin with the entropy-adaptive temperature, and the engine that proves it."""
