"""Weights from the trainer's shards straight into the engines' own parameters, by a plan that is made once."""
