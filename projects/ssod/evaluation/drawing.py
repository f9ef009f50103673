"""
Boxes drawn on images, and images laid out as a sheet.

Shape shorthand: R boxes of one image, M true boxes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette, made for color-blind readers; without black, which dark images swallow.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
TRUTH_COLOR = "#00FF00"
# Pillow's own has Latin letters only.
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_MARGIN = 12  # pixels between the images of a sheet
_Layer = tuple[list[float], str, bool]  # a box, its color, and whether it is dashed


def class_color(label: int) -> str:
    """Return the color of a class, the same in every picture; there are seven."""
    return PALETTE[int(label) % len(PALETTE)]


def text_color(background: str) -> str:
    """Return black or white, whichever can be read on a color."""
    red, green, blue = to_rgb(background)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    texts: Sequence[str],
    *,
    scale: float = 1.0,
    dashed: np.ndarray | None = None,
    true_boxes: np.ndarray | None = None,
) -> Image.Image:
    """
    Draw boxes with their texts in the color of their class, lines and letters sized to the picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (R, 4) XYXY pixels of `image`, the most important first: it is drawn on top. R = 0
            allowed.
        classes: (R,) decides the colors.
        texts: R labels.
        scale: side of the picture by that of the image.
        dashed: (R,) bool, None for none.
        true_boxes: (M, 4), outlined thinly in green between black; None for none.

    Returns:
        The picture.
    """
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 400))
    factors = np.array(size * 2) / (width, height, width, height)
    scaled = (np.reshape(boxes, (-1, 4)) * factors).tolist()
    is_dashed = [False] * len(scaled) if dashed is None else list(dashed)
    colors = [class_color(label) for label in classes]
    layers = list(zip(scaled, colors, is_dashed, texts, strict=True))[::-1]
    if true_boxes is not None:
        thin = max(1, line // 2)
        for box in np.reshape(true_boxes, (-1, 4)) * factors:
            # A black edge on either side, as objects may be green.
            edge = (box + (-1, -1, 1, 1)).tolist()
            _draw_outline(draw, (edge, "black", False), thin + 2)
            _draw_outline(draw, (box.tolist(), TRUTH_COLOR, False), thin)
    for box, color, is_open, _ in layers:  # over the truth, which a good one lies on
        _draw_outline(draw, (box, color, is_open), line)
    font = _font(max(12, round(max(size) / 60)))
    for box, color, _, text in layers:
        _draw_label(draw, box, text, color, font)
    return picture


def draw_sheet(heading: str, cells: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """
    Lay pictures out in rows on white, with lines of text at the top.

    The cells are pictures of any sizes, with one line of text above each, which is cut to fit.
    """
    font = _font(14)
    text_height = sum(font.getmetrics())
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    cell_width = max((picture.width for picture, _ in cells), default=0)
    tops = [_MARGIN * 2 + text_height * (heading.count("\n") + 1)]
    for row in rows:
        tallest = max(picture.height for picture, _ in row)
        tops.append(tops[-1] + text_height + tallest + _MARGIN)
    used = min(columns, len(cells))
    width = max(used * (cell_width + _MARGIN), _text_width(font, heading) + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(heading.split("\n")):
        draw.text((_MARGIN, _MARGIN + index * text_height), line, fill="black", font=font)
    for top, row in zip(tops, rows, strict=False):
        for index, (picture, caption) in enumerate(row):
            left = _MARGIN + index * (cell_width + _MARGIN)
            draw.text((left, top), _shorten(caption, font, cell_width), fill="#555555", font=font)
            sheet.paste(picture, (left, top + text_height))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT), size)


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return int(max(font.getlength(line) for line in text.split("\n"))) + 1


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut the beginning, which is that of a path, until the text fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


def _draw_outline(draw: ImageDraw.ImageDraw, layer: _Layer, line: int) -> None:
    (x0, y0, x1, y1), color, is_open = layer
    # Pixel 0 covers [0, 1]; less than a pixel is drawn as one.
    x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
    if not is_open:
        draw.rectangle((x0, y0, x1, y1), outline=color, width=line)
        return
    dash, inner = 4 * line, line - 1  # as the outline of a solid one, which is inside
    for x in np.arange(x0, x1, 2 * dash):
        for y in (y0, max(y0, y1 - inner)):
            draw.rectangle((x, y, min(x + dash - 1, x1), y + inner), fill=color)
    for y in np.arange(y0, y1, 2 * dash):
        for x in (x0, max(x0, x1 - inner)):
            draw.rectangle((x, y, x + inner, min(y + dash - 1, y1)), fill=color)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    box: list[float],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Write above the box or, where the picture ends, into it."""
    x, y = box[:2]
    height = sum(font.getmetrics())
    width = _text_width(font, text) + height // 3
    x = max(0.0, min(x, draw.im.size[0] - width))
    y = y - height if y >= height else max(y, 0.0)
    draw.rectangle((x, y, x + width, y + height - 1), fill=color)
    draw.text((x + height // 6, y), text, fill=text_color(color), font=font)
