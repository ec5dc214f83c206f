"""One trainer rank, and all ranks together as the trainer that the driver uses."""
