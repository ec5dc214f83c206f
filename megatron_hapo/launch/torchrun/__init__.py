"""torchrun: its processes as trainer ranks, with the driver in rank 0."""
