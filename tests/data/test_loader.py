import logging
from functools import partial

import numpy as np
import pytest
import torch

from ssod.core.geometry import map_boxes, transfer_boxes
from ssod.core.structures import TwoStreamBatch, Views
from ssod.data.images import read_image
from ssod.data.loader import FailedImages, build_test_loader, build_two_stream_loader
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError

SHAPES = [(24, 32), (32, 24), (30, 30), (20, 40), (26, 26)]


@pytest.fixture
def make_dataset(write_image):
    """Return a function that writes images with 0, 1, 2, ... boxes into a folder."""

    def make(folder, count=5, labeled=True):
        rng = np.random.default_rng(len(folder))
        records = []
        for i in range(count):
            height, width = SHAPES[i % len(SHAPES)]
            path = write_image(f"{folder}/bild ü {i}.png", height, width, seed=i)
            boxes = rng.uniform(0, 10, (i if labeled else 0, 4)).astype(np.float32)
            boxes[:, 2:] += boxes[:, :2]
            classes = rng.integers(3, size=len(boxes))
            records.append(ImageRecord(f"{folder}{i}", str(path), height, width, boxes, classes))
        return DetectionDataset(records, ["a", "b", "c"], [1, 2, 3])

    return make


def _batches(labeled, unlabeled, **kwargs):
    arguments = {
        "labeled_batch": 4,
        "unlabeled_batch": 4,
        "burn_in_iters": 0,
        "seed": 3,
        "start_iter": 0,
        "max_iter": 6,
        "min_sizes": (20, 28),
        "max_size": 48,
        "flip": True,
        "num_workers": 0,
    }
    return list(build_two_stream_loader(labeled, unlabeled, **{**arguments, **kwargs}))


def _flat(value):
    """Make containers comparable: tensors become bytes with dtype and shape."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, list):
        return [_flat(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _flat(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def test_batch_contents(make_dataset):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    boxes_of = {record.image_id: len(record.boxes) for record in map(labeled.__getitem__, range(5))}
    for batch in _batches(labeled, unlabeled):
        assert isinstance(batch, TwoStreamBatch) and batch.failed == []
        assert len(batch.labeled) == len(batch.unlabeled) == 4
        assert batch.unlabeled.targets is None
        assert all(image_id.startswith("unlabeled") for image_id in batch.unlabeled.image_ids)
        for views in (batch.labeled, batch.unlabeled):
            for weak, strong in zip(views.weak, views.strong, strict=True):
                assert weak.shape == strong.shape and weak.shape[0] == 3
                assert weak.dtype == strong.dtype == torch.uint8
                assert min(weak.shape[1:]) in (20, 24, 28)  # 24: 2:1 images, bounded by 48
                assert max(weak.shape[1:]) <= 48
        for image_id, targets in zip(batch.labeled.image_ids, batch.labeled.targets, strict=True):
            assert len(targets) == boxes_of[image_id]  # 0 for the first image
            assert targets.boxes.dtype == torch.float32 and targets.classes.dtype == torch.int64
            assert targets.boxes.shape == (len(targets), 4) and (targets.weights == 1).all()
            assert targets.probs.shape == (len(targets), 4)


def test_boxes_and_classes_belong_to_their_image(make_dataset):
    """With the size kept and no flip, views and targets are the file's."""
    labeled = make_dataset("labeled")
    records = {record.image_id: record for record in map(labeled.__getitem__, range(5))}
    for batch in _batches(labeled, None, min_sizes=(26,), flip=False, max_iter=10):
        views = batch.labeled
        for i, image_id in enumerate(views.image_ids):
            record, targets = records[image_id], views.targets[i]
            assert targets.classes.tolist() == record.classes.tolist()
            scale = torch.tensor(views.weak[i].shape[:0:-1]) / torch.tensor(
                [record.width, record.height]
            )
            expected = torch.from_numpy(record.boxes) * scale.repeat(2)
            torch.testing.assert_close(targets.boxes, expected)
            if image_id == "labeled4":
                image = read_image(record.file_name)
                assert torch.equal(views.weak[i], torch.from_numpy(image).permute(2, 0, 1))


