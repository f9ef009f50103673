"""Tests that need Detectron2; CI runs them with it installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("detectron2") else ["test_*.py"]
