"""Choice of the images whose labels are used."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

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
    ordered, count = _order(image_ids, percent, seed)
    return ordered[:count]


def make_stratified_split(
    classes_of: Mapping[int | str, Iterable[int]], percent: float, seed: int
) -> list[int | str]:
    """
    Choose `percent` of the images so that every class keeps its share of them.

    Images are ordered as in `make_split`. Classes are then served from the one with the fewest
    images to the one with the most, as in iterative stratification (Sechidis et al. 2011,
    https://doi.org/10.1007/978-3-642-23808-6_10): each gets what it lacks of its share, first of
    images without any rarer class, because those with one have had their turn. Images without
    objects come last, like a class. What rounding has left goes to the next images in order.

    Each class is in at least `percent` of its images, rounded down, and in one at least; a common
    class that accompanies rare ones can be in some more. The number of images is at least that of
    `make_split`: some percent more at the size of COCO, and many times as many for 1 % of few
    images with many classes. Platform and order of the ids do not matter. Unlike those of
    `make_split`, smaller splits are not contained in larger ones.

    Args:
        classes_of: classes in each image, by image id; an image without objects has none.
        percent: in (0, 100).
        seed: another seed gives another split.

    Returns:
        The chosen ids.

    Raises:
        InputError: as `make_split`.
    """
    ordered, count = _order(classes_of, percent, seed)
    images_of: dict[int | None, list[int | str]] = defaultdict(list)
    for image_id in ordered:
        for label in set(classes_of[image_id]) or {None}:
            images_of[label].append(image_id)
    without_objects = images_of.pop(None, [])
    strata = sorted(images_of.items(), key=lambda item: (len(item[1]), item[0]))
    quotas = [(ids, max(1, math.floor(percent * len(ids) / 100))) for _, ids in strata]
    quotas.append((without_objects, math.floor(percent * len(without_objects) / 100)))
    chosen: set[int | str] = set()
    served: set[int | str] = set()
    for ids, quota in quotas:
        free = [image_id for image_id in ids if image_id not in chosen]
        lacking = max(0, quota - (len(ids) - len(free)))
        chosen.update(sorted(free, key=served.__contains__)[:lacking])  # stable: keeps the order
        served.update(ids)
    rest = [image_id for image_id in ordered if image_id not in chosen]
    chosen.update(rest[: max(0, count - len(chosen))])
    return [image_id for image_id in ordered if image_id in chosen]


def _order(
    image_ids: Iterable[int | str], percent: float, seed: int
) -> tuple[list[int | str], int]:
    """Return the ids in the order of their hashes, and how many of them are `percent`."""
    if not 0 < percent < 100:
        raise InputError(f"SSOD.DATA.PERCENT must be in (0, 100), got {percent}")
    by_name: dict[str, int | str] = {}
    for image_id in image_ids:
        if str(image_id) in by_name:
            raise InputError(f"image ids must be unique to be split, got {image_id!r} twice")
        by_name[str(image_id)] = image_id
    if not by_name:
        raise InputError("a split needs at least one image, got none")
    hashes = {  # a JSON may have halves of surrogate pairs, which UTF-8 alone has no bytes for
        name: hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()
        for name in by_name
    }
    names = sorted(by_name, key=hashes.__getitem__)
    count = max(1, math.floor(percent * len(names) / 100 + 0.5))
    return [by_name[name] for name in names], count
