import pytest
import torch

from ssod.core.structures import (
    Detections,
    PseudoLabels,
    RegionOutput,
    RegionSamples,
    Targets,
)

NUM_CLASSES = 3


def _output(rows):
    return RegionOutput(torch.rand(rows, 4), torch.rand(rows, 3, 4), torch.rand(rows, 2))


def _targets(rows):
    """Targets whose every field differs from row to row."""
    return Targets(
        boxes=torch.rand(rows, 4),
        classes=torch.randint(NUM_CLASSES, (rows,)),
        weights=torch.rand(rows),
        box_weights=torch.rand(rows),
        probs=torch.rand(rows, NUM_CLASSES + 1).softmax(1),
    )


def _pseudo_labels(rows):
    return PseudoLabels(
        boxes=torch.rand(rows, 4),
        classes=torch.randint(NUM_CLASSES, (rows,)),
        scores=torch.rand(rows),
        weights=torch.rand(rows),
        box_weights=torch.rand(rows),
        class_probs=torch.rand(rows, NUM_CLASSES + 1, dtype=torch.float64).softmax(1),
        reliable=torch.rand(rows) > 0.5,
    )


INDICES = [
    (slice(1, 3), [1, 2]),
    (slice(None), [0, 1, 2, 3]),
    (slice(0, 0), []),
    (torch.tensor([False, True, False, True]), [1, 3]),
    (torch.zeros(4, dtype=torch.bool), []),
    (torch.tensor([3, 0, 3]), [3, 0, 3]),
    (torch.zeros(0, dtype=torch.int64), []),
]


@pytest.mark.parametrize(("index", "rows"), INDICES)
def test_indexing_selects_the_same_rows_of_every_field(index, rows):
    torch.manual_seed(0)
    whole = _output(4)
    part = whole[index]
    assert isinstance(part, RegionOutput)
    assert len(part) == len(rows)
    for name, tensor in vars(part).items():
        source = getattr(whole, name)
        assert tensor.shape == (len(rows), *source.shape[1:])
        assert tensor.tolist() == [source[row].tolist() for row in rows]


@pytest.mark.parametrize("sizes", [[2], [0], [3, 0, 1], [0, 0]])
def test_cat_undoes_splitting(sizes):
    torch.manual_seed(0)
    whole = _output(sum(sizes))
    parts, start = [], 0
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    joined = RegionOutput.cat(parts)
    assert len(joined) == sum(sizes)
    for name, tensor in vars(joined).items():
        assert torch.equal(tensor, getattr(whole, name))


def test_cat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Detections.cat needs at least one item"):
        Detections.cat([])


def test_unequal_rows_are_refused_with_the_counts():
    with pytest.raises(ValueError, match="RegionOutput needs as many rows.*'deltas': 3"):
        RegionOutput(torch.zeros(2, 4), torch.zeros(3, 3, 4), torch.zeros(2, 5))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_pseudo_labels_become_hard_targets_with_their_weights(rows):
    torch.manual_seed(0)
    labels = _pseudo_labels(rows)
    targets = labels.to_targets()
    for name in ("boxes", "classes", "weights", "box_weights"):
        assert torch.equal(getattr(targets, name), getattr(labels, name))
    assert targets.probs.shape == (rows, NUM_CLASSES + 1)
    assert targets.probs.dtype == labels.class_probs.dtype
    for row, label in zip(targets.probs.tolist(), labels.classes.tolist(), strict=True):
        assert row == [float(c == label) for c in range(NUM_CLASSES + 1)]


def _samples_reference(boxes, classes, matched, targets):
    """Look every region up on its own."""
    rows = []
    for i in range(len(boxes)):
        for label, match in zip(classes[i].tolist(), matched[i].tolist(), strict=True):
            if label == NUM_CLASSES:
                rows.append((1.0, 1.0, [0.0] * NUM_CLASSES + [1.0], None))
                continue
            t = targets[i]
            weights = float(t.weights[match]), float(t.box_weights[match])
            rows.append((*weights, t.probs[match].tolist(), t.boxes[match].tolist()))
    return rows


@pytest.mark.parametrize("background_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_targets", [[2], [3, 0, 1], [0, 0], [0, 4]])
@pytest.mark.parametrize("num_regions", [0, 1, 9])
def test_samples_match_lookup_one_by_one(num_targets, num_regions, background_share):
    torch.manual_seed(0)
    targets = [_targets(count) for count in num_targets]
    boxes = [torch.rand(num_regions, 4) for _ in targets]
    matched = [torch.randint(max(len(t), 1), (num_regions,)) for t in targets]
    classes = []
    for t, match in zip(targets, matched, strict=True):
        background = torch.full_like(match, NUM_CLASSES)
        keep = torch.rand(num_regions) >= background_share
        classes.append(torch.where(keep, t.classes[match], background) if len(t) else background)
    samples = RegionSamples.from_matches(boxes, classes, matched, targets, NUM_CLASSES)
    reference = _samples_reference(boxes, classes, matched, targets)
    assert len(samples.weights) == len(reference) == num_regions * len(targets)
    assert samples.weights.tolist() == [row[0] for row in reference]
    assert samples.box_weights.tolist() == [row[1] for row in reference]
    assert samples.probs.tolist() == [row[2] for row in reference]
    for gt_box, row in zip(samples.gt_boxes.tolist(), reference, strict=True):
        assert row[3] is None or gt_box == row[3]
    assert torch.equal(samples.classes, torch.cat(classes))
    assert torch.equal(samples.matched, torch.cat(matched))
    assert all(a is b for a, b in zip(samples.boxes, boxes, strict=True))


def test_regions_of_an_image_without_targets_may_point_anywhere():
    background = torch.tensor([NUM_CLASSES])
    samples = RegionSamples.from_matches(
        [torch.zeros(1, 4)], [background], [torch.tensor([5])], [_targets(0)], NUM_CLASSES
    )
    assert samples.probs.tolist() == [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("num_targets", [[2, 3], [3, 0, 1], [0, 0]])
def test_look_up_reads_the_matched_target_of_each_region(num_targets):
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(count, generator=generator) for count in num_targets]
    boxes = [torch.zeros(4, 4) for _ in num_targets]
    matched, classes, expected = [], [], []
    for value in values:
        rows = torch.randint(max(len(value), 1), (4,), generator=generator)
        labels = torch.tensor([0, NUM_CLASSES, 1, NUM_CLASSES])
        labels = labels if len(value) else torch.full((4,), NUM_CLASSES)
        matched.append(rows)
        classes.append(labels)
        expected += [
            0.0 if label == NUM_CLASSES else float(value[row])
            for row, label in zip(rows.tolist(), labels.tolist(), strict=True)
        ]
    targets = [_targets(count) for count in num_targets]
    samples = RegionSamples.from_matches(boxes, classes, matched, targets, NUM_CLASSES)
    assert samples.look_up(values).tolist() == pytest.approx(expected)


def test_samples_leave_the_targets_unchanged():
    targets = _targets(1)
    before = targets.weights.clone(), targets.probs.clone()
    background = torch.tensor([NUM_CLASSES])
    RegionSamples.from_matches(
        [torch.zeros(1, 4)], [background], [torch.tensor([0])], [targets], NUM_CLASSES
    )
    assert torch.equal(targets.weights, before[0])
    assert torch.equal(targets.probs, before[1])