def test_workers_and_resuming_change_nothing(make_dataset):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled", 9)
    run = partial(_batches, labeled, unlabeled, burn_in_iters=2)
    expected = _flat(run())
    assert _flat(run(num_workers=2)) == expected
    assert _flat(run(start_iter=4)) == expected[4:]


def _num_bytes(views):
    """Bytes of the storages behind the views of a batch, which is what a worker sends."""
    sent = views.weak + views.strong + views.second_strong
    storages = [view.untyped_storage() for view in sent]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_view_that_is_not_learned_is_not_sent(make_dataset, num_workers):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    whole = _batches(labeled, unlabeled)
    run = partial(_batches, labeled, unlabeled, labeled_strong=False, num_workers=num_workers)
    for batch, expected in zip(run(), whole, strict=True):
        assert batch.labeled.strong == []
        assert _num_bytes(batch.labeled) == sum(view.numel() for view in batch.labeled.weak)
        assert _num_bytes(batch.labeled) == _num_bytes(expected.labeled) / 2
        assert _flat(batch.labeled.weak) == _flat(expected.labeled.weak)
        assert _flat(batch.labeled.targets) == _flat(expected.labeled.targets)
        assert _flat(batch.unlabeled) == _flat(expected.unlabeled)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_second_strong_view_changes_nothing_else(make_dataset, num_workers):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    open(unlabeled.file_names[2], "wb").close()  # a replacement is drawn as well
    plain = _batches(labeled, unlabeled)
    run = partial(_batches, labeled, unlabeled, second_strong=True)
    batches = run(num_workers=num_workers)
    assert [_flat(batch) for batch in run(start_iter=2)] == [_flat(b) for b in batches[2:]]
    found = set()
    for batch, expected in zip(batches, plain, strict=True):
        views = batch.unlabeled
        assert expected.unlabeled.second_strong == batch.labeled.second_strong == []
        assert len(views.second_strong) == 4
        assert _num_bytes(views) == 3 * sum(view.numel() for view in views.weak)
        for weak, strong, second in zip(views.weak, views.strong, views.second_strong, strict=True):
            assert second.shape == weak.shape and second.dtype == torch.uint8
            assert not torch.equal(second, strong)
            found.add(second.numpy().tobytes())
        views.second_strong = []
        assert _flat(batch) == _flat(expected)
    assert len(found) == 24  # each of them drawn anew


def test_a_second_strong_view_is_drawn_from_numbers_of_its_own(make_dataset):
    # With nothing else to draw, the same numbers would give the same view.
    keys = {"min_sizes": (26,), "flip": False, "second_strong": True}
    for batch in _batches(make_dataset("labeled"), make_dataset("unlabeled"), **keys):
        for pair in zip(batch.unlabeled.strong, batch.unlabeled.second_strong, strict=True):
            assert not torch.equal(*pair)


def test_a_second_strong_view_is_one_of_the_same_pixels(make_dataset, monkeypatch):
    monkeypatch.setattr("ssod.data.views.strong_augment", lambda image, rng: (image, []))
    for batch in _batches(make_dataset("labeled"), make_dataset("unlabeled"), second_strong=True):
        assert _flat(batch.unlabeled.second_strong) == _flat(batch.unlabeled.weak)


OWN = {"independent": True, "warp": True}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_views_of_their_own_geometry_change_nothing_of_the_weak_ones(make_dataset, num_workers):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    open(unlabeled.file_names[2], "wb").close()  # a replacement is drawn as well
    run = partial(_batches, labeled, unlabeled, second_strong=True)
    plain, batches = run(), run(num_workers=num_workers, **OWN)
    assert [_flat(b) for b in run(start_iter=2, **OWN)] == [_flat(b) for b in batches[2:]]
    for batch, expected in zip(batches, plain, strict=True):
        assert expected.labeled.to_strong is expected.labeled.strong_targets is None
        assert expected.labeled.erased == expected.unlabeled.erased == []
        for views, others in (
            (batch.labeled, expected.labeled),
            (batch.unlabeled, expected.unlabeled),
        ):
            for name in ("weak", "targets", "image_ids", "second_strong"):
                assert _flat(getattr(views, name)) == _flat(getattr(others, name))
            assert views.to_strong.shape == (4, 3, 3) and views.to_strong.dtype == torch.float64
            assert [e.dtype for e in views.erased] == [torch.float32] * 4
        assert batch.unlabeled.strong_targets is None


