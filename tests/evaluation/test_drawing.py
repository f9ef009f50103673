import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssod.evaluation.drawing import PALETTE, TRUTH_COLOR, draw_boxes, draw_sheet

GRAY = 128


def _image(height=300, width=400):
    return np.full((height, width, 3), GRAY, np.uint8)


def _is(picture, color):
    """Mask of the pixels of a color."""
    return (np.abs(np.asarray(picture) - 255 * np.array(to_rgb(color))) < 1).all(-1)


def _extent(mask):
    """XYXY of the pixels of a mask."""
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_nothing_to_draw_leaves_the_image_alone():
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    drawn = draw_boxes(image, np.empty((0, 4)), np.empty(0, int), [])
    np.testing.assert_array_equal(np.asarray(drawn), image)
    both = draw_boxes(image, [], [], [], true_boxes=np.empty((0, 4)))
    np.testing.assert_array_equal(np.asarray(both), image)


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_outline_is_where_the_box_is(scale):
    box = np.array([[40, 100, 240, 220]])
    drawn = draw_boxes(_image(), box, [2], [""], scale=scale)
    assert drawn.size == (400 * scale, 300 * scale)
    mask = _is(drawn, PALETTE[2])
    mask[: int(100 * scale)] = False  # the label is above the box
    assert _extent(mask) == (box[0] * scale).tolist()
    inside = mask[int(115 * scale) : int(205 * scale), int(60 * scale) : int(220 * scale)]
    assert not inside.any()


def test_the_image_given_is_not_drawn_on():
    image = _image()
    draw_boxes(image, [[40, 100, 240, 220]], [2], ["a"])
    assert (image == GRAY).all()


def test_dashed_outline_has_the_extent_and_half_of_the_pixels():
    box = np.array([[40, 100, 240, 220]])
    solid, dashed = (
        _is(draw_boxes(_image(), box, [2], [""], dashed=np.array([is_open])), PALETTE[2])
        for is_open in (False, True)
    )
    solid[:100], dashed[:100] = False, False
    assert _extent(dashed) == pytest.approx(_extent(solid), abs=16)
    assert 0.35 < dashed.sum() / solid.sum() < 0.7
    assert not (dashed & ~solid).any()


@pytest.mark.parametrize(
    "box", [[0, 0, 30, 30], [390, 0, 400, 20], [0, 280, 400, 300], [200, 5, 200.2, 5.1]]
)
def test_label_stays_in_the_picture(box):
    text = "traffic light 0.93"
    in_the_middle = _is(draw_boxes(_image(), [[200, 150, 201, 151]], [0], [text]), PALETTE[0])
    at_the_edge = _is(draw_boxes(_image(), [box], [0], [text]), PALETTE[0])
    assert at_the_edge.sum() >= 0.97 * in_the_middle.sum()


def test_letters_grow_with_the_picture():
    def label_height(side):
        mask = _is(draw_boxes(_image(150, side), [[50, 120, 51, 121]], [0], ["x"]), PALETTE[0])
        _, y0, _, y1 = _extent(mask)
        return y1 - y0

    assert label_height(100) == label_height(400)  # no smaller than can be read
    assert label_height(3200) == pytest.approx(2 * label_height(1600), rel=0.1)
    assert label_height(3200) > 3 * label_height(400)


def test_first_box_is_on_top():
    box = [[40, 100, 240, 220]] * 2
    assert _is(draw_boxes(_image(), box, [2, 5], ["a", "a"]), PALETTE[2]).any()
    assert not _is(draw_boxes(_image(), box, [2, 5], ["a", "a"]), PALETTE[5]).any()


def test_truth_is_thin_and_unlabeled():
    box = [[40, 100, 240, 220]]
    mask = _is(draw_boxes(_image(), [], [], [], true_boxes=box), TRUTH_COLOR)
    assert _extent(mask) == box[0]
    assert mask.sum() == 2 * 200 + 2 * 118


def test_sheet_has_every_picture_apart_from_the_others():
    colors = ["#100000", "#200000", "#300000", "#400000", "#500000"]
    sizes = [(40, 30), (60, 20), (10, 50), (60, 60), (5, 5)]
    cells = [
        (Image.new("RGB", size, color), "a caption far too long for the width of its cell")
        for size, color in zip(sizes, colors, strict=True)
    ]
    sheet = draw_sheet("heading\nand a second line", cells, columns=2)
    boxes = []
    for size, color in zip(sizes, colors, strict=True):
        mask = _is(sheet, color)
        x0, y0, x1, y1 = _extent(mask)
        assert (x1 - x0, y1 - y0) == size and mask.sum() == size[0] * size[1]
        boxes.append((x0, y0))
    assert boxes[0][1] == boxes[1][1] < boxes[2][1] == boxes[3][1] < boxes[4][1]
    assert boxes[0][0] == boxes[2][0] == boxes[4][0] < boxes[1][0] == boxes[3][0]


def test_truth_is_seen_on_an_object_of_its_color():
    image = np.full((30, 40, 3), 255 * np.array(to_rgb(TRUTH_COLOR)), np.uint8)
    drawn = draw_boxes(image, [], [], [], true_boxes=[[10, 5, 30, 25]])
    assert _extent(_is(drawn, "black")) == [9, 4, 31, 26]
    assert not _is(drawn, "black")[5, 10:30].any() and _is(drawn, "black")[4, 9:31].all()
