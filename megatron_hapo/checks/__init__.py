"""Checks a run before it starts: its files, its layout, and a rehearsal of every part."""
