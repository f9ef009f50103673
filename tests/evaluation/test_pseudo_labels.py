import math

import pytest
import torch

from ssod.evaluation.pseudo_labels import pseudo_label_quality, tail_classes

BOX = [0.0, 0.0, 10.0, 10.0]
SHIFTED = [0.0, 2.5, 10.0, 12.5]  # IoU with BOX: 75 / 125 = 0.6
FAR = [50.0, 50.0, 60.0, 60.0]


def _quality(pseudo, true, **kwargs):
    """Quality for images given as lists of (box, score, class) and of (box, class)."""

    def column(images, index, empty):
        return [torch.tensor([r[index] for r in i]) if i else empty for i in images]

    no_box, no_class = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return pseudo_label_quality(
        boxes=column(pseudo, 0, no_box),
        scores=column(pseudo, 1, torch.zeros(0)),
        classes=column(pseudo, 2, no_class),
        true_boxes=column(true, 0, no_box),
        true_classes=column(true, 1, no_class),
        num_classes=3,
        **kwargs,
    )


def _loop_reference(boxes, scores, classes, true_boxes, true_classes):
    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        if width <= 0 or height <= 0:
            return 0.0
        area_a, area_b = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        return width * height / (area_a + area_b - width * height)

    hits = found = true = 0
    for i in range(len(boxes)):
        free = list(range(len(true_boxes[i])))
        true += len(free)
        for r in sorted(range(len(boxes[i])), key=lambda r, s=scores[i]: -float(s[r])):
            label = int(classes[i][r])
            found += 1
            same_class = [m for m in free if int(true_classes[i][m]) == label]
            pairs = [(iou(boxes[i][r].tolist(), true_boxes[i][m].tolist()), m) for m in same_class]
            best, column = max(pairs, default=(0.0, -1))
            if best >= 0.5:
                free.remove(column)
                hits += 1
    return hits, found, true


def test_precision_by_weight():
    pseudo = [[(BOX, 0.9, 0), (FAR, 0.8, 1)], [(SHIFTED, 0.7, 2)]]
    true = [[(BOX, 0)], [(BOX, 2)]]
    weights = [torch.tensor([1.0, 0.5]), torch.tensor([0.25])]
    assert _quality(pseudo, true, weights=weights).weighted_precision == 1.25 / 1.75
    assert _quality(pseudo, true).weighted_precision == pytest.approx(2 / 3)
    assert _quality([[]], [[]], weights=[torch.zeros(0)]).weighted_precision == 0


def test_divergence_of_the_classes_is_that_of_smoothed_histograms():
    def quality(pseudo, true):
        boxes = [[(BOX, 0.9, label) for label in pseudo]]
        return _quality(boxes, [[(FAR, label) for label in true]]).class_kl

    # 3 + 1, 1 + 1, 0 + 1 of 7 true boxes against 1 + 1, 1 + 1, 2 + 1 of 7 pseudo-boxes.
    expected = (4 * math.log(4 / 2) + 2 * math.log(2 / 2) + 1 * math.log(1 / 3)) / 7
    assert quality([0, 1, 2, 2], [0, 0, 0, 1]) == pytest.approx(expected)
    assert quality([2, 0, 0], [0, 0, 2]) == 0
    assert quality([], []) == 0


def _random_images(num_images, most_boxes):
    def boxes(count):
        corner = torch.rand(count, 2) * 20
        return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 15], dim=1)

    counts = torch.randint(most_boxes + 1, (2, num_images)).tolist()
    pseudo = [boxes(c) for c in counts[0]]
    scores = [torch.rand(c) for c in counts[0]]
    classes = [torch.randint(3, (c,)) for c in counts[0]]
    true = [boxes(c) for c in counts[1]]
    true_classes = [torch.randint(3, (c,)) for c in counts[1]]
    return pseudo, scores, classes, true, true_classes


