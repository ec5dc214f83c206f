"""Which layouts fit and how fast they would be, computed from a model's sizes. Imports no torch."""
