import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssod.evaluation.drawing import PALETTE, TRUTH_COLOR, draw_boxes
from ssod.evaluation.report import Curve, Panel, draw_report, format_table

NAMES = ["cat", "dog", "bird"]


def _panel(boxes=(), classes=(), true_boxes=(), true_classes=(), size=(90, 120)):
    return Panel(
        image=np.full((*size, 3), 128, np.uint8),
        boxes=np.reshape(boxes, (-1, 4)),
        classes=np.array(classes),
        scores=np.full(len(classes), 0.5),
        true_boxes=np.reshape(true_boxes, (-1, 4)),
        true_classes=np.array(true_classes),
        title="an image",
    )


def _draw(path, **changes):
    arguments = {
        "title": "A run",
        "class_names": NAMES,
        "validation": [],
        "unlabeled": [],
        "curves": {},
        "burn_in_iters": None,
        "rows": [],
        "columns": [],
    }
    draw_report(path, **{**arguments, **changes})
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _count(picture, color):
    return int((np.abs(picture - 255 * np.array(to_rgb(color))).max(-1) < 2).sum())


def test_full_report(tmp_path):
    panel = _panel([[10, 10, 60, 60]], [0], [[12, 12, 62, 62]], [0])
    picture = _draw(
        tmp_path / "new" / "report.png",
        validation=[panel] * 7,
        unlabeled=[panel] * 2,
        curves={
            "AP": [Curve("a", [0, 10], [0.0, 5.0])],
            "pseudo": [
                Curve("precision", [5, 10], [0.5, math.nan]),
                Curve("boxes", [5, 10], [1.0, 2.0], right=True),
            ],
        },
        burn_in_iters=5,
        rows=[{"row": "a", "AP": 5.0}],
        columns=["row", "AP"],
    )
    assert picture.shape[1] == 1600
    without_images = _draw(tmp_path / "small.png")
    assert picture.shape[0] > without_images.shape[0]


@pytest.mark.parametrize("label", range(len(NAMES)))
def test_boxes_have_the_color_of_their_class(tmp_path, label):
    bare = _draw(tmp_path / "bare.png", validation=[_panel()])
    boxed = _draw(tmp_path / "boxed.png", validation=[_panel([[5, 5, 110, 80]], [label])])
    added = [_count(boxed, color) - _count(bare, color) for color in PALETTE[: len(NAMES)]]
    # The outline alone is over 300 pixels long at any magnification.
    assert added[label] > 300
    assert added[:label] + added[label + 1 :] == [0, 0]


def test_pictures_are_those_of_the_drawer(tmp_path):
    """Pixel for pixel, so letters are as sharp as there."""
    panel = _panel([[10, 10, 60, 60]], [0], [[12, 12, 62, 62]], [0])
    report = _draw(tmp_path / "r.png", validation=[panel])
    drawn = np.asarray(
        draw_boxes(
            *(panel.image, panel.boxes, panel.classes, ["cat 0.50"]),
            scale=252 / 120,
            true_boxes=panel.true_boxes,
        )
    )
    height, width = drawn.shape[:2]
    bottom, left = report.shape[0] - 12, 12  # a margin
    np.testing.assert_array_equal(report[bottom - height : bottom, left : left + width], drawn)


def test_truth_is_told_apart_on_validation_and_colored_on_unlabeled(tmp_path):
    panel = _panel(true_boxes=[[5, 5, 110, 80]], true_classes=[2])
    bare = _draw(tmp_path / "bare.png", validation=[_panel()])
    validation = _draw(tmp_path / "validation.png", validation=[panel])
    assert _count(validation, PALETTE[2]) == _count(bare, PALETTE[2])
    assert _count(validation, TRUTH_COLOR) - _count(bare, TRUTH_COLOR) > 300

    bare = _draw(tmp_path / "bare.png", unlabeled=[_panel()])
    unlabeled = _draw(tmp_path / "unlabeled.png", unlabeled=[panel])
    changed = np.nonzero((bare != unlabeled).any(-1).any(0))[0]
    assert _count(unlabeled, PALETTE[2]) - _count(bare, PALETTE[2]) > 300
    # Only in the right image of the pair, the second of six columns.
    assert 1600 / 6 < changed.min() and changed.max() < 2 * 1600 / 6


@pytest.mark.parametrize(
    "curves",
    [[], [Curve("a", [], [])], [Curve("a", [], [], right=True)], [Curve("a", [1], [math.nan])]],
)
def test_plots_without_values(tmp_path, recwarn, curves):
    with_marker = _draw(tmp_path / "r.png", curves={"AP": curves, "b": []}, burn_in_iters=3)
    assert with_marker.shape[1] == 1600
    assert not recwarn.list


def test_more_classes_than_colors(tmp_path, recwarn):
    names = [f"class {n}" for n in range(80)]
    panel = _panel([[5, 5, 50, 50], [60, 5, 110, 80]], [79, 6])
    assert _draw(tmp_path / "r.png", class_names=names, validation=[panel]).shape[1] == 1600
    assert not recwarn.list


def test_table_has_aligned_columns_in_order():
    rows = [{"row": "labeled only", "AP": 33.333}, {"row": "ours", "AP": 4.0, "n": 12, "x": 1}]
    table = format_table(rows, ["row", "n", "AP"])
    header, _, first, second = table.splitlines()
    assert header.split() == ["row", "n", "AP"]
    assert first.split() == ["labeled", "only", "-", "33.3"]
    assert second.split() == ["ours", "12", "4.0"]
    assert len({len(line) for line in (header, first, second)}) == 1


def test_table_shows_nan_as_a_dash_and_takes_no_rows():
    assert format_table([{"AP": math.nan}], ["AP"]).split()[-1] == "-"
    assert format_table([], ["row", "AP"]).split()[:2] == ["row", "AP"]
