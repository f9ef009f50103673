"""Command line programs."""

import os

# Before torch loads GNU OpenMP, whose waiting threads spin without end by default: a training step
# on two threads took 20 times as long as soon as another process wanted one of two cores. Spinning
# for some microseconds only costs 8 % on a free machine.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
