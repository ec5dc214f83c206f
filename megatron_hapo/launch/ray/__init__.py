"""Ray: the actors of ranks and engines, the launcher that uses Ray alone, and Ray's own nodes."""
