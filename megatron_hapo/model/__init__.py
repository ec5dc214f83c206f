"""The Megatron-Core model of a Hugging Face config, and the set-up of a process that holds a shard of it."""
