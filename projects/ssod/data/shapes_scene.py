"""
Drawing of one Shapes image.

Textured shapes of six classes with long-tailed frequencies lie on a textured background, partly
hiding each other, among dull lines and blobs that belong to no class. Hue is a cheap cue that is
learned from a few examples: each class has a band of its own. The outline is another, which counts
once augmentation shifts the hue by more than a band or takes it away.

Foreign objects are other shapes in the same sizes, hues and textures, which no class covers.

Crowded scenes are harder: more and smaller objects, twice the classes, of which three each share a
band of hues, so that the outline decides, and more blobs and lines, half of them as colorful as the
objects.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ssod.data.shapes_outlines import OUTLINES

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross", "ring")
FOREIGN_NAMES = ("arrow", "heart", "crescent", "hourglass")
CROWDED_NAMES = (*CLASS_NAMES, *FOREIGN_NAMES, "chevron", "tee")
MAX_OBJECTS, CROWDED_MAX_OBJECTS = 4, 13

_CROWDED_BANDS = 4  # of hues, each of every fourth class: one frequent, one less so, one rare
_HUE_JITTER = 0.05  # bands are 1/6 or 1/4 apart; augmentation shifts the hue by up to 0.1 more
_MIN_VISIBLE = 0.6  # of the whole shape, counting what other shapes and the image border hide
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Scene:
    """
    One image with its truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        masks: (M, H, W) bool, the visible pixels of each object; they do not overlap.
        classes: (M,) int64 index into `CLASS_NAMES`, of a crowded scene into `CROWDED_NAMES`.
        foreign: (F, H, W) bool, the same as `masks` of the objects that have no class.
    """

    image: np.ndarray
    masks: np.ndarray
    classes: np.ndarray
    foreign: np.ndarray


def draw_scene(
    rng: np.random.Generator,
    image_size: int,
    max_objects: int,
    max_foreign: int = 0,
    crowded: bool = False,
) -> Scene:
    """
    Draw one image.

    Args:
        rng: the only source of randomness.
        image_size: long side in pixels; the short side is 70 to 95 % of it.
        max_objects: 1 to this many objects are drawn, fewer where there is no room.
        max_foreign: 0 to this many foreign objects are drawn too; they are all that it changes.
            Not in crowded scenes, where their shapes are classes.
        crowded: of `CROWDED_NAMES`, smaller objects, and more that is no object.
    """
    long, short = image_size, round(image_size * rng.uniform(0.7, 0.95))
    size = (long, short) if rng.random() < 0.5 else (short, long)
    canvas = _background(rng, *size)
    for _ in range(rng.integers(3, 9) if crowded else rng.integers(0, 3)):
        _draw_distractor(rng, canvas, colorful=crowded and rng.random() < 0.5)

    names = CROWDED_NAMES if crowded else CLASS_NAMES
    bands = _CROWDED_BANDS if crowded else len(CLASS_NAMES)
    weights = np.geomspace(8, 1, len(names))
    weights /= weights.sum()

    wanted = rng.integers(1, max_objects + 1)
    masks: list[np.ndarray] = []
    whole_areas: list[float] = []
    classes: list[int] = []
    for side in _random_sides(rng, wanted, short, crowded):
        label = int(rng.choice(len(names), p=weights))
        hue = (label % bands) / bands
        if _add_object(rng, canvas, masks, whole_areas, names[label], side, hue):
            classes.append(label)
    if max_foreign:
        own = rng.spawn(1)[0]  # the noise below stays the same
        for side in _random_sides(own, own.integers(0, max_foreign + 1), short):
            name, hue = own.choice(FOREIGN_NAMES), own.integers(bands) / bands
            _add_object(own, canvas, masks, whole_areas, name, side, hue)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas += rng.uniform(0, 0.02) * noise  # of the sensor
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    visible = np.stack(masks)
    return Scene(image, visible[: len(classes)], np.array(classes), visible[len(classes) :])


def _add_object(
    rng: np.random.Generator,
    canvas: np.ndarray,
    masks: list[np.ndarray],
    whole_areas: list[float],
    name: str,
    side: float,
    hue: float,
) -> bool:
    """Paint an object of about a hue on top of the others; False if it finds no room."""
    size = canvas.shape[:2]
    for _ in range(8):
        coverage = _shape_coverage(rng, name, side, *size)
        mask = coverage >= 0.5
        left = [earlier & ~mask for earlier in masks] + [mask]
        wholes = [*whole_areas, side**2]
        if all(m.sum() >= _MIN_VISIBLE * a for m, a in zip(left, wholes, strict=True)):
            shifted = hue + rng.uniform(-_HUE_JITTER, _HUE_JITTER)
            _paint(canvas, coverage, _texture(rng, *size, hue=shifted))
            masks[:], whole_areas[:] = left, wholes
            return True
    return False


def _random_sides(
    rng: np.random.Generator, count: int, short: int, crowded: bool = False
) -> list[float]:
    # Large ones first: they need the room, and small ones on top of them stay visible.
    return sorted((_random_side(rng, short, crowded) for _ in range(count)), reverse=True)


def _random_side(rng: np.random.Generator, short: int, crowded: bool) -> float:
    """Square root of a shape's area in pixels, from one of COCO's size bands."""
    # Aimed at 30 : 60 : 10 of what is visible: occlusion and the border make objects smaller.
    bands, shares = ((16, 32), (34, 0.6 * short), (106, 0.95 * short)), (0.27, 0.57, 0.16)
    if crowded:  # 59 : 39 : 2
        bands, shares = ((14, 32), (34, 0.4 * short), (106, 0.95 * short)), (0.52, 0.42, 0.06)
    low, high = bands[rng.choice(3, p=shares)]
    return min(low * (max(high, low) / low) ** rng.random(), 0.95 * short)


def _shape_coverage(
    rng: np.random.Generator, name: str, side: float, height: int, width: int
) -> np.ndarray:
    """(H, W) share of each pixel that a shape of area `side`^2, randomly placed, covers."""
    turn = np.exp(2j * np.pi * rng.random())
    stretch = math.sqrt(rng.uniform(0.75, 1.33))
    margin = min(0.4 * side, 0.45 * min(height, width))
    x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    drawing = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    for polygon, fill in zip(OUTLINES[name], (255, 0), strict=False):
        polygon = (polygon.real * stretch + 1j * polygon.imag / stretch) * turn * side
        _fill(drawing, polygon + complex(x, y), fill)
    return _shrink(drawing)


def _fill(drawing: Image.Image, polygon: np.ndarray, fill: int) -> None:
    points = (polygon * _SUPERSAMPLE - complex(0.5, 0.5)).view(np.float64).tolist()
    ImageDraw.Draw(drawing).polygon(points, fill=fill)


def _shrink(drawing: Image.Image) -> np.ndarray:
    return np.asarray(drawing.reduce(_SUPERSAMPLE), np.float32) / 255


def _paint(canvas: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    """Blend a color in, above a soft shadow that tells apart overlapping shapes of one color."""
    height, width = coverage.shape
    blurred = Image.fromarray(coverage).reduce(5).resize((width, height), Image.Resampling.BICUBIC)
    canvas *= 1 - 0.4 * np.asarray(blurred)[..., None]
    canvas += coverage[..., None] * (color - canvas)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """(H, W) smooth noise in [-1, 1] with features of about `cell` pixels."""
    grid = rng.uniform(-1, 1, (int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) distance in pixels along a random direction."""
    angle = 2 * math.pi * rng.random()
    rows, columns = np.ogrid[:height, :width]
    return (math.cos(angle) * columns + math.sin(angle) * rows).astype(np.float32)


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0)), np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 RGB in about [0, 1]: two dull colors mixed by a gradient and noise."""
    first, second = (
        _color(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.25, 0.9)) for _ in range(2)
    )
    mix = _ramp(rng, height, width) / max(height, width) + _noise(rng, height, width, 40)
    canvas = first + (mix[..., None] * 0.5 + 0.5).clip(0, 1) * (second - first)
    for cell in (16, 6, 2.5):
        canvas += rng.uniform(0, 0.08) * _noise(rng, height, width, cell)[..., None]
    return canvas


def _texture(rng: np.random.Generator, height: int, width: int, hue: float) -> np.ndarray:
    """(H, W, 3) float32 RGB pattern in two tones of about one hue."""
    period = rng.uniform(5, 14)
    kind = rng.integers(4)
    if kind == 0:  # stripes
        pattern = np.sin(_ramp(rng, height, width) * (2 * math.pi / period)) * 3
    elif kind == 1:  # dots on a grid
        rows, columns = np.ogrid[:height, :width]
        waves = [
            np.sin(axis * (2 * math.pi / period), dtype=np.float32) for axis in (rows, columns)
        ]
        pattern = (waves[0] * waves[1] - 0.3) * 5
    elif kind == 2:
        pattern = _noise(rng, height, width, period / 2) * 1.5
    else:  # gradient
        pattern = _noise(rng, height, width, 60) * 2
    tone = _color(hue, rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.0))
    other = _color(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.35, 0.9), rng.uniform(0.35, 1.0))
    return tone + (pattern[..., None] * 0.5 + 0.5).clip(0, 1) * (other - tone)


def _draw_distractor(rng: np.random.Generator, canvas: np.ndarray, colorful: bool) -> None:
    """Draw a blob or a curved line of any hue, dull unless colorful: nothing that has a class."""
    height, width = canvas.shape[:2]
    drawing = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    start = complex(rng.uniform(0, width), rng.uniform(0, height))
    steps = np.linspace(0, 1, 40)
    direction = np.exp(2j * np.pi * rng.random())
    if rng.random() < 0.5:
        radii = 1 + sum(
            rng.uniform(0.1, 0.3) * np.sin(2 * np.pi * (k * steps + rng.random())) for k in (2, 3)
        )
        blob = radii * (np.cos(2 * np.pi * steps) + 0.7j * np.sin(2 * np.pi * steps))
        _fill(drawing, start + rng.uniform(5, 22) * blob * direction, 255)
    else:
        bend = rng.uniform(-1, 1) * 1j * steps**2
        line = start + rng.uniform(20, 90) * (steps + bend) * direction
        points = (line * _SUPERSAMPLE).view(np.float64).tolist()
        thickness = int(rng.integers(1, 4)) * _SUPERSAMPLE
        ImageDraw.Draw(drawing).line(points, fill=255, width=thickness, joint="curve")
    size = height, width
    color = _texture(rng, *size, hue=rng.random()) if colorful else _background(rng, *size)
    _paint(canvas, _shrink(drawing), color)
