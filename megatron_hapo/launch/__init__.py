"""Processes: Ray actors around plain objects, and the run that puts them together."""

import os

# Read when ray is imported. Without a cluster to join, Ray's servers listen on the loopback interface alone; the name is
# Ray's own switch for "one node, on loopback", which it turns on by itself only on Windows and macOS.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
