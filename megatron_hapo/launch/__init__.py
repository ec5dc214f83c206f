"""Processes: Ray actors around plain objects, and the run that puts them together."""
