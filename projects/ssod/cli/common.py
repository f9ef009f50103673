"""What the commands share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from ssod.errors import InputError


def run_command(command: Callable[[], Any]) -> int:
    """
    Run a command as a program: messages on stderr, bad input as one line.

    Returns:
        Exit status: 0, 2 for an `InputError`, 130 if interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        command()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
