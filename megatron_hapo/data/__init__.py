"""Prompts: read from files or generated, rendered, and put in order."""
