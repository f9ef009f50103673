import copy
from dataclasses import replace

import pytest
import torch
from fake_detector import LOSS_NAMES, NUM_CLASSES, FakeDetector
from fake_training import make_batch

from ssod.core.distributed import seed_step, step_generator
from ssod.core.filters import FixedThreshold
from ssod.core.method import Method, Step
from ssod.core.mixing import MixPL
from ssod.core.structures import PseudoLabels, Views
from ssod.core.teacher_student import TeacherStudent

SIZES = [(20, 30), (24, 16), (10, 10), (20, 30), (33, 12)]
MEAN = torch.tensor([120.0, 60.0, 33.0])
MOSAIC = {f"{name}_mosaic_unsup" for name in LOSS_NAMES}


class Tinted(FakeDetector):
    """Pads with a color of its own."""

    mean_color = MEAN


def _mixpl(**kwargs):
    return MixPL(Tinted(), **{"unlabeled_per_pass": 4, "unsup_box_losses": True} | kwargs)


def _labels(boxes, reliable=None):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    count = len(boxes)
    reliable = torch.tensor([True] * count if reliable is None else reliable, dtype=torch.bool)
    return PseudoLabels(
        boxes,
        torch.arange(count) % NUM_CLASSES,
        torch.rand(count),
        torch.rand(count) * reliable,
        torch.rand(count) * reliable,
        torch.rand(count, NUM_CLASSES + 1),
        reliable,
    )


def _random_labels(sizes, seed=0):
    """Two, three, ... boxes, and none in the third image; the first of each is undecided."""
    torch.manual_seed(seed)
    found = []
    for index, (height, width) in enumerate(sizes):
        corners = torch.rand(0 if index == 2 else index + 2, 2, 2).sort(1).values
        boxes = (corners * torch.tensor([width, height])).flatten(1)
        found.append(_labels(boxes.tolist(), [row > 0 for row in range(len(boxes))]))
    return found


def _views(images, to_strong=None):
    count = len(images)
    weak = [torch.zeros_like(image) for image in images]
    erased = [] if to_strong is None else [torch.ones(1, 4)] * count
    more = {"to_strong": to_strong, "erased": erased}
    return Views(weak, images, None, list(range(count)), **more)


def _plain_images(sizes):
    """Of one color each."""
    colors = [((40 * i + 5) % 256, (90 * i + 20) % 256, 255 - 50 * i) for i in range(len(sizes))]
    return [
        torch.tensor(color, dtype=torch.uint8)[:, None, None].repeat(1, *size)
        for color, size in zip(colors, sizes, strict=True)
    ]


def _fit(size, bounds):
    """The size of the largest image of the same aspect ratio, and the factor of each side."""
    scale = min(bounds[0] / size[0], bounds[1] / size[1])
    new = [round(side * scale) for side in size]
    return new, new[0] / size[0], new[1] / size[1]


def _corners(box):
    x1, y1, x2, y2 = box.tolist()
    return [(x1, y1), (x2, y1), (x1, y2), (x2, y2)]


def _around(points):
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def _mapped(point, matrix):
    x, y, _ = (matrix @ torch.tensor([*point, 1.0], dtype=torch.float64)).tolist()
    return x, y


def _mean_color_canvas(size):
    return MEAN.double()[:, None, None].repeat(1, *size)


# ---------------------------------------------------------------- mixup


@pytest.mark.parametrize("iteration", range(4))
def test_pixels_are_the_mean_of_both_images_and_of_the_mean_color_around_them(iteration):
    seed_step(0, iteration)
    images = _plain_images(SIZES)
    mixed, _ = _mixpl().mix(_views(images), _random_labels(SIZES))
    own, partner = mixed.layers
    bounds = (33, 30)
    for i, image in enumerate(mixed.strong):
        new, _, _ = _fit(SIZES[i - 1], bounds)
        size = [max(pair) for pair in zip(SIZES[i], new, strict=True)]
        assert image.shape == (3, *size) and image.dtype == torch.uint8
        x, y = own.matrices[i][:2, 2].tolist()
        # The right end of the image is its left one after the flip.
        right, top = partner.matrices[i][:2, 2].tolist()
        places = [(x, y, *SIZES[i], images[i]), (right - new[1], top, *new, images[i - 1])]
        expected = torch.zeros(3, *size, dtype=torch.float64)
        for left, start, height, width, source in places:
            assert left == int(left) and 0 <= left <= size[1] - width
            assert start == int(start) and 0 <= start <= size[0] - height
            part = _mean_color_canvas(size)
            for row in range(height):
                for column in range(width):
                    part[:, int(start) + row, int(left) + column] = source[:, 0, 0].double()
            expected += 0.5 * part
        assert (image.double() - expected).abs().max() <= 0.5


