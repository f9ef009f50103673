#!/usr/bin/env python3
"""Train or evaluate a semi-supervised detector: `python train_net.py --config-file X [KEY VALUE ...]`."""

import sys

from ssod.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
