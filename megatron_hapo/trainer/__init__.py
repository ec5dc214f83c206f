"""One trainer rank, and the trainer as the driver sees it."""
