"""One picture and one text table that show how a run went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from tabulate import tabulate

from ssod.evaluation.drawing import PALETTE, TRUTH_COLOR, class_color, draw_boxes, draw_sheet

_WIDTH, _DPI = 1600, 100  # pixels, and pixels an inch
_COLUMNS, _SIDE = 6, 252  # images side by side, and their longer side in pixels, to fill the width
_GRAY = "#555555"


@dataclass(frozen=True)
class Panel:
    """
    One image with found boxes and the truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (R, 4) XYXY pixels of `image`, R = 0 allowed.
        classes: (R,) index of the class names.
        scores: (R,) in [0, 1].
        true_boxes: (M, 4), M = 0 allowed.
        true_classes: (M,).
        title: short text above the image.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    true_boxes: np.ndarray
    true_classes: np.ndarray
    title: str = ""


@dataclass(frozen=True)
class Curve:
    """
    One line of a plot.

    Attributes:
        label: text in the legend.
        x: iterations.
        y: as many values; nan leaves a gap, no values draw nothing.
        right: measure `y` on the right axis.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    right: bool = False


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """
    Aligned plain-text table.

    Args:
        rows: values by column name; floats are shown with one decimal, nan and missing as "-".
        columns: which columns in which order; the first is left-aligned, the others right.
    """

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    align = ["left", *["right"] * (len(columns) - 1)] if rows else None
    cells = [[text(row.get(column)) for column in columns] for row in rows]
    return tabulate(cells, columns, disable_numparse=True, colalign=align)


def draw_report(
    path: str | Path,
    *,
    title: str,
    class_names: Sequence[str],
    validation: Sequence[Panel],
    unlabeled: Sequence[Panel],
    curves: Mapping[str, Sequence[Curve]],
    burn_in_iters: int | None,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    """
    Write a PNG, 1600 pixels wide, that shows a run at a glance.

    From top to bottom: title and result table, as of `format_table`; validation images with
    predictions and truth; unlabeled images as pairs of pseudo-boxes and hidden truth; plots over
    iterations, `curves` by their titles, with a mark at `burn_in_iters` unless that is None. A part
    without content is left out; a plot without points says so. A class has the same color
    everywhere. The directory of the file is made.
    """
    parts = [_draw_header(title, class_names, rows, columns)]
    if validation:
        cells = [_draw_found(panel, class_names, panel.true_boxes) for panel in validation]
        parts.append(draw_sheet("Validation: predictions and truth", cells, _COLUMNS))
    if unlabeled:
        cells = [
            cell
            for panel in unlabeled
            for cell in (_draw_found(panel, class_names), _draw_truth(panel, class_names))
        ]
        parts.append(draw_sheet("Unlabeled: pseudo-boxes | hidden truth", cells, _COLUMNS))
    if curves:
        figure = Figure((_WIDTH / _DPI, 3.8), dpi=_DPI, layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        for ax, (name, lines) in zip(axes, curves.items(), strict=True):
            _draw_curves(ax, name, lines, burn_in_iters)
        parts.append(_render(figure))
    report = Image.new("RGB", (_WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        report.paste(part, (0, top))
        top += part.height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save(path, "PNG")


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_header(
    title: str,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> Image.Image:
    # Four table lines leave room for the legend.
    height = 0.6 + 0.21 * max(len(rows) + 2, 4)
    figure = Figure((_WIDTH / _DPI, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=18, fontweight="bold")
    ax = figure.subplots()
    ax.axis("off")
    if rows:
        table = format_table(rows, columns)
        ax.text(0.005, 1, table, transform=ax.transAxes, va="top", family="monospace", fontsize=12)
    # More names than these are no legend any more; the boxes carry them anyway.
    handles: list[Any] = [
        Patch(color=class_color(label), label=name) for label, name in enumerate(class_names[:12])
    ]
    handles.append(Line2D([], [], color=_GRAY, linewidth=2, label="predicted"))
    handles.append(Line2D([], [], color=TRUTH_COLOR, linewidth=1, label="truth"))
    legend = ax.legend(handles=handles, loc="upper right", ncols=4, frameon=False, fontsize=10)
    legend.set_in_layout(False)  # long names shall not squeeze the table
    return _render(figure)


def _draw_found(
    panel: Panel, class_names: Sequence[str], true_boxes: np.ndarray | None = None
) -> tuple[Image.Image, str]:
    rows = zip(panel.classes, panel.scores, strict=True)
    texts = [f"{class_names[int(label)]} {score:.2f}" for label, score in rows]
    scale = _SIDE / max(panel.image.shape)
    found = (panel.boxes, panel.classes, texts)
    return draw_boxes(panel.image, *found, scale=scale, true_boxes=true_boxes), panel.title


def _draw_truth(panel: Panel, class_names: Sequence[str]) -> tuple[Image.Image, str]:
    texts = [class_names[int(label)] for label in panel.true_classes]
    truth = (panel.true_boxes, panel.true_classes, texts)
    return draw_boxes(panel.image, *truth, scale=_SIDE / max(panel.image.shape)), "hidden truth"


def _draw_curves(ax: Axes, title: str, curves: Sequence[Curve], burn_in_iters: int | None) -> None:
    ax.set_title(title, fontsize=12)
    ax.set_xlabel("iteration")
    ax.grid(alpha=0.3)
    right = ax.twinx() if any(curve.right for curve in curves) else None
    handles = []
    for index, curve in enumerate(curves):
        target = right if curve.right else ax
        handles += target.plot(
            curve.x,
            curve.y,
            color=PALETTE[(4, 5, 2, 6, 0, 1, 3)[index % len(PALETTE)]],
            linestyle="--" if curve.right else "-",
            marker="o" if len(curve.x) <= 30 else None,
            markersize=3,
            label=f"{curve.label} (right)" if curve.right else curve.label,
        )
    ax.set_xlim(left=0)  # plots share their origin even if a curve begins later
    if not any(np.isfinite(curve.y).any() for curve in curves):
        ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", color=_GRAY)
        return
    if burn_in_iters is not None:
        label = "end of burn-in"
        handles.append(ax.axvline(burn_in_iters, color=_GRAY, linestyle=":", label=label))
    ax.legend(handles=handles, fontsize=9, framealpha=0.8)
