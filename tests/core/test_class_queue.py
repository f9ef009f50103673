import json
import math
from collections import deque
from pathlib import Path

import pytest
import torch

from ssod.core.class_queue import ClassQueue

CASES = json.loads((Path(__file__).parent / "data" / "worked_cases.json").read_text())


def _push(queue, embeddings, classes):
    """Push the boxes of one iteration."""
    queue.add(queue.sum_by_class(torch.tensor(embeddings), torch.tensor(classes)))
    queue.close()


def _random_iterations(count, num_classes, size=3):
    """Embeddings and classes of each; the last class is rare."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        boxes = int(torch.randint(6, (), generator=generator))
        classes = torch.rand(boxes, generator=generator).square() * num_classes
        yield torch.randn(boxes, size, generator=generator), classes.long()


class _Reference:
    """Lists of each class's boxes by iteration, of which the last that have L boxes count."""

    def __init__(self, num_classes, length):
        self.places = [deque() for _ in range(num_classes)]
        self.length = length

    def push(self, embeddings, classes):
        for label, places in enumerate(self.places):
            pairs = zip(embeddings.tolist(), classes.tolist(), strict=True)
            own = [embedding for embedding, c in pairs if c == label]
            if own:
                places.append(own)
            while len(places) > 1 and sum(map(len, list(places)[1:])) >= self.length:
                places.popleft()

    def prototypes(self, size):
        rows = []
        for places in self.places:
            own = [row for place in places for row in place]
            rows.append(
                [sum(c) / len(own) for c in zip(*own, strict=True)] if own else [0.0] * size
            )
        return torch.tensor(rows)


def test_worked_case_of_a_box_an_iteration():
    case = CASES["D2_prototypes"]
    queue = ClassQueue(3, case["inputs"]["L"], 2)
    for embedding, label in case["inputs"]["push_in_order(feature,class)"]:
        _push(queue, [embedding], [label])
    torch.testing.assert_close(queue.prototypes(), torch.tensor(case["outputs"]["prototypes"]))
    assert queue.seen().tolist() == [True, True, False]


@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("iterations", [0, 1, 30])
def test_prototypes_are_means_of_the_last_iterations_with_enough_boxes(length, iterations):
    queue, expected = ClassQueue(4, length, 3), _Reference(4, length)
    for embeddings, classes in _random_iterations(iterations, 4):
        queue.add(queue.sum_by_class(embeddings, classes))
        queue.close()
        expected.push(embeddings, classes)
        torch.testing.assert_close(queue.prototypes(), expected.prototypes(3))
        assert queue.seen().tolist() == [bool(places) for places in expected.places]


def test_parts_of_an_iteration_are_one_and_count_when_it_is_closed():
    whole, parted = ClassQueue(2, 3, 2), ClassQueue(2, 3, 2)
    boxes = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
    classes = torch.tensor([0, 1, 0])
    whole.add(whole.sum_by_class(boxes, classes))
    for row in (slice(2, 3), slice(0, 2)):
        parted.add(parted.sum_by_class(boxes[row], classes[row]))
    assert not parted.seen().any() and not parted.prototypes().any()
    for queue in (whole, parted):
        queue.close()
    assert whole.prototypes().tolist() == [[4.0, 6.5], [3.0, 5.0]]
    for name, value in whole.state_dict().items():
        assert torch.equal(parted.state_dict()[name], value), name


def test_iterations_without_a_class_leave_it_alone():
    queue = ClassQueue(2, 2, 1)
    _push(queue, [[1.0]], [0])
    for value in range(9):
        _push(queue, [[float(value)]], [1])
        queue.close()
    assert queue.prototypes().tolist() == [[1.0], [7.5]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_never_enter(bad):
    queue = ClassQueue(2, 4, 2)
    _push(queue, [[1.0, bad], [2.0, 4.0], [bad, bad]], [0, 0, 1])
    assert queue.prototypes().tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert queue.seen().tolist() == [True, False]


def test_prototypes_are_as_precise_under_autocast():
    queue = ClassQueue(2, 4, 2)
    _push(queue, [[1.001, 3.3], [2.0, 4.0]], [0, 1])
    expected = queue.prototypes()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(queue.prototypes(), expected)
