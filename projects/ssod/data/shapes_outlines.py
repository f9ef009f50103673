"""Outlines of the shapes of a Shapes set, as polygons in the complex plane."""

from __future__ import annotations

import math

import numpy as np


def _unit_outlines() -> dict[str, list[np.ndarray]]:
    """Polygons (P,) in the complex plane of each shape, outer then hole, with an area of 1."""

    def on_circle(points: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
        turns = np.exp(2j * np.pi * np.arange(points) / points)
        return turns * np.resize(radii, points)

    corner = np.array([1 + 0.36j, 0.36 + 0.36j, 0.36 + 1j])
    stem = np.array([-1 + 0.3j, -1 - 0.3j, 0.3 - 0.3j, 0.3 - 1j, 0.9 - 1j])
    outlines = {
        "circle": [on_circle(64)],
        "square": [on_circle(4) * np.exp(0.25j * np.pi)],  # upright: stretched to a rectangle
        "triangle": [on_circle(3)],
        "star": [on_circle(10, (1.0, 0.48))],
        "cross": [np.concatenate([corner * 1j**turn for turn in range(4)])],
        "ring": [on_circle(64), 0.5 * on_circle(64)],
        "arrow": [np.array([-1 - 0.25j, -0.25j, -0.8j, 1, 0.8j, 0.25j, -1 + 0.25j])],
        "heart": [_heart()],
        "crescent": [_crescent()],
        "hourglass": [np.array([-1 - 0.7j, -0.2j, 1 - 0.7j, 1 + 0.7j, 0.2j, -1 + 0.7j])],
        "chevron": [np.array([-0.7 - 1j, -1j, 1, 1j, -0.7 + 1j, 0.3])],
        "tee": [np.concatenate([stem, stem.conj()[::-1]])],
    }

    def area(polygon: np.ndarray) -> float:
        return 0.5 * (polygon.conj() * np.roll(polygon, -1)).imag.sum()

    for name, (outer, *holes) in outlines.items():
        scale = 1 / math.sqrt(area(outer) - sum(area(hole) for hole in holes))
        outlines[name] = [scale * polygon for polygon in (outer, *holes)]
    return outlines


def _heart() -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    height = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return 16 * np.sin(turn) ** 3 - 1j * (height + 2.5)  # upside down: it runs the right way round


def _crescent() -> np.ndarray:
    tip, center = 0.7, 0.35  # angle of the gap, and center of the inner circle through both tips
    inner = np.exp(1j * tip) - center
    outside = np.exp(1j * np.linspace(tip, 2 * np.pi - tip, 48))
    angles = np.linspace(2 * np.pi - np.angle(inner), np.angle(inner), 32)
    return np.concatenate([outside, center + np.abs(inner) * np.exp(1j * angles)])


OUTLINES = _unit_outlines()
"""Polygons (P,) of each shape by name, outer then hole; all have an area of 1."""
