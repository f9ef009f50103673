import multiprocessing
import random
from dataclasses import replace

import numpy as np
import pytest

from ssod.data.records import DetectionDataset, FlatList, ImageRecord

# Letters of one to four bytes, half of a surrogate pair as in names that are not UTF-8, and what
# could be taken for a separator or an end.
LETTERS = "aZ0/\\ .\t\n\0äß漢😀\udc80\ud83d"


def _random_items(kind, size=60, seed=0):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(LETTERS, k=rng.randrange(6))) for _ in range(size)]
    numbers = [rng.choice([0, 7, -3, 2**40, -(2**70)]) * rng.randrange(9) for _ in range(size)]
    if kind == "mixed":
        return [*map(rng.choice, zip(texts, numbers, strict=True)), "12", 12, "-0", 0, ""]
    return {"texts": texts, "numbers": numbers, "empty": []}[kind]


@pytest.mark.parametrize("kind", ["texts", "numbers", "mixed", "empty"])
def test_flat_list_reads_like_a_list(kind):
    items = _random_items(kind)
    flat = FlatList(items)
    assert len(flat) == len(items) and flat == items and items == flat
    assert [(type(item), item) for item in flat] == [(type(item), item) for item in items]
    for index in range(-len(items), len(items)):
        assert flat[index] == items[index]
    for part in (slice(None), slice(3), slice(-4, None), slice(None, None, -7), slice(9, 2)):
        assert flat[part] == items[part]
    for beyond in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            flat[beyond]
    assert repr(flat) == repr(items)
    assert flat != [*items, "one more"] and flat != tuple(items)


@pytest.mark.parametrize("kind", ["texts", "numbers", "mixed", "empty"])
def test_selected_items_of_a_flat_list(kind):
    items = _random_items(kind, seed=1)
    rng = np.random.default_rng(0)
    for share in (0, 0.3, 1):
        keep = rng.random(len(items)) < share
        selected = FlatList(items).select(keep)
        expected = [item for item, is_kept in zip(items, keep, strict=True) if is_kept]
        assert selected == expected
        selected.append("more")
        assert selected == [*expected, "more"]


def _records(count, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        num_boxes = rng.integers(4) if i % 3 else 0
        boxes = rng.random((num_boxes, 4), np.float32)
        classes = rng.integers(5, size=num_boxes)
        name = f"/data/ä {i}.jpg"
        yield ImageRecord(str(i) if i % 2 else i, name, 10 + i, 20 + i % 7, boxes, classes)


def _assert_same(dataset, records):
    assert len(dataset) == len(records)
    for index, expected in enumerate(records):
        record = dataset[index]
        for key in ("image_id", "file_name", "height", "width"):
            assert getattr(record, key) == getattr(expected, key)
        np.testing.assert_array_equal(record.boxes, expected.boxes)
        np.testing.assert_array_equal(record.classes, expected.classes)
    ratios = np.array([r.width / r.height for r in records], np.float32)
    np.testing.assert_array_equal(dataset.aspect_ratios, ratios)
    classes = [k for r in records for k in r.classes.tolist()]
    assert dataset.class_counts.tolist() == [classes.count(k) for k in range(5)]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_selection_of_a_selection_equals_lists_of_records(count):
    records = list(_records(count))
    dataset = DetectionDataset(_records(count), list("abcde"), range(5))
    _assert_same(dataset, records)
    for step in (2, 3):
        records = records[::step]
        dataset = dataset.select(r.image_id for r in records)
        _assert_same(dataset, records)


def test_records_are_taken_one_by_one():
    alive = 0

    class Counted(ImageRecord):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def generate():
        nonlocal alive
        for record in _records(20):
            alive += 1
            yield Counted(**vars(record))
            assert alive <= 2

    assert len(DetectionDataset(generate(), list("abcde"), range(5))) == 20


def test_forked_processes_read_the_same_entries():
    dataset = DetectionDataset(_records(40), list("abcde"), range(5))
    context = multiprocessing.get_context("fork")
    queues = [context.SimpleQueue() for _ in range(2)]

    def read(queue):
        entries = [dataset[i] for i in range(len(dataset))]
        queue.put([(r.image_id, r.file_name, r.height, r.boxes.tolist()) for r in entries])

    processes = [context.Process(target=read, args=(queue,)) for queue in queues]
    for process in processes:
        process.start()
    found = [queue.get() for queue in queues]
    for process in processes:
        process.join()
    expected = [(r.image_id, r.file_name, r.height, r.boxes.tolist()) for r in _records(40)]
    assert found == [expected, expected]


@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_set_without_its_boxes_has_the_same_images(count):
    dataset = DetectionDataset(_records(count), list("abcde"), range(5))
    bare = [replace(r, boxes=r.boxes[:0], classes=r.classes[:0]) for r in _records(count)]
    _assert_same(dataset.without_boxes(), bare)
    _assert_same(dataset, list(_records(count)))
