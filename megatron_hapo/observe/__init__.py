"""What a run reports: spans of time, metrics, traces and curves."""
