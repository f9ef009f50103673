"""The progress bar of everything that takes long."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """Return a `tqdm` with these arguments; where stderr is a file it writes twice a minute."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(*args, dynamic_ncols=True, mininterval=interval, **kwargs)
