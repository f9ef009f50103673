"""Semi-supervised object detection: one algorithm in `ssod.core`, two hosts in `ssod.hosts`."""

__version__ = "0.1.0.dev0"