def test_targets_of_strong_views_are_what_is_left_of_them_there(make_dataset):
    labeled = make_dataset("labeled")
    counts = [0, 0]
    for batch in _batches(labeled, None, max_iter=30, **OWN):
        views = batch.labeled
        rows = (views.targets, views.strong_targets, views.to_strong, views.strong, views.erased)
        for targets, left, matrix, strong, erased in zip(*rows, strict=True):
            size = tuple(strong.shape[1:])
            boxes, is_left = transfer_boxes(targets.boxes, matrix, size, erased)
            assert torch.equal(left.boxes, boxes[is_left])
            assert left.classes.tolist() == targets.classes[is_left].tolist()
            assert left.probs.shape == (len(left), 4) and (left.weights == 1).all()
            counts[0] += len(left)
            counts[1] += len(targets)
    assert 0 < counts[0] < counts[1]


def test_small_tensors_of_a_batch_share_storages(make_dataset):
    """A worker holds a file descriptor open for each that it sends."""
    for batch in _batches(make_dataset("labeled"), None, **OWN):
        for tensors in (batch.labeled.erased, [t.boxes for t in batch.labeled.strong_targets]):
            assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def test_a_sample_looks_different_in_every_epoch_and_stream(make_dataset):
    one = make_dataset("one", 1)
    batches = _batches(
        one, one, labeled_batch=1, unlabeled_batch=1, min_sizes=(30,), flip=False, max_iter=10
    )
    views = [v for batch in batches for v in (batch.labeled, batch.unlabeled)]
    assert len({view.strong[0].numpy().tobytes() for view in views}) > 16
    assert len({view.weak[0].numpy().tobytes() for view in views}) == 1


def test_ranks_split_the_batch(make_dataset):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled", 9)
    together = _batches(labeled, unlabeled)
    ranks = [_batches(labeled, unlabeled, rank=r, world_size=2) for r in range(2)]
    for batch, first, second in zip(together, *ranks, strict=True):
        assert _flat(batch.labeled.strong) == _flat(first.labeled.strong + second.labeled.strong)
        assert batch.unlabeled.image_ids == first.unlabeled.image_ids + second.unlabeled.image_ids