def test_partners_of_the_same_size_are_flipped_exactly():
    torch.manual_seed(0)
    images = [torch.randint(256, (3, 6, 9), dtype=torch.uint8) for _ in range(3)]
    mixed, _ = _mixpl().mix(_views(images), _random_labels([(6, 9)] * 3))
    for i, image in enumerate(mixed.strong):
        for row in range(6):
            for column in range(9):
                both = images[i][:, row, column], images[i - 1][:, row, 8 - column]
                mean = sum(value.double() for value in both) / 2
                assert (image[:, row, column].double() - mean).abs().max() <= 0.5


def test_boxes_of_both_go_where_their_corners_go_with_all_that_is_known_of_them():
    seed_step(0, 1)
    labels = _random_labels(SIZES)
    mixed, found = _mixpl().mix(_views(_plain_images(SIZES)), labels)
    own, partner = mixed.layers
    assert own.images == [0, 1, 2, 3, 4] and partner.images == [4, 0, 1, 2, 3]
    for i, label in enumerate(found):
        new, scale_y, scale_x = _fit(SIZES[i - 1], (33, 30))
        x, y = own.matrices[i][:2, 2].tolist()
        right, top = partner.matrices[i][:2, 2].tolist()
        expected = [_around([(a + x, b + y) for a, b in _corners(box)]) for box in labels[i].boxes]
        expected += [
            _around([(right - a * scale_x, top + b * scale_y) for a, b in _corners(box)])
            for box in labels[i - 1].boxes
        ]
        expected = torch.tensor(expected).reshape(-1, 4)
        torch.testing.assert_close(label.boxes, expected, rtol=0, atol=1e-4)
        assert label.layer.tolist() == [0] * len(labels[i]) + [1] * len(labels[i - 1])
        both = PseudoLabels.cat([labels[i], labels[i - 1]])
        for name in vars(both).keys() - {"boxes", "layer"}:
            assert torch.equal(getattr(label, name), getattr(both, name)), name
    assert sum((~label.reliable).sum() for label in found) == 8


def _rotations(count):
    """A slight rotation, scale and translation of each image."""
    angles = torch.linspace(-0.3, 0.4, count, dtype=torch.float64)
    matrices = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    for matrix, angle in zip(matrices, angles, strict=True):
        matrix[:2, :2] = 1.1 * torch.tensor(
            [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]
        )
        matrix[:2, 2] = torch.tensor([1.5, -0.75])
    return matrices


