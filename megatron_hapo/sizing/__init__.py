"""Which layout fits, and how fast it would be: arithmetic on a model's sizes. Imports no torch."""
