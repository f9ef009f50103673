"""
Shapes: a synthetic COCO-format data set that a small detector learns within minutes.

Small enough to be made in seconds on one core, so tests and trials need no download.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod.data.shapes_scene import (
    CLASS_NAMES,
    CROWDED_MAX_OBJECTS,
    CROWDED_NAMES,
    MAX_OBJECTS,
    Scene,
    draw_scene,
)
from ssod.errors import InputError
from ssod.files import replacing

CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)
"""COCO category id of each class, as many as there are; sparse, as COCO's own are."""
SPLITS = ("labeled", "unlabeled", "val")
MANIFEST = "shapes.json"

_VERSION = 1  # raise whenever the same spec gives other images or annotations


@dataclass(frozen=True)
class ShapesSpec:
    """
    What determines a Shapes set completely.

    Attributes:
        num_labeled: images of the labeled split; also the following two count images.
        num_unlabeled: the same for the unlabeled split.
        num_val: the same for the validation split.
        image_size: long side in pixels; the short side is 70 to 95 % of it.
        seed: images of different seeds have nothing in common.
        max_objects: most objects an image; each image has at least one. 4 if it is not given, 13 in
            a crowded set.
        max_foreign: most objects of classes that no label has an unlabeled image; 0 to this many
            of them are in it, and in no file of annotations. The other splits have none.
        crowded: a harder set: twelve classes, of which three have one hue, more and smaller
            objects, more distractors.

    Raises:
        InputError: if a value is too small, or a crowded set is to have foreign objects.
    """

    num_labeled: int = 24
    num_unlabeled: int = 512
    num_val: int = 300
    image_size: int = 160
    seed: int = 0
    max_objects: int | None = None
    max_foreign: int = 0
    crowded: bool = False

    def __post_init__(self) -> None:
        if self.max_objects is None:
            most = CROWDED_MAX_OBJECTS if self.crowded else MAX_OBJECTS
            object.__setattr__(self, "max_objects", most)
        if self.crowded and self.max_foreign:
            raise InputError(
                "max_foreign of a crowded Shapes set must be 0, as foreign shapes are classes "
                f"there, got {self.max_foreign}"
            )
        smallest = {"image_size": 64, "seed": 0, "max_foreign": 0, "crowded": 0}
        for name, value in asdict(self).items():
            if value < smallest.get(name, 1):
                raise InputError(
                    f"{name} of a Shapes set must be at least {smallest.get(name, 1)}, got {value}"
                )

    def to_dict(self) -> dict[str, int]:
        """Return the fields for a file; `max_foreign` and `crowded` only where they are set."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("max_foreign", "crowded")}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, most frequent first."""
        return CROWDED_NAMES if self.crowded else CLASS_NAMES


def ensure_shapes(
    root: str | Path, spec: ShapesSpec, progress: Callable[[int, int], None] | None = None
) -> bool:
    """
    Make the set unless `root` already holds a finished one of the same spec.

    Arguments and errors are those of `write_shapes`. Not safe for concurrent calls on one `root`.

    Returns:
        True if the set was made, False if it was there.
    """
    if _read_manifest(Path(root)) == _manifest(spec, complete=True):
        return False
    write_shapes(root, spec, progress)
    return True


def write_shapes(
    root: str | Path, spec: ShapesSpec, progress: Callable[[int, int], None] | None = None
) -> None:
    """
    Write `images/*.jpg` and `annotations/{labeled,unlabeled,unlabeled_truth,val}.json`.

    `unlabeled.json` lists images without any annotation; their truth is in `unlabeled_truth.json`.
    A box is the extent of an object's visible pixels and `area` counts them. An image depends on
    the spec without the numbers of images, its split and its index only: a larger set of the same
    seed contains the smaller one. Foreign objects are all that `max_foreign` adds; where they lie
    on others these have fewer visible pixels.

    Args:
        root: new or empty directory, or one with a Shapes set, which is replaced.
        spec: what to write.
        progress: called as `progress(images_done, images_total)` after each image.

    Raises:
        InputError: if `root` is a file, or holds files but no Shapes set.
    """
    root = Path(root)
    _clear(root)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    _write_json(root / MANIFEST, _manifest(spec, complete=False))
    counts = dict(zip(SPLITS, (spec.num_labeled, spec.num_unlabeled, spec.num_val), strict=True))
    done = 0
    for split, count in counts.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = shapes_scene(spec, split, index)
            name, image_id = f"{split}_{index + 1:06d}.jpg", index + 1
            # Full chroma resolution: with subsampling small shapes lose the color cue.
            Image.fromarray(scene.image).save(root / "images" / name, quality=92, subsampling=0)
            height, width = scene.image.shape[:2]
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            annotations += _annotations(scene, image_id, first_id=len(annotations) + 1)
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))
        truth = "unlabeled_truth" if split == "unlabeled" else split
        _write_coco(root / "annotations" / f"{truth}.json", spec, images, annotations)
        if split == "unlabeled":
            _write_coco(root / "annotations" / "unlabeled.json", spec, images, [])
    _write_json(root / MANIFEST, _manifest(spec, complete=True))


def shapes_scene(spec: ShapesSpec, split: str, index: int) -> Scene:
    """
    Draw image `index` (from 0) of a split; the split's size does not matter.

    Raises:
        ValueError: if `split` is not one of `SPLITS`.
    """
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
    max_foreign = spec.max_foreign if split == "unlabeled" else 0
    return draw_scene(rng, spec.image_size, spec.max_objects, max_foreign, spec.crowded)


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    annotations = []
    for number, (mask, label) in enumerate(zip(scene.masks, scene.classes, strict=True)):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": CATEGORY_IDS[label],
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return annotations


def _write_coco(path: Path, spec: ShapesSpec, images: list[dict], annotations: list[dict]) -> None:
    ids = CATEGORY_IDS[: len(spec.class_names)]
    categories = [{"id": i, "name": name} for i, name in zip(ids, spec.class_names, strict=True)]
    _write_json(path, {"images": images, "annotations": annotations, "categories": categories})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _manifest(spec: ShapesSpec, complete: bool) -> dict[str, Any]:
    return {"shapes_version": _VERSION, "spec": spec.to_dict(), "complete": complete}


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """Content of `root`'s manifest, None where there is none or it is not from here."""
    try:
        content = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "shapes_version" in content else None


def _clear(root: Path) -> None:
    """Remove the files of an earlier Shapes set from `root`; anything else in there stays."""
    if root.exists() and not root.is_dir():
        raise InputError(f"The Shapes set needs a directory, but {root} is a file")
    if not root.exists() or not any(root.iterdir()):
        return
    if _read_manifest(root) is None:
        raise InputError(
            f"{root} holds files but no Shapes set ({MANIFEST} is missing): "
            "give a new or empty directory"
        )
    for split in SPLITS:
        for path in (root / "images").glob(f"{split}_*.jpg"):
            path.unlink()
    for name in (*SPLITS, "unlabeled_truth"):
        (root / "annotations" / f"{name}.json").unlink(missing_ok=True)
