"""Processes: who starts what, and the run that puts them together."""
