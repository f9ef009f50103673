import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_image(tmp_path):
    """Return a function that writes smooth random pixels and returns the path."""

    def write(name, height=24, width=32, seed=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        coarse = rng.integers(256, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return path

    return write


@pytest.fixture
def coco_content(write_image):
    """COCO content of three written images, four boxes and two categories with a gap in ids."""
    sizes = {1: (24, 32), 2: (40, 20), 7: (16, 48)}
    images = []
    for image_id, (height, width) in sizes.items():
        write_image(f"images/{image_id}.png", height, width, seed=image_id)
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        )
    boxes = [(1, 9, [1, 2, 10, 8]), (1, 4, [3.5, 0, 20, 24]), (7, 9, [0, 0, 48, 16])]
    annotations = [
        {"id": i, "image_id": image_id, "category_id": category, "bbox": bbox, "iscrowd": 0}
        for i, (image_id, category, bbox) in enumerate(boxes)
    ]
    annotations.append(
        {"id": 9, "image_id": 2, "category_id": 4, "bbox": [1, 1, 9, 9], "iscrowd": 1}
    )
    categories = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def write_json(tmp_path):
    def write(content, name="annotations.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write
