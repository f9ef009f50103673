"""Command line programs."""

import os

# Before torch starts its threads: with libgomp's default, waiting threads spin, and a training step
# takes ten times as long as soon as another process wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
