"""Runs the command line: `python -m megatron_hapo` is the same as `megatron-hapo`."""

import sys

from megatron_hapo.cli import main

sys.exit(main())
