"""Files that are complete or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Give a path to write to, which replaces `path` once that has been done without an error.

    Args:
        path: in a folder that exists.
    """
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)
