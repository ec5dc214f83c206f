"""Experiments: methods times settings times seeds, run and compared."""
