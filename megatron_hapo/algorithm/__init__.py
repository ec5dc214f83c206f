"""Scored groups to training batches and their loss: everything that a method chooses."""
