"""Stand-ins for SGLang's GPU-only packages, put on PYTHONPATH by `sglang_ext.cpu.environment` and never on a GPU."""