@pytest.mark.parametrize("has_matrices", [False, True])
def test_layers_lead_from_weak_views_to_the_mixed_one_and_back(has_matrices):
    seed_step(0, 2)
    to_strong = _rotations(len(SIZES)) if has_matrices else None
    labels = _random_labels(SIZES)
    if has_matrices:
        labels = [
            replace(
                label,
                found=label.boxes,
                boxes=torch.tensor(
                    [_around([_mapped(p, m) for p in _corners(box)]) for box in label.boxes]
                ).reshape(-1, 4),
            )
            for label, m in zip(labels, to_strong, strict=True)
        ]
    views = _views(_plain_images(SIZES), to_strong)
    mixed, found = _mixpl().mix(views, labels)
    assert mixed.to_strong is None and mixed.erased == [] and mixed.weak is views.weak
    num_boxes = 0
    for layer_index, layer in enumerate(mixed.layers):
        assert layer.matrices.shape == (5, 3, 3) and layer.matrices.dtype == torch.float64
        for label, matrix, image in zip(found, layer.matrices, mixed.strong, strict=True):
            own = label[label.layer == layer_index]
            for box, where in zip(own.boxes, own.found, strict=True):
                expected = _around([_mapped(point, matrix) for point in _corners(where)])
                limits = [image.shape[2], image.shape[1]] * 2
                expected = [min(max(v, 0), end) for v, end in zip(expected, limits, strict=True)]
                assert box.tolist() == pytest.approx(expected, abs=1e-4)
                num_boxes += 1
    assert num_boxes == 2 * sum(map(len, labels))
    step = Step(None, None, 0, None, unlabeled=mixed)
    if not has_matrices:
        for index, layer in enumerate(mixed.layers):
            boxes = [label.boxes[label.layer == index] for label in found]
            back = step.weak_boxes(layer, boxes)
            for actual, label in zip(back, found, strict=True):
                expected = label.found[label.layer == index]
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_bright_object_ends_up_in_its_box():
    seed_step(0, 3)
    boxes = [(3, 5, 15, 12), (2, 9, 9, 20), (1, 2, 8, 7), (11, 4, 29, 11), (3, 3, 11, 30)]
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in SIZES]
    for image, (x1, y1, x2, y2) in zip(images, boxes, strict=True):
        image[:, y1:y2, x1:x2] = 255
    method = MixPL(FakeDetector(), unlabeled_per_pass=4)  # the mean color is black
    labels = [_labels([list(map(float, box))]) for box in boxes]
    mixed, found = method.mix(_views(images), labels)
    mosaic, in_mosaic, _ = method.mosaic(_views(images), labels, False)
    assert len(in_mosaic) == 4
    for image, label in [*zip(mixed.strong, found, strict=True), (mosaic, in_mosaic)]:
        inside = torch.zeros(image.shape[1:], dtype=torch.bool)
        for x1, y1, x2, y2 in label.boxes.tolist():
            inside[int(y1 + 0.5) : int(y2 + 0.5), int(x1 + 0.5) : int(x2 + 0.5)] = True
        margin = torch.nn.functional.max_pool2d(inside[None].float(), 5, 1, 2)[0] > 0
        core = -torch.nn.functional.max_pool2d(-inside[None].float(), 5, 1, 2)[0] > 0
        assert core.any() and (image[0][core] > 110).all()
        assert (image[0][~margin] < 20).all()


def test_draws_are_of_the_iteration_and_shift_no_others():
    images, labels = _plain_images(SIZES), _random_labels(SIZES)

    def outputs(method, iteration):
        seed_step(7, iteration)
        before = torch.random.get_rng_state()
        mixed, found = method.mix(_views(images), labels)
        mosaic, moved, _ = method.mosaic(_views(images), labels, False)
        assert torch.equal(torch.random.get_rng_state(), before)
        boxes = [label.boxes for label in [*found, moved]]
        return [*mixed.strong, *(layer.matrices for layer in mixed.layers), mosaic, *boxes]

    method = _mixpl()
    first, other, again = (outputs(method, iteration) for iteration in (3, 4, 3))
    fresh = outputs(_mixpl(), 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, fresh, strict=True))
    assert not torch.equal(first[5], other[5]) and first[7].shape != other[7].shape


def test_generators_of_iterations_and_salts_differ():
    draws = set()
    for iteration in range(50):
        seed_step(1, iteration)
        draws |= {int(torch.randint(2**62, (), generator=step_generator(s))) for s in (1, 3, 99)}
    assert len(draws) == 150


# ---------------------------------------------------------------- mosaic


