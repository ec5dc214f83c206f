"""Prompts to scored groups of responses."""
