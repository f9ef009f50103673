import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_detector import BOXES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, make_images, train, training_step

from ssod.core.adaptive_threshold import AdaptiveClassThreshold
from ssod.core.contrastive import (
    ClassAwareContrast,
    class_aware_contrastive_loss,
    contrastive_targets,
)
from ssod.core.filters import FixedThreshold
from ssod.core.method import Step
from ssod.core.soft_match import SoftMatchWeighting
from ssod.core.structures import PseudoLabels, Views
from ssod.core.teacher_student import TeacherStudent

CASES = json.loads((Path(__file__).parent / "data" / "worked_cases.json").read_text())
ANGLES = torch.tensor(CASES["C2_contrast"]["inputs"]["angles[sample][view]"], dtype=torch.float64)
VIEWS = torch.stack([ANGLES.cos(), ANGLES.sin()], 2).unbind(1)
MANY = range(8)

# ---------------------------------------------------------------- the two functions


def _inputs(name):
    inputs = CASES[name]["inputs"]
    scores = torch.tensor(inputs["prob"], dtype=torch.float64)
    return torch.tensor(inputs["labels"]), scores, inputs["T_push"]


def _random(seed, num, size=5):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, num, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num,), generator=generator)
    return *F.normalize(views, dim=2), labels, torch.rand(num, generator=generator).double()


def test_worked_case_of_the_targets():
    expected = torch.tensor(CASES["C1_targets"]["outputs"]["diag_one"], dtype=torch.float64)
    torch.testing.assert_close(contrastive_targets(*_inputs("C1_targets")), expected)


def test_worked_case_of_the_loss_and_its_gradient():
    expected = CASES["C2_contrast"]["outputs"]
    views = [view.clone().requires_grad_() for view in VIEWS]
    loss = class_aware_contrastive_loss(*views, contrastive_targets(*_inputs("C2_contrast")))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    gradient = torch.tensor(expected["grad_features[sample][view][dim]"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([view.grad for view in views], 1), gradient)


@pytest.mark.parametrize(
    ("labels", "push", "name"),
    [
        ([0, 1, 2, 3], None, "simclr"),
        ([0, 1, 2, 3], 0.9, "simclr"),
        ([0, 0, 1, 0], 0.99, "all_below_Tpush_0.99"),
    ],
)
def test_without_pairs_it_is_simclr_whatever_the_scores(labels, push, name):
    _, scores, _ = _inputs("C2_contrast")
    targets = contrastive_targets(torch.tensor(labels), scores, push)
    loss = class_aware_contrastive_loss(*VIEWS, targets)
    assert loss.item() == pytest.approx(CASES["C3_limits"]["outputs"][name], rel=1e-12)
    both = torch.cat(VIEWS)
    logits = (both @ both.T / 0.07).fill_diagonal_(-torch.inf)
    own = torch.arange(8).roll(4)
    torch.testing.assert_close(loss, F.cross_entropy(logits, own))


@pytest.mark.parametrize("seed", MANY)
def test_both_functions_equal_loops(seed):
    num, push, temperature = 1 + 3 * seed, (None, 0.3, 0.7)[seed % 3], (0.07, 0.2, 1.0)[seed % 3]
    view_a, view_b, labels, scores = _random(seed, num)
    targets = [
        [
            1.0 if i == j else p * q * (k == m) * (push is None or (p >= push and q >= push))
            for j, (q, m) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True))
        ]
        for i, (p, k) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True))
    ]
    both, total = [*view_a.tolist(), *view_b.tolist()], 0.0
    for i, anchor in enumerate(both):
        exps = [sum(x * y for x, y in zip(anchor, z, strict=True)) / temperature for z in both]
        log_sum = math.log(sum(math.exp(s) for j, s in enumerate(exps) if j != i))
        weights = [targets[i % num][j % num] * (j != i) for j in range(2 * num)]
        pulled = sum(w * (log_sum - s) for w, s in zip(weights, exps, strict=True))
        total += temperature / 0.07 * pulled / sum(weights)
    actual = contrastive_targets(labels, scores, push)
    torch.testing.assert_close(actual, torch.tensor(targets, dtype=torch.float64))
    loss = class_aware_contrastive_loss(view_a, view_b, actual, temperature)
    assert loss.item() == pytest.approx(total / (2 * num), rel=1e-10, abs=1e-12)


