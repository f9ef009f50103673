#!/usr/bin/env python3
"""Train or evaluate: `python train_net.py --config-file configs/x.yaml [KEY VALUE ...]`."""

import sys

from ssod.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
