import math

import pytest
import torch

from ssod.core.batch import ImageBatch, Targets, TwoStreamBatch, Views

NUM_CLASSES = 3


def _targets(rows):
    """Targets whose every field differs from row to row."""
    return Targets(
        boxes=torch.rand(rows, 4),
        classes=torch.randint(NUM_CLASSES, (rows,)),
        weights=torch.rand(rows),
        box_weights=torch.rand(rows),
        probs=torch.rand(rows, NUM_CLASSES + 1).softmax(1),
    )


def _all_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _all_tensors(item)]
    if hasattr(value, "__dict__"):
        return _all_tensors(list(vars(value).values()))
    return []


def test_to_reaches_lists_and_nested_containers():
    images = [torch.zeros(3, 2, 2, dtype=torch.uint8)] * 2
    labeled = Views(images, images, [_targets(1), _targets(0)], ["a", 7])
    batch = TwoStreamBatch(labeled, Views(images, images, None, [8, 9]), failed=["x.jpg"])
    moved = batch.to("meta")
    tensors = _all_tensors(moved)
    assert len(tensors) == 4 + 2 * 5 + 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in _all_tensors(batch)} == {"cpu"}
    assert isinstance(moved.labeled.targets[0], Targets)
    assert moved.unlabeled.targets is None
    assert (moved.labeled.image_ids, moved.failed) == (["a", 7], ["x.jpg"])


def test_to_keeps_image_sizes():
    moved = ImageBatch(torch.zeros(2, 3, 4, 4), [(4, 3), (2, 4)]).to(torch.float64)
    assert moved.tensor.dtype == torch.float64
    assert moved.sizes == [(4, 3), (2, 4)]


def test_ground_truth_has_weight_one_and_one_hot_labels():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    targets = Targets.from_ground_truth(boxes, torch.tensor([2, 0]), NUM_CLASSES)
    assert torch.equal(targets.boxes, boxes)
    assert targets.classes.tolist() == [2, 0]
    assert targets.weights.tolist() == targets.box_weights.tolist() == [1.0, 1.0]
    assert targets.probs.tolist() == [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert targets.probs.dtype == targets.weights.dtype == torch.float64


def test_ground_truth_without_boxes():
    empty = torch.zeros(0, dtype=torch.int64)
    targets = Targets.from_ground_truth(torch.zeros(0, 4), empty, NUM_CLASSES)
    assert len(targets) == 0
    assert targets.probs.shape == (0, NUM_CLASSES + 1)


@pytest.mark.parametrize("classes", [[0, 3], [-1, 2]])
def test_ground_truth_of_an_unknown_class_is_refused(classes):
    expected = rf"classes must be in \[0, 3\), got \[{min(classes)}, {max(classes)}\]"
    with pytest.raises(ValueError, match=expected):
        Targets.from_ground_truth(torch.zeros(2, 4), torch.tensor(classes), NUM_CLASSES)


def _half_reference(images, divisor):
    """Mean of 2 x 2 pixels, one at a time; pixels outside the image are zero."""
    count, channels, height, width = images.shape
    rows, columns = (divisor * math.ceil(size / 2 / divisor) for size in (height, width))
    small = torch.zeros(count, channels, rows, columns, dtype=torch.float64)
    for n in range(count):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    small[n, c, y // 2, x // 2] += images[n, c, y, x] / 4
    return small


@pytest.mark.parametrize("divisor", [1, 4])
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (6, 10)])
def test_half_is_the_mean_of_2x2_pixels_padded_to_the_divisor(size, divisor):
    torch.manual_seed(0)
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    half = ImageBatch(images, [size, (1, 2)]).half(divisor)
    torch.testing.assert_close(half.tensor, _half_reference(images, divisor))


