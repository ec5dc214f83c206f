"""`megatron-hapo quantize SRC DST --format fp8 --calibration DATA`."""

import sys

from megatron_hapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
