"""Choice of the images whose labels are used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from ssod.errors import InputError


def make_split(image_ids: Iterable[int | str], percent: float, seed: int) -> list[int | str]:
    """
    Choose `percent` of the images by their id.

    Ids are ordered by the SHA-256 of seed and id, and the first ones are taken. The result thus
    depends neither on the order of `image_ids` nor on the platform or rank, and for one seed a
    smaller split is contained in every larger one.

    Args:
        image_ids: unique ids; 1 and "1" count as the same id.
        percent: in (0, 100).
        seed: another seed gives an independent split.

    Returns:
        The chosen ids, `percent` of them rounded half up, but at least one.

    Raises:
        InputError: if `percent` is out of range, or ids are absent or repeated.
    """
    if not 0 < percent < 100:
        raise InputError(f"SSOD.DATA.PERCENT must be in (0, 100), got {percent}")
    by_name: dict[str, int | str] = {}
    for image_id in image_ids:
        if str(image_id) in by_name:
            raise InputError(f"image ids must be unique to be split, got {image_id!r} twice")
        by_name[str(image_id)] = image_id
    if not by_name:
        raise InputError("a split needs at least one image, got none")

    def digest(name: str) -> bytes:
        # File names may have what is not text.
        return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()

    names = sorted(by_name, key=digest)
    count = max(1, math.floor(percent * len(names) / 100 + 0.5))
    return [by_name[name] for name in names[:count]]