@pytest.mark.parametrize("size", [(5, 8), (4, 7), (3, 3)])
def test_half_keeps_the_last_row_and_column_of_an_odd_tensor(size):
    torch.manual_seed(0)
    images = torch.rand(1, 3, *size, dtype=torch.float64)
    half = ImageBatch(images, [size]).half(divisor=1)
    assert half.tensor.shape[-2:] == half.sizes[0]
    torch.testing.assert_close(half.tensor, _half_reference(images, divisor=1))


def test_half_rounds_odd_sizes_up():
    half = ImageBatch(torch.zeros(3, 3, 32, 64), [(31, 64), (32, 33), (1, 2)]).half()
    assert half.sizes == [(16, 32), (16, 17), (1, 1)]
    assert half.tensor.shape == (3, 3, 32, 32)


def test_half_of_no_image():
    half = ImageBatch(torch.zeros(0, 3, 64, 64), []).half()
    assert len(half) == 0
    assert half.tensor.shape == (0, 3, 32, 32)


def test_slicing_a_batch_keeps_the_padding():
    torch.manual_seed(0)
    batch = ImageBatch(torch.rand(3, 3, 4, 4), [(4, 4), (3, 2), (1, 4)])
    part = batch[1:]
    assert len(part) == 2
    assert part.sizes == [(3, 2), (1, 4)]
    assert torch.equal(part.tensor, batch.tensor[1:])


def test_pinning_reaches_lists_and_nested_containers(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    images = [torch.zeros(3, 2, 2, dtype=torch.uint8)] * 2
    batch = TwoStreamBatch(Views(images, [], [_targets(1), _targets(0)], ["a", 7]), None, ["x.jpg"])
    pinned = batch.pin_memory()
    for tensor, source in zip(_all_tensors(pinned), _all_tensors(batch), strict=True):
        assert torch.equal(tensor, source + 1)
    assert len(_all_tensors(pinned)) == 2 + 2 * 5
    assert (pinned.unlabeled, pinned.failed) == (None, ["x.jpg"])


def _views(count, with_targets):
    weak, strong, second = torch.rand(3, count, 3, 2, 2).unbind()
    targets = [_targets(row) for row in range(count)] if with_targets else None
    return Views(list(weak), list(strong), targets, list(range(count)), list(second))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_splitting_keeps_order_and_targets(parts):
    batch = TwoStreamBatch(_views(4, True), _views(8, False), ["x.jpg"], ["y.jpg"])
    split = batch.split(parts)
    assert [(len(part.labeled), len(part.unlabeled)) for part in split] == [
        (4 // parts, 8 // parts)
    ] * parts
    for stream in ("labeled", "unlabeled"):
        whole, views = getattr(batch, stream), [getattr(part, stream) for part in split]
        for name in ("weak", "strong", "image_ids", "second_strong"):
            joined = [item for view in views for item in getattr(view, name)]
            assert all(a is b for a, b in zip(joined, getattr(whole, name), strict=True))
    joined = [target for part in split for target in part.labeled.targets]
    assert all(a is b for a, b in zip(joined, batch.labeled.targets, strict=True))
    assert all(part.unlabeled.targets is None for part in split)
    assert not any(part.failed or part.file_names for part in split)


@pytest.mark.parametrize("absent", ["weak", "strong", "second_strong"])
def test_splitting_copes_with_a_view_that_is_not_learned(absent):
    labeled = _views(4, True)
    setattr(labeled, absent, [])
    assert len(labeled) == 4
    for part in TwoStreamBatch(labeled, None, []).split(2):
        names = ("weak", "strong", "second_strong")
        views = {name: len(getattr(part.labeled, name)) for name in names}
        assert views == dict.fromkeys(names, 2) | {absent: 0}
        assert (len(part.labeled), len(part.labeled.targets), part.unlabeled) == (2, 2, None)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 3), (3, 2)])
def test_unequal_parts_are_refused(labeled, unlabeled):
    batch = TwoStreamBatch(_views(labeled, True), _views(unlabeled, False), [])
    with pytest.raises(ValueError, match="^3 images cannot be divided into 2 equal parts$"):
        batch.split(2)
