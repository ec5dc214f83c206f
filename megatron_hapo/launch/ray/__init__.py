"""Ray: actors around ranks and engines, and Ray's own nodes."""