@pytest.mark.parametrize("iteration", range(6))
def test_the_mosaic_has_four_images_around_its_center(iteration):
    seed_step(0, iteration)
    images = _plain_images(SIZES)
    labels = _random_labels(SIZES)
    mosaic, found, _ = _mixpl().mosaic(_views(images), labels, False)
    height, width = (side // 2 for side in mosaic.shape[1:])
    expected, boxes = _mean_color_canvas(mosaic.shape[1:]), []
    # The cell that was drawn: nothing else gives these sizes to all of the images.
    cells = [
        (h, w)
        for h in range(10, 21)  # 0.3 and 0.6 of 33
        for w in range(10, 21)
        if [max(sides) for sides in zip(*(_fit(s, (h, w))[0] for s in SIZES[:4]), strict=True)]
        == [height, width]
    ]
    matches = []
    for cell in cells:
        expected, boxes = _mean_color_canvas(mosaic.shape[1:]), []
        for i in range(4):
            (h, w), scale_y, scale_x = _fit(SIZES[i], cell)
            x, y = width - w * (i % 2 == 0), height - h * (i < 2)
            expected[:, y : y + h, x : x + w] = images[i][:, :1, :1].double()
            for box in labels[i].boxes:
                points = [(x + w - a * scale_x, y + b * scale_y) for a, b in _corners(box)]
                boxes.append(_around(points))
        matches.append((mosaic.double() - expected).abs().max() <= 0.5)
        if matches[-1]:
            boxes = torch.tensor(boxes)
            large = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            torch.testing.assert_close(found.boxes, boxes[large], rtol=0, atol=1e-4)
            before = PseudoLabels.cat(labels[:4])[large]
            assert torch.equal(found.weights, before.weights)
            assert torch.equal(found.reliable, before.reliable)
            break
    assert any(matches)


def test_sizes_of_mosaics_are_within_the_published_range():
    images = [torch.zeros(3, 100, 100, dtype=torch.uint8)] * 4
    labels, sides = [_labels([[1.0, 2.0, 70.0, 80.0]])] * 4, set()
    for iteration in range(200):
        seed_step(0, iteration)
        sides.add(_mixpl().mosaic(_views(images), labels, False)[0].shape[1] // 2)
    assert min(sides) == 30 and 50 < max(sides) <= 60  # the smaller of two draws


def test_boxes_that_become_too_small_or_are_undecided_leave_the_mosaic():
    images = [torch.zeros(3, 50, 50, dtype=torch.uint8)] * 4
    boxes = [[0.0, 0.0, 1.0, 20.0], [0.0, 0.0, 20.0, 20.0], [5.0, 5.0, 30.0, 40.0]]
    labels = [_labels(boxes, [True, True, False])] * 4
    for drops, expected in ((False, [0, 1] * 4), (True, [1] * 4)):
        _, found, _ = _mixpl().mosaic(_views(images), labels, drops)
        assert len(found) == len(expected)
        assert ((found.boxes[:, 2:] - found.boxes[:, :2]) >= 1).all()
        undecided = 0 if drops else 4
        assert (~found.reliable).sum() == undecided
        assert (found.weights[~found.reliable] == 0).all()


# ---------------------------------------------------------------- in training


def _batch(seed=0):
    """Of four unlabeled images."""
    one, two = make_batch(seed), make_batch(seed + 100)
    names = ("weak", "strong", "image_ids")
    four = {n: (getattr(one.unlabeled, n) + getattr(two.unlabeled, n))[:4] for n in names}
    return replace(one, unlabeled=replace(one.unlabeled, **four))


def _model(method, labels=None, **kwargs):
    torch.manual_seed(0)
    model = TeacherStudent(
        FakeDetector(),
        labels or FixedThreshold(0.05),
        burn_in_iters=0,
        ema_decay=0.75,
        unsup_loss_weight=3.0,
        methods={"MIXPL": method} if method else {},
        **{"unsup_box_losses": True} | kwargs,
    )
    assert model.start_teacher_if_due()
    return model


def _losses(student, image, targets):
    detector = copy.deepcopy(student)
    with detector.fixed_norm_statistics():
        batch = detector.preprocess([image])
        return detector.losses(detector.features(batch), batch, [targets]).losses


@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("unsup_box_losses", [False, True])
def test_the_mosaic_of_unmixed_views_is_learned_with_its_weight(mixup, unsup_box_losses):
    method = MixPL(
        FakeDetector(),
        mixup=mixup,
        mosaic_weight=0.25,
        unsup_box_losses=unsup_box_losses,
        unlabeled_per_pass=4,
    )
    model = _model(method, unsup_box_losses=unsup_box_losses)
    batch = _batch()
    seed_step(0, 5)
    labels = model.pseudo_labels(batch.unlabeled.weak)
    image, found, _ = method.mosaic(_views(batch.unlabeled.strong), labels, False)
    losses = model(batch)
    statistics = [b.clone() for b in model.student.norm.buffers()]
    names = {"loss_cls", "loss_rpn_cls"} if not unsup_box_losses else LOSS_NAMES
    assert losses.keys() >= {f"{name}_mosaic_unsup" for name in names}
    assert len(losses) == 4 + 2 * len(names)
    # The labeled and the main forward have moved the statistics that it uses, and nothing since.
    expected = _losses(model.student, image, found.to_targets())
    for name in names:
        assert losses[f"{name}_mosaic_unsup"] > 0
        torch.testing.assert_close(losses[f"{name}_mosaic_unsup"], 3 * 0.25 * expected[name])
    model.zero_grad()
    losses["loss_rpn_cls_mosaic_unsup"].backward()
    assert model.student.body.weight.grad.abs().sum() > 0
    assert all(
        torch.equal(a, b) for a, b in zip(statistics, model.student.norm.buffers(), strict=True)
    )


def test_mixed_views_and_the_boxes_of_both_are_the_main_branchs():
    method = MixPL(FakeDetector(), unlabeled_per_pass=4, unsup_box_losses=True)
    model, batch = _model(method), _batch()
    labels = model.pseudo_labels(batch.unlabeled.weak)
    mixed, found = method.mix(_views(batch.unlabeled.strong), labels)
    student = copy.deepcopy(model.student)
    images = student.preprocess(mixed.strong)
    targets = [label.to_targets() for label in found]
    expected = student.losses(student.features(images), images, targets).losses
    losses = model(batch)
    for name in LOSS_NAMES:
        torch.testing.assert_close(losses[f"{name}_unsup"], 3 * expected[name])
    # Boxes are counted in the view of their own.
    num = sum(map(len, labels)) / 4
    assert float(model.metrics["pseudo/num_per_image"]) == pytest.approx(num)


def test_undecided_boxes_that_are_background_to_the_main_branch_are_so_in_the_mosaic():
    seen = []

    class Noting(MixPL):
        def mosaic(self, views, pseudo_labels, drops_undecided):
            image, found, is_learned = super().mosaic(views, pseudo_labels, drops_undecided)
            seen.append((drops_undecided, found))
            return image, found, is_learned

    found = PseudoLabels.cat(_model(None).pseudo_labels(_batch().unlabeled.weak))
    middle = float(found.scores.median())
    for labels in FixedThreshold(middle, undecided_thresh=0.05), FixedThreshold(0.05):
        model = _model(Noting(FakeDetector(), unlabeled_per_pass=4), labels)
        seed_step(0, 5)  # in smaller mosaics of such images no box is left
        model(_batch())
    (drops, few), (keeps, many) = seen
    assert (drops, keeps) == (True, False)
    assert few.reliable.all() and 0 < len(few) < len(many)


class Undecided(Method):
    """Learns no box, but keeps undecided ones from being background."""

    undecided = "main"


@pytest.mark.parametrize("undecided_thresh", [None, 0.0])
def test_a_mosaic_without_boxes_to_learn_is_zero_and_still_has_a_graph(undecided_thresh):
    method = MixPL(FakeDetector(), unlabeled_per_pass=4, unsup_box_losses=True)
    model = _model(method, FixedThreshold(1.0, undecided_thresh))
    model.methods["UNDECIDED"] = Undecided()
    losses = model(_batch())
    assert losses.keys() >= MOSAIC
    assert all(losses[name] == 0 and losses[name].requires_grad for name in MOSAIC)


def test_without_weights_it_does_nothing():
    method = MixPL(FakeDetector(), mixup=False, mosaic_weight=0.0, unlabeled_per_pass=1)
    losses, expected = _model(method)(_batch()), _model(None)(_batch())
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    assert not list(method.parameters()) and not method.state_dict()
