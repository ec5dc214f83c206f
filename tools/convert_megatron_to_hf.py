"""`megatron-hapo convert megatron-to-hf SRC DST`, also under torchrun, for models larger than one machine's memory."""

import sys

from megatron_hapo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
