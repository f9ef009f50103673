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
    pseco,
    soft_match,
    soft_teacher,
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
    "pseco",
    "soft_match",
    "soft_teacher",
]
