"""The algorithms on plain tensors. Importing it registers all filters and methods."""

from ssod.core import (
    adaptive_threshold,
    contrastive,
    daso,
    filters,
    gaussian_mixture,
    label_match,
    low_resolution,
    mixing,
    soft_match,
)

__all__ = [
    "adaptive_threshold",
    "contrastive",
    "daso",
    "filters",
    "gaussian_mixture",
    "label_match",
    "low_resolution",
    "mixing",
    "soft_match",
]
