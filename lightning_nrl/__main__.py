"""`python -m lightning_nrl`, the same as the script `lightning-nrl`."""

import sys

from lightning_nrl.entrypoints.command_line import main

if __name__ == "__main__":
    sys.exit(main())
