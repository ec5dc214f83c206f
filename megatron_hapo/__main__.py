"""`python -m megatron_hapo` is `megatron-hapo`."""

import sys

from megatron_hapo.cli import main

sys.exit(main())