@pytest.mark.parametrize("num_images, most_boxes", [(1, 1), (3, 4), (20, 12), (5, 40)])
def test_matches_loop_reference(num_images, most_boxes):
    torch.manual_seed(num_images)
    images = _random_images(num_images, most_boxes)
    quality = pseudo_label_quality(*images, 3)
    hits, found, true = _loop_reference(*images)
    assert quality.precision == pytest.approx(hits / max(found, 1))
    assert quality.recall == pytest.approx(hits / max(true, 1))
    assert quality.num_per_image == pytest.approx(found / num_images)
    assert quality.true_per_image == pytest.approx(true / num_images)


def test_values_by_hand():
    quality = _quality(
        pseudo=[[(SHIFTED, 0.9, 0), (FAR, 0.8, 1)], [(BOX, 0.7, 0)]],
        true=[[(BOX, 0), (BOX, 2)], [(BOX, 0), (FAR, 1)]],
    )
    assert (quality.precision, quality.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert (quality.num_per_image, quality.true_per_image) == (1.5, 2.0)


def test_recall_of_the_tail_by_hand():
    pseudo = [[(SHIFTED, 0.9, 0), (FAR, 0.8, 1)], [(BOX, 0.7, 2)]]
    true = [[(BOX, 0), (BOX, 2)], [(BOX, 2), (FAR, 1)]]
    for tail, expected in (([2], 1 / 2), ([1, 2], 1 / 3), ([0], 1), ([1], 0), ([], 0)):
        mask = torch.zeros(3).bool()
        mask[tail] = True
        assert _quality(pseudo, true, tail=mask).recall_tail == pytest.approx(expected)
    assert _quality([[]], [[(BOX, 0)]], tail=torch.tensor([False, True, True])).recall_tail == 0


@pytest.mark.parametrize(
    ("counts", "tail"),
    [([5, 1, 9, 0, 7, 3], [1, 3]), ([4, 4, 4, 4, 4, 4], [0, 1]), ([8, 2], [1]), ([3], [0])],
)
def test_the_tail_is_the_third_of_the_classes_with_the_fewest_labels(counts, tail):
    assert tail_classes(torch.tensor(counts)).nonzero()[:, 0].tolist() == tail


def test_wrong_class_and_other_image_do_not_match():
    quality = _quality(pseudo=[[(BOX, 0.9, 1)], [(FAR, 0.9, 0)]], true=[[(BOX, 0)], [(BOX, 0)]])
    assert (quality.precision, quality.recall) == (0, 0)


def test_duplicate_is_a_false_positive_and_the_better_score_chooses_first():
    weights = [torch.tensor([1.0, 0.5])]
    quality = _quality([[(BOX, 0.3, 0), (SHIFTED, 0.9, 0)]], [[(BOX, 0)]], weights=weights)
    assert (quality.precision, quality.recall) == (0.5, 1)
    assert quality.weighted_precision == pytest.approx(0.5 / 1.5)


def test_iou_equal_to_the_threshold_matches():
    half = [0.0, 0.0, 10.0, 5.0]
    assert _quality([[(half, 0.9, 0)]], [[(BOX, 0)]]).precision == 1


@pytest.mark.parametrize(
    "pseudo, true",
    [([], []), ([[]], [[]]), ([[(BOX, 0.9, 0)]], [[]]), ([[]], [[(BOX, 0)]])],
)
def test_empty_sides_give_zeros_not_nan(pseudo, true):
    quality = _quality(pseudo, true)
    assert (quality.precision, quality.recall) == (0, 0)


def test_boxes_without_area_do_not_hide_a_match():
    point = [5.0, 5.0, 5.0, 5.0]
    weights = [torch.tensor([0.0, 1.0])]
    quality = _quality(
        [[(point, 0.9, 0), (BOX, 0.8, 0)]], [[(point, 0), (BOX, 0)]], weights=weights
    )
    assert (quality.precision, quality.weighted_precision) == (0.5, 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="shorter"):
        _quality([[]], [])