def test_the_global_generator_is_left_alone(make_dataset):
    before = torch.get_rng_state()
    _batches(make_dataset("labeled"), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_burn_in_decodes_no_unlabeled_image(make_dataset):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    for name in unlabeled.file_names:
        open(name, "wb").close()
    batches = _batches(labeled, unlabeled, burn_in_iters=6)
    assert all(batch.unlabeled is None and batch.failed == [] for batch in batches)
    with pytest.raises(InputError, match="5 images in a row failed: .*cannot be decoded"):
        _batches(labeled, unlabeled, burn_in_iters=5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_replaced_and_reported_once(make_dataset, num_workers, caplog):
    labeled, unlabeled = make_dataset("labeled"), make_dataset("unlabeled")
    whole = _batches(labeled, unlabeled, max_iter=10)
    broken = unlabeled.file_names[2]
    open(broken, "wb").close()
    batches = _batches(labeled, unlabeled, max_iter=10, num_workers=num_workers)
    counter = FailedImages(max_share=0.5)
    for batch, expected in zip(batches, whole, strict=True):
        counter.update(batch)
        assert _flat(batch.labeled) == _flat(expected.labeled)
        kept = [i for i, name in enumerate(expected.unlabeled.image_ids) if name != "unlabeled2"]
        for i, image_id in enumerate(batch.unlabeled.image_ids):
            assert image_id != "unlabeled2"
            if i in kept:
                assert image_id == expected.unlabeled.image_ids[i]
                assert torch.equal(batch.unlabeled.strong[i], expected.unlabeled.strong[i])
        assert batch.failed == [broken] * (4 - len(kept))
    assert sum(len(batch.failed) for batch in batches) == 8  # once in each of 40 / 5 epochs
    (message,) = caplog.messages
    assert broken in message and "cannot be decoded" in message


def test_the_only_image_of_a_set_is_broken(make_dataset):
    labeled = make_dataset("labeled", 1)
    open(labeled.file_names[0], "wb").close()
    with pytest.raises(InputError, match=r"5 images in a row failed: .*bild ü 0\.png"):
        _batches(labeled, None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_size_unlike_the_annotations_is_an_error_of_one_line(
    make_dataset, write_image, num_workers
):
    labeled = make_dataset("labeled")
    write_image("labeled/bild ü 1.png", 24, 32)
    message = r"bild ü 1\.png: the annotations say height 32 and width 24, .* has 24 and 32"
    with pytest.raises(InputError, match=message) as error:
        _batches(labeled, None, num_workers=num_workers)
    assert "\n" not in str(error.value)
    # Unlabeled images have no boxes that could be misplaced.
    _batches(make_dataset("other"), labeled)


def test_bad_batch_sizes(make_dataset):
    with pytest.raises(InputError, match=r"SOLVER\.IMS_PER_BATCH"):
        _batches(make_dataset("labeled"), None, labeled_batch=5, world_size=2)


def _batch(num_images, failed):
    views = Views([], [], [], list(range(num_images)))
    return TwoStreamBatch(views, None, failed)


def test_too_many_failures_stop_the_training(caplog):
    counter = FailedImages(max_share=0.05)
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            counter.update(_batch(9, ["x.jpg"]))
            counter.check(counter.num_failed, counter.num_drawn)  # too few were drawn to tell
    assert len(caplog.messages) == 1
    counter.update(_batch(9, ["a.jpg"]))
    message = r"10 of 100 images drawn \(10\.0%\).* files such as a\.jpg: .*MAX_FAILED_SHARE"
    with pytest.raises(InputError, match=message):
        counter.check(counter.num_failed, counter.num_drawn)


def test_failures_of_all_ranks_count_together():
    counter = FailedImages(max_share=0.05)
    counter.update(_batch(9, ["x.jpg"]))
    counter.check(num_failed=5, num_drawn=100)
    with pytest.raises(InputError, match="6 of 100"):
        counter.check(num_failed=6, num_drawn=100)
    with pytest.raises(InputError, match=r"6 of 100 images drawn \(6\.0%\) could not be decoded: "):
        FailedImages(max_share=0.05).check(num_failed=6, num_drawn=100)  # none on this rank


def test_few_failures_are_tolerated():
    counter = FailedImages(max_share=0.05)
    for _ in range(40):
        counter.update(_batch(38, ["x.jpg", "y.jpg"]))  # exactly the share
        counter.check(counter.num_failed, counter.num_drawn)
    counter = FailedImages(max_share=0.0)
    for _ in range(5):
        counter.update(_batch(40, []))
        counter.check(counter.num_failed, counter.num_drawn)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_loader(make_dataset, num_workers):
    dataset = make_dataset("val")
    loader = build_test_loader(
        dataset, min_size=33, max_size=60, batch_size=2, num_workers=num_workers
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 2, 1] and len(loader) == 3
    items = [item for batch in batches for item in batch]
    assert [item.index for item in items] == list(range(5))
    for item in items:
        record = dataset[item.index]
        height, width = item.image.shape[1:]
        assert item.image.dtype == torch.uint8 and item.matrix.shape == (3, 3)
        whole = torch.tensor([[0.0, 0.0, width, height]])
        back = map_boxes(whole, torch.linalg.inv(item.matrix))
        torch.testing.assert_close(back, torch.tensor([[0.0, 0.0, record.width, record.height]]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_validation_image_is_an_error_of_one_line(make_dataset, num_workers):
    dataset = make_dataset("val")
    open(dataset.file_names[3], "wb").close()
    loader = build_test_loader(
        dataset, min_size=33, max_size=60, batch_size=2, num_workers=num_workers
    )
    with pytest.raises(InputError, match=r"bild ü 3\.png: cannot be decoded") as error:
        list(loader)
    assert "\n" not in str(error.value)
