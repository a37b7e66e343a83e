"""Training script for every launcher: `deepspeed launch/train.py --losia ...`, `torchrun launch/train.py --losia ...`."""

import sys

from losia_dist.cli.main import train_main

if __name__ == "__main__":
    sys.exit(train_main())
