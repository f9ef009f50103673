"""
What the readers of annotation files share: boxes, and what to do about problems.

A reader hands each problem to an `OnProblem` and leaves the entry out. By default that is `stop`,
which raises it, so that nothing unusable is trained on; `ssod check-data` collects them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ssod.errors import InputError

logger = logging.getLogger(__name__)

OnProblem = Callable[[str, InputError], None]  # takes the kind of a problem and its message

MAX_SIDE = 1_000_000  # pixels; larger numbers are mistakes
MISSING_FILES = "missing image files"
NO_AREA = "boxes without area"
LEFT_OUT = "boxes without area, left out"
OUTSIDE = "boxes that reach out of their image"
REPEATED = "annotation ids that are repeated"
UNREADABLE = "unreadable images in a folder"
HARMLESS = {LEFT_OUT, OUTSIDE, REPEATED, UNREADABLE}  # readers mend it, or leave it out
XYWH, XYXY = "[x, y, w, h]", "[x0, y0, x1, y1]"
_TOLERANCE = 1  # pixels; boxes are rounded, or counted from 0 instead of 1


def stop(kind: str, error: InputError) -> None:
    """Raise the problem, unless it is harmless."""
    if kind not in HARMLESS:
        raise error


@contextmanager
def skipping_boxes(path: str | Path, skip: bool, on_problem: OnProblem) -> Iterator[OnProblem]:
    """Give the `OnProblem` for a file whose boxes without area are left out if `skip`."""
    num_skipped = 0

    def report(kind: str, error: InputError) -> None:
        nonlocal num_skipped
        if skip and kind == NO_AREA:
            num_skipped += 1
            kind = LEFT_OUT
        on_problem(kind, error)

    yield report
    if num_skipped:
        logger.warning("%s: left out %d boxes without area", path, num_skipped)


def read_box(
    where: str, values: Any, form: str, height: int, width: int, on_problem: OnProblem
) -> np.ndarray | None:
    """
    Read the box of an annotation and clip it to its image.

    Args:
        where: file and entry, for the message.
        values: what the annotation has, which should be 4 numbers of pixels.
        form: `XYWH` or `XYXY`.
        height: of the image, in pixels.
        width: the same.
        on_problem: is told of values that are none, and as by `clip_box`.

    Returns:
        (4,) float32 XYXY, None for a box that cannot be used.
    """
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if (
        not isinstance(values, (list, tuple))
        or len(values) != 4
        or not all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
        or not all(abs(v) < MAX_SIDE for v in values)  # False for NaN too
    ):
        message = f"{where}: bbox must be 4 finite numbers {form}, got {values!r}"
        on_problem("annotations", InputError(message))
        return None
    x0, y0, x1, y1 = map(float, values)
    if form == XYWH:
        x1, y1 = x0 + x1, y0 + y1
    return clip_box(where, (x0, y0, x1, y1), height, width, on_problem)


def clip_box(
    where: str, box: Sequence[float], height: int, width: int, on_problem: OnProblem
) -> np.ndarray | None:
    """
    Clip a box to its image.

    Args:
        where: file and entry, for the message.
        box: XYXY in pixels.
        height: of the image, in pixels.
        width: the same.
        on_problem: is told of a box without area in the image, and one that reaches out of it.

    Returns:
        (4,) float32 XYXY, None without area.
    """
    x0, y0, x1, y1 = box
    clipped = np.array([max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)], np.float32)
    has_area = clipped[2] > clipped[0] and clipped[3] > clipped[1]
    if has_area and max(-x0, -y0, x1 - width, y1 - height) <= _TOLERANCE:
        return clipped
    found = f"{where}: box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})"
    size = f"its image of width {width} and height {height}"
    if has_area:
        on_problem(OUTSIDE, InputError(f"{found} reaches out of {size}; it is clipped"))
        return clipped
    message = (
        f"{found} has no area inside {size}: correct it, or set SSOD.DATA.SKIP_INVALID_BOXES True "
        "to leave such boxes out"
    )
    on_problem(NO_AREA, InputError(message))
    return None
