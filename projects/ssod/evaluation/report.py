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
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from tabulate import tabulate

from ssod.evaluation.drawing import PALETTE, class_color, text_color

_WIDTH, _DPI = 16.0, 100  # inches, so 1600 pixels
_COLUMNS = 6  # images side by side
_GRAY = "#555555"
_HEADING = {"x": 0.008, "ha": "left", "fontsize": 13, "fontweight": "bold"}


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
    align = ["left", *["right"] * (len(columns) - 1)] if rows else None
    return tabulate(_cells(rows, columns), columns, disable_numparse=True, colalign=align)


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

    From top to bottom: title and result table; validation images with predictions and truth;
    unlabeled images as pairs of pseudo-boxes and hidden truth; plots over iterations. A part
    without content is left out; a plot without points says so.

    Args:
        path: file to write; its directory is made.
        title: headline.
        class_names: name of each class; a class has the same color everywhere.
        validation: any number of images.
        unlabeled: the same; each is drawn twice.
        curves: the lines of each plot by the plot's title.
        burn_in_iters: iteration to mark in every plot, None for no mark.
        rows: the result table, as for `format_table`.
        columns: its columns.
    """
    # In inches; three table lines leave room for the legend.
    heights = {"header": 0.8 + 0.3 * max(len(rows) + 1, 3)}
    for name, num_axes in (("validation", len(validation)), ("unlabeled", 2 * len(unlabeled))):
        if num_axes:
            heights[name] = 0.4 + 2.8 * math.ceil(num_axes / _COLUMNS)
    if curves:
        heights["curves"] = 3.8
    figure = Figure((_WIDTH, sum(heights.values())), dpi=_DPI, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=list(heights.values()), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    part = dict(zip(heights, parts[:, 0], strict=True))

    _draw_header(part["header"], title, class_names, rows, columns)
    if validation:
        _draw_validation(part["validation"], validation, class_names)
    if unlabeled:
        _draw_unlabeled(part["unlabeled"], unlabeled, class_names)
    if curves:
        axes = part["curves"].subplots(1, len(curves), squeeze=False)[0]
        for ax, (name, lines) in zip(axes, curves.items(), strict=True):
            _draw_curves(ax, name, lines, burn_in_iters)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    return [[text(row.get(column)) for column in columns] for row in rows]


def _draw_header(
    part: SubFigure,
    title: str,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    part.suptitle(title, **{**_HEADING, "fontsize": 18})
    ax = part.subplots()
    ax.axis("off")
    if rows:
        table = ax.table(
            _cells(rows, columns),
            colLabels=columns,
            colWidths=[0.2, *[0.4 / max(len(columns) - 1, 5)] * (len(columns) - 1)],
            loc="upper left",
            edges="horizontal",
        )
        table.auto_set_font_size(False)
        table.set_fontsize(12)
        for (row, column), cell in table.get_celld().items():
            cell.set_height(1 / (len(rows) + 1))
            cell.set_edgecolor("#bbbbbb")
            cell.set_text_props(
                ha="left" if column == 0 else "right", weight="bold" if row == 0 else "normal"
            )
    # More names than these are no legend any more; the boxes carry them anyway.
    handles: list[Any] = [
        Patch(color=class_color(label), label=name) for label, name in enumerate(class_names[:12])
    ]
    handles.append(Line2D([], [], color=_GRAY, linewidth=2, label="predicted"))
    handles.append(Line2D([], [], color=_GRAY, linestyle="--", label="truth (white)"))
    legend = ax.legend(handles=handles, loc="upper right", ncols=4, frameon=False, fontsize=10)
    legend.set_in_layout(False)  # long names shall not squeeze the table


def _draw_validation(part: SubFigure, panels: Sequence[Panel], class_names: Sequence[str]) -> None:
    part.suptitle("Validation: predictions and truth", **_HEADING)
    for ax, panel in zip(_image_axes(part, len(panels)), panels, strict=True):
        _draw_image(ax, panel.image, panel.title)
        _draw_truth_outline(ax, panel.true_boxes)
        _draw_boxes(ax, panel.boxes, panel.classes, class_names, panel.scores)


def _draw_unlabeled(part: SubFigure, panels: Sequence[Panel], class_names: Sequence[str]) -> None:
    part.suptitle("Unlabeled: pseudo-boxes | hidden truth", **_HEADING)
    axes = _image_axes(part, 2 * len(panels))
    for left, right, panel in zip(axes[::2], axes[1::2], panels, strict=True):
        _draw_image(left, panel.image, panel.title)
        _draw_boxes(left, panel.boxes, panel.classes, class_names, panel.scores)
        _draw_image(right, panel.image, "hidden truth")
        _draw_boxes(right, panel.true_boxes, panel.true_classes, class_names)


def _image_axes(part: SubFigure, count: int) -> list[Axes]:
    axes = part.subplots(math.ceil(count / _COLUMNS), _COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    return list(axes[:count])


def _draw_image(ax: Axes, image: np.ndarray, title: str) -> None:
    height, width = image.shape[:2]
    # Extent in box coordinates: pixel (0, 0) covers [0, 1] x [0, 1].
    ax.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    ax.set_title(title, fontsize=10, color=_GRAY)


def _draw_truth_outline(ax: Axes, boxes: np.ndarray) -> None:
    for x0, y0, x1, y1 in np.asarray(boxes).tolist():
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="white", ls="--", lw=1.2)
        outline.set_path_effects([withStroke(linewidth=2.2, foreground="#00000080")])
        ax.add_patch(outline)


def _draw_boxes(
    ax: Axes,
    boxes: np.ndarray,
    classes: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
) -> None:
    for index, (x0, y0, x1, y1) in enumerate(np.asarray(boxes).tolist()):
        label = int(classes[index])
        color = class_color(label)
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=2))
        width = ax.get_xlim()[1]
        at_right = x0 > 0.6 * width  # the text grows to the left there
        ax.text(
            min(x1, width) if at_right else max(x0, 0),
            max(y0, 0),
            class_names[label] if scores is None else f"{class_names[label]} {scores[index]:.2f}",
            ha="right" if at_right else "left",
            color=text_color(color),
            fontsize=8,
            va="top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0},
            clip_on=True,
        )


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