def test_the_random_cases_have_pairs_that_are_pulled_and_pairs_that_are_not():
    for seed in MANY[2:]:
        _, _, labels, scores = _random(seed, 1 + 3 * seed)
        others = contrastive_targets(labels, scores, 0.3).fill_diagonal_(0)
        assert others.any() and (others == 0).sum() > len(labels)


def test_embeddings_that_are_all_the_same_cost_the_logarithm_of_the_others():
    view = torch.ones(6, 1, dtype=torch.float64)
    targets = contrastive_targets(torch.tensor([0, 0, 0, 1, 1, 2]), torch.full((6,), 0.95))
    loss = class_aware_contrastive_loss(view, view, targets.double())
    assert loss.item() == pytest.approx(math.log(2 * 6 - 1))


def test_boxes_are_interchangeable():
    view_a, view_b, labels, scores = _random(3, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    losses = [
        class_aware_contrastive_loss(a, b, contrastive_targets(k, q, 0.3))
        for a, b, k, q in (
            (view_a, view_b, labels, scores),
            (view_b, view_a, labels, scores),
            (view_a[order], view_b[order], labels[order], scores[order]),
        )
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


@pytest.mark.parametrize("num", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_is_nothing_to_learn_without_another_box(num, dtype):
    view = torch.full((num, 4), 0.5, dtype=dtype, requires_grad=True)
    targets = contrastive_targets(torch.zeros(num).long(), torch.ones(num, dtype=dtype))
    assert targets.shape == (num, num) and targets.dtype == dtype
    loss = class_aware_contrastive_loss(view, view.detach(), targets)
    loss.backward()
    assert loss == 0 and loss.dtype == dtype
    assert view.grad is not None and not view.grad.any()


# ---------------------------------------------------------------- the method


def _labels(scores, classes=None, boxes=BOXES, weights=None):
    scores = torch.tensor(scores)
    rows = torch.arange(len(scores))
    weights = (scores > 0.7).float() if weights is None else torch.tensor(weights)
    return PseudoLabels(
        boxes=boxes[rows % len(boxes)],
        classes=rows % NUM_CLASSES if classes is None else torch.tensor(classes),
        scores=scores,
        weights=weights,
        box_weights=weights,
        class_probs=torch.full((len(scores), NUM_CLASSES + 1), 1 / (NUM_CLASSES + 1)),
        reliable=weights > 0,
    )


def _step(labels, iterations=10**6):
    """The record after the main branch."""
    torch.manual_seed(0)
    student, teacher = FakeDetector().train(), FakeDetector().eval()
    count = len(labels)
    weak, strong, second = (
        make_images(torch.Generator().manual_seed(seed), count) for seed in (1, 2, 3)
    )
    step = Step(student, teacher, iterations, None)
    step.unlabeled = Views(weak, strong, None, list(range(count)), second)
    with torch.no_grad():
        step.teacher_features = teacher.features(teacher.preprocess(weak))
    step.pseudo_labels = labels
    step.batch = student.preprocess(strong)
    step.features = student.features(step.batch)
    return step


def _method(step, **kwargs):
    torch.manual_seed(5)
    return ClassAwareContrast(step.student, **kwargs)


MIXED = [_labels([0.95, 0.6, 0.92]), _labels([0.99, 0.98]), _labels([])]


def _expected(method, step, rows, view_b, push):
    """The loss of these rows of each image."""
    kept = [p[torch.tensor(r).long()] for p, r in zip(step.pseudo_labels, rows, strict=True)]
    boxes = [p.boxes for p in kept]
    views = (
        method.projection(detector.score_regions(features, boxes).embeddings)
        for detector, features in ((step.student, step.features), view_b)
    )
    units = [view / view.norm(dim=1, keepdim=True) for view in views]
    pseudo = PseudoLabels.cat(kept)
    return class_aware_contrastive_loss(
        *units, contrastive_targets(pseudo.classes, pseudo.scores, push)
    )


@pytest.mark.parametrize("push", [0.5, 0.9, 1.0])
def test_the_loss_is_that_of_the_boxes_in_both_views(push):
    step = _step(MIXED)
    method = _method(step, weight=3.0, push_thresh=push)
    (name, loss), *none = method.losses(step).items()
    assert (name, none) == ("loss_contrast", [])
    rows = [[0, 1, 2], [0, 1], []]
    expected = _expected(method, step, rows, (step.teacher, step.teacher_features), push)
    torch.testing.assert_close(loss, 3 * expected)
    swapped = _expected(method, step, rows, (step.teacher, step.features), push)
    assert not torch.isclose(loss, 3 * swapped, rtol=1e-3)


def test_the_teachers_view_is_no_way_for_gradients():
    step = _step(MIXED)
    method = _method(step)
    method.losses(step)["loss_contrast"].backward()
    found = [p.grad.clone() for p in method.parameters()]
    assert all(p.grad is None for p in step.teacher.parameters())
    assert step.student.body.weight.grad.any()
    # Those of a loss in which the teacher's projections are numbers.
    method.zero_grad()
    with torch.no_grad():
        teacher = step.teacher.score_regions(step.teacher_features, [p.boxes for p in MIXED])
        view_b = F.normalize(method.projection(teacher.embeddings))
    student = step.student.score_regions(_step(MIXED).features, [p.boxes for p in MIXED])
    view_a = F.normalize(method.projection(student.embeddings))
    pseudo = PseudoLabels.cat(MIXED)
    targets = contrastive_targets(pseudo.classes, pseudo.scores, 0.9)
    (0.5 * class_aware_contrastive_loss(view_a, view_b, targets)).backward()
    torch.testing.assert_close(found, [p.grad for p in method.parameters()])


def test_a_second_strong_view_goes_through_the_student_with_gradients():
    step = _step(MIXED)
    method = _method(step, views="student", push_thresh=0.9)
    statistics = {n: b.clone() for n, b in step.student.named_buffers()}
    loss = method.losses(step)["loss_contrast"]
    assert all(torch.equal(b, statistics[n]) for n, b in step.student.named_buffers())
    student = step.student
    with student.fixed_norm_statistics():
        features = student.features(student.preprocess(step.unlabeled.second_strong))
    expected = _expected(method, step, [[0, 1, 2], [0, 1], []], (student, features), 0.9)
    torch.testing.assert_close(loss, 0.5 * expected)
    gradients = [
        torch.autograd.grad(value, student.body.weight, retain_graph=True)[0]
        for value in (loss, 0.5 * expected)
    ]
    torch.testing.assert_close(*gradients)
    # Without the second view's part it is another one.
    cut = {name: value.detach() for name, value in features.items()}
    half = 0.5 * _expected(method, step, [[0, 1, 2], [0, 1], []], (student, cut), 0.9)
    half = torch.autograd.grad(half, student.body.weight)[0]
    assert not torch.allclose(gradients[0], half, rtol=1e-2)


def test_of_several_classes_at_a_place_the_best_counts():
    near = torch.stack([BOXES[0], BOXES[0] + 0.05, BOXES[1]])
    step = _step([_labels([0.8, 0.9, 0.7], [0, 1, 0], near), _labels([0.85], [0], near)])
    method = _method(step)
    loss = method.losses(step)["loss_contrast"]
    assert method.metrics(step)["pseudo/contrast_boxes_per_image"] == 3 / 2
    expected = _expected(
        method, step, [[1, 2], [0]], (step.teacher, step.teacher_features), push=0.9
    )
    torch.testing.assert_close(loss, 0.5 * expected)


def test_the_best_boxes_of_all_images_are_compared():
    apart = torch.arange(50)[:, None] * torch.tensor([3.0, 0, 3, 0]) + torch.tensor([0.0, 0, 2, 2])
    scores = torch.linspace(0.5, 0.99, 100)[torch.randperm(100)]
    step = _step([_labels(part.tolist(), boxes=apart) for part in scores.split(50)])
    method = _method(step)
    loss = method.losses(step)["loss_contrast"]
    assert method.metrics(step)["pseudo/contrast_boxes_per_image"] == 32
    bound = scores.sort(descending=True)[0][63]
    rows = [torch.nonzero(part >= bound)[:, 0].tolist() for part in scores.split(50)]
    expected = _expected(method, step, rows, (step.teacher, step.teacher_features), push=0.9)
    torch.testing.assert_close(loss, 0.5 * expected)


@pytest.mark.parametrize("views", ["teacher", "student"])
@pytest.mark.parametrize("labels", [[[], []], [[0.9], []]], ids=["no box", "one box"])
def test_fewer_than_two_boxes_give_a_zero_and_gradients_of_zero(labels, views):
    step = _step([_labels(scores) for scores in labels])
    method = _method(step, views=views)
    loss = method.losses(step)["loss_contrast"]
    loss.backward()
    assert loss == 0
    for parameter in (*method.parameters(), step.student.body.weight):
        assert parameter.grad is not None and not parameter.grad.any()
    values = method.metrics(step)
    assert {n: v.item() for n, v in values.items() if "per_image" not in n} == {
        "pseudo/contrast_gap": pytest.approx(math.nan, nan_ok=True),
        "pseudo/contrast_other_class_cosine": pytest.approx(math.nan, nan_ok=True),
        "pseudo/contrast_share_with_pairs": 0,
    }


@pytest.mark.parametrize(
    ("iterations", "ramp_iters", "share"),
    [(0, 0, 1), (0, 4, 0.25), (2, 4, 0.75), (3, 4, 1), (10**6, 4, 1)],
)
def test_the_weight_rises_linearly(iterations, ramp_iters, share):
    step = _step(MIXED, iterations)
    whole = _method(step, ramp_iters=0).losses(step)["loss_contrast"]
    loss = _method(step, ramp_iters=ramp_iters).losses(step)["loss_contrast"]
    torch.testing.assert_close(loss, share * whole)


def test_metrics_equal_a_loop():
    step = _step(MIXED)
    method = _method(step, push_thresh=0.9)
    method.losses(step)
    boxes, pseudo = [p.boxes for p in MIXED], PseudoLabels.cat(MIXED)
    with torch.no_grad():
        view_a, view_b = (
            F.normalize(method.projection(d.score_regions(features, boxes).embeddings)).tolist()
            for d, features in (
                (step.student, step.features),
                (step.teacher, step.teacher_features),
            )
        )
    found = {True: [], False: []}
    paired = set()
    for i, j in [(i, j) for i in range(5) for j in range(5) if i != j]:
        is_same = bool(pseudo.classes[i] == pseudo.classes[j])
        found[is_same].append(sum(x * y for x, y in zip(view_a[i], view_b[j], strict=True)))
        if is_same and min(pseudo.scores[i], pseudo.scores[j]) >= 0.9:
            paired.add(i)
    same, different = (sum(found[key]) / len(found[key]) for key in (True, False))
    assert {n: v.item() for n, v in method.metrics(step).items()} == pytest.approx(
        {
            "pseudo/contrast_boxes_per_image": 5 / 3,
            "pseudo/contrast_gap": same - different,
            "pseudo/contrast_other_class_cosine": different,
            "pseudo/contrast_share_with_pairs": len(paired) / 5,
        },
        abs=1e-6,
    )
    assert len(paired) == 3  # not the box with a score of 0.6, nor the other of class 1


def test_boxes_of_one_class_have_no_gap():
    step = _step([_labels([0.95, 0.9], [0, 0])])
    method = _method(step)
    method.losses(step)
    values = method.metrics(step)
    names = ("pseudo/contrast_gap", "pseudo/contrast_other_class_cosine")
    assert all(math.isnan(values[name]) for name in names)
    assert values["pseudo/contrast_share_with_pairs"] == 1


def test_under_autocast_it_is_exactly_the_same():
    """The embeddings of `FakeDetector` are; nothing after them may be less precise."""
    step = _step(MIXED)
    method = _method(step)
    exact = method.losses(step)["loss_contrast"]
    described = method.metrics(step)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.losses(step)["loss_contrast"]
    assert torch.equal(loss, exact)
    assert method.metrics(step) == described


def test_weights_of_the_filter_do_not_matter():
    losses = []
    for weight in (0.0, 0.3, 1.0):
        step = _step([replace(p, weights=torch.full_like(p.weights, weight)) for p in MIXED])
        losses.append(_method(step).losses(step)["loss_contrast"])
    assert losses[0] == losses[1] == losses[2] > 0


def test_classes_come_apart():
    wide_or_not = _labels([0.95, 0.99], [0, 1], BOXES[[0, 2]])
    step = _step([wide_or_not] * 3)
    method = _method(step)
    optimizer = torch.optim.Adam([*method.parameters(), *step.student.parameters()], lr=0.03)
    found = []
    for _ in range(60):
        step.features = step.student.features(step.batch)
        loss = method.losses(step)["loss_contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((loss.item(), method.metrics(step)["pseudo/contrast_gap"].item()))
    (first, before), (last, after) = found[0], found[-1]
    # Five of a row's eleven others are to be equally near: it stays above the logarithm of 5.
    assert math.log(5) < last / 0.5 < math.log(11)
    assert last < first
    assert after > before + 0.3


# ---------------------------------------------------------------- in a training


def _model(labels, **kwargs):
    torch.manual_seed(0)
    student = FakeDetector()
    method = ClassAwareContrast(student, push_thresh=0.3, ramp_iters=2, **kwargs)
    return TeacherStudent(
        student,
        labels,
        burn_in_iters=1,
        ema_decay=0.9,
        unsup_loss_weight=2.0,
        methods={"CONTRASTIVE": method},
    )


def _adaptive():
    labels = AdaptiveClassThreshold(NUM_CLASSES, queue_images=8, refresh_period=1)
    labels.set_label_distribution(torch.tensor([30, 30]), num_labeled=10)
    return labels


@pytest.mark.parametrize(
    "labels",
    [
        lambda: FixedThreshold(0.6, 0.1),
        lambda: SoftMatchWeighting(NUM_CLASSES, pool_floor=0.0, alignment="none"),
        _adaptive,
    ],
    ids=["fixed", "SoftMatch", "ACT"],
)
def test_it_learns_with_every_filter(labels):
    model = _model(labels())
    step = training_step(model)
    train(step, 1)
    before = [p.detach().clone() for p in model.methods.parameters()]
    metrics = train(step, 3)
    assert all(line["loss_contrast_unsup"] > 0 for line in metrics)
    for old, new in zip(before, model.methods.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_undecided_boxes_are_compared():
    batch = make_batch()
    counts = []
    for undecided in (0.9, 0.0):
        model = _model(FixedThreshold(0.9, undecided))
        model.iteration = 1
        model.start_teacher_if_due()
        model(batch)
        counts.append(model.metrics["pseudo/contrast_boxes_per_image"].item())
    assert counts[0] < counts[1] == 3  # the fake detector's boxes, of any score


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_what_waits_for_the_end_of_the_burn_in_does_not_decay(optimizer):
    model = _model(FixedThreshold(0.6, 0.1))
    model.burn_in_iters = 4
    step = training_step(model, "SOLVER.WEIGHT_DECAY", 0.5, "SSOD.OPTIMIZER", optimizer)
    before = [p.detach().clone() for p in model.methods.parameters()]
    student = model.student.objectness.weight.detach().clone()
    train(step, 4)
    assert model.teacher_started
    assert not torch.equal(student, model.student.objectness.weight)
    parameters = list(model.methods.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    train(step, 1)
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    if optimizer == "AdamW":
        assert {int(step.optimizer.state[p]["step"]) for p in parameters} == {1}
