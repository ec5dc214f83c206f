"""Responses to scores, in worker processes with limits."""
