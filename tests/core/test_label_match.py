import math
from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, make_images, train, training_step

from ssod.core.adaptive_threshold import AdaptiveClassThreshold
from ssod.core.filters import FixedThreshold
from ssod.core.label_match import LabelMatch, mine_reliable, self_assignment_loss
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.method import Step
from ssod.core.soft_match import SoftMatchWeighting
from ssod.core.structures import Detections, PseudoLabels, Views
from ssod.core.teacher_student import TeacherStudent

MANY = range(8)


def _random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- the two functions


@pytest.mark.parametrize("seed", MANY)
def test_self_assignment_equals_a_loop(seed):
    rows, classes, temperature = 1 + 7 * seed, 2 + seed, (0.5, 1.0, 2.0)[seed % 3]
    student, teacher = _random(seed, rows, classes), 3 * _random(seed + 50, rows, classes)
    weights, normalizer = _random(seed + 99, rows).abs(), 1.0 + seed
    expected = 0.0
    for s, t, w in zip(student.tolist(), teacher.tolist(), weights.tolist(), strict=True):
        sharp = [math.exp(x / temperature) for x in t]
        log_sum = math.log(sum(math.exp(x) for x in s))
        cross = sum(p / sum(sharp) * (log_sum - x) for p, x in zip(sharp, s, strict=True))
        expected += w * cross / normalizer
    actual = self_assignment_loss(student, teacher, weights, normalizer, temperature)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_self_assignment_teaches_the_student_alone():
    student, teacher = _random(0, 4, 3).requires_grad_(), _random(1, 4, 3).requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    self_assignment_loss(student, teacher, weights, 2.0).backward()
    assert teacher.grad is None
    # Of cross entropy: the weight times (q - p), p sharpened.
    expected = weights[:, None] * (student.softmax(1) - (teacher / 0.5).softmax(1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())


def test_self_assignment_without_regions_is_a_connected_zero():
    student = torch.zeros(0, 3, requires_grad=True)
    loss = self_assignment_loss(student, torch.zeros(0, 3), torch.zeros(0), 1.0)
    loss.backward()
    assert loss == 0 and student.grad is not None


@pytest.mark.parametrize("seed", MANY)
def test_mining_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(7, (40,), generator=generator)  # of 6 boxes, or none
    rows[rows == 5] = 4  # a box without regions
    level = torch.rand(7, 2, generator=generator) * 0.3 + 0.65
    scores, ious = (level[rows] + 0.02 * torch.randn(40, 2, generator=generator)).unbind(1)
    expected = []
    for box in range(6):
        own = [i for i, row in enumerate(rows.tolist()) if row == box]
        means = [sum(v[i].item() for i in own) / max(len(own), 1) for v in (scores, ious)]
        expected.append(bool(own) and min(means) >= 0.8)
    assert mine_reliable(scores, ious, rows, 6).tolist() == expected


def test_the_random_cases_of_mining_have_both_answers():
    found = []
    for seed in MANY:
        generator = torch.Generator().manual_seed(seed)
        torch.randint(7, (40,), generator=generator)
        found += (torch.rand(7, 2, generator=generator) * 0.3 + 0.65 >= 0.8).all(1).tolist()
    assert True in found and False in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_that_just_reach_their_bounds_are_mined(dtype):
    rows = torch.zeros(3, dtype=torch.int64)
    at, below = torch.full((3,), 0.7, dtype=dtype), torch.full((3,), 0.7 - 1e-5, dtype=dtype)
    assert mine_reliable(at, at, rows, 1, 0.7, 0.7).tolist() == [True]
    assert mine_reliable(below, at, rows, 1, 0.7, 0.7).tolist() == [False]
    assert mine_reliable(at, below, rows, 1, 0.7, 0.7).tolist() == [False]


def test_mining_of_nothing():
    none = torch.zeros(0)
    assert mine_reliable(none, none, none.long(), 2).tolist() == [False, False]
    assert mine_reliable(none, none, none.long(), 0).shape == (0,)


def test_scores_that_are_not_numbers_mine_nothing_and_spoil_no_other_box():
    scores = torch.tensor([0.9, math.nan, 0.9])
    assert mine_reliable(scores, scores, torch.tensor([0, 0, 1]), 2).tolist() == [False, True]


# ---------------------------------------------------------------- the method


def _labels(weights, boxes=BOXES):
    weights = torch.tensor(weights)
    count = len(weights)
    return PseudoLabels(
        boxes=boxes[torch.arange(count) % len(boxes)],
        classes=torch.arange(count) % NUM_CLASSES,
        scores=torch.full((count,), 0.6),
        weights=weights,
        box_weights=weights,
        class_probs=torch.full((count, NUM_CLASSES + 1), 1 / (NUM_CLASSES + 1)),
        reliable=weights > 0,
    )


def _detector(seed):
    torch.manual_seed(seed)
    return FakeDetector()


def _exact(teacher):
    """A teacher whose boxes are its regions, all of class 0."""
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
        teacher.classifier.bias[0] = 20
    return teacher


def _step(labels, teacher=None):
    """The record before the main branch, of images whose regions are those three `BOXES`."""
    student, teacher = _detector(0).train(), (teacher or _detector(1)).eval()
    views = [make_images(torch.Generator().manual_seed(seed), len(labels)) for seed in (1, 2)]
    step = Step(student, teacher, 0, None, unlabeled=Views(*views, None, list(range(len(labels)))))
    with torch.no_grad():
        batch = teacher.preprocess(step.unlabeled.weak)
        step.teacher_features = teacher.features(batch)
        step.candidates = teacher.candidates(step.teacher_features, batch)
    step.pseudo_labels = labels
    step.batch = student.preprocess(step.unlabeled.strong)
    step.features = student.features(step.batch)
    return step


def _run(method, step):
    """The main branch and the losses of the method."""
    targets = [labels.to_targets() for labels in step.pseudo_labels]

    def reweight(samples, regions):
        return method.reweight(step, samples, regions)

    step.main = step.student.losses(step.features, step.batch, targets, reweight)
    return method.losses(step)


# `FakeDetector` matches the i-th region with the i-th box; the last region is background.
def test_the_loss_is_that_of_the_regions_of_undecided_boxes():
    step = _step([_labels([1.0, 0.0, 1.0]), _labels([0.0, 0.25, 1.0])])
    (loss,) = _run(LabelMatch(weight=3.0, mining="none"), step).values()
    logits = step.main.regions.logits
    rows, weights = torch.tensor([1, 3, 4]), torch.tensor([1.0, 1.0, 0.75])
    teacher = step.teacher.score_regions(step.teacher_features, [BOXES, BOXES]).logits
    expected = self_assignment_loss(logits[rows], teacher[rows], weights, 6)
    torch.testing.assert_close(loss, 3 * expected)
    # Every other pairing gives another value.
    for other in (teacher.roll(1, 0), teacher.flip(0)):
        wrong = self_assignment_loss(logits[rows], other[rows], weights, 6)
        assert not torch.isclose(loss, 3 * wrong, rtol=1e-3)
    loss.backward()
    assert step.student.body.weight.grad.any()
    assert all(p.grad is None for p in step.teacher.parameters())


def test_the_teacher_scores_only_regions_that_need_it():
    step = _step([_labels([1.0, 0.0, 1.0]), _labels([1.0, 1.0]), _labels([])])
    scored = []
    score = step.teacher.score_regions
    step.teacher.score_regions = lambda features, boxes: (
        scored.append(boxes) or score(features, boxes)
    )
    _run(LabelMatch(), step)
    ((first, *others),) = scored
    assert torch.equal(first, BOXES[1:2])
    assert [len(boxes) for boxes in others] == [0, 0]


def test_the_matched_normalizer_counts_the_undecided_parts():
    labels = [_labels([1.0, 0.0, 1.0]), _labels([0.0, 0.25, 1.0])]
    sampled, matched = (
        _run(LabelMatch(normalizer=n, mining="none"), _step(labels))["loss_self_assign"]
        for n in ("sampled", "matched")
    )
    torch.testing.assert_close(matched, sampled * 6 / 2.75)


@pytest.mark.parametrize("mining", ["student", "teacher"])
def test_a_box_that_the_teacher_is_sure_of_is_learned_as_an_object(mining):
    labels = [_labels([1.0, 0.0, 0.0]), _labels([0.0, 0.0, 1.0])]
    step = _step(labels, _exact(_detector(1)))
    (loss,) = _run(LabelMatch(mining=mining), step).values()
    # The teacher says class 0: of image 0 the second box has class 1, and no region is of the
    # third; of image 1 the first is of class 0, the second is not.
    mined = [[False, False, mining == "teacher"], [True, False, False]]
    samples = step.main.samples
    assert samples.weights.tolist() == [1, 0, 1, 1, 0, 1]
    assert samples.box_weights.tolist() == [1, 0, 1, 1, 0, 1]
    for before, after, m in zip(labels, step.pseudo_labels, mined, strict=True):
        m = torch.tensor(m)
        assert torch.equal(after.reliable, before.reliable | m)
        assert torch.equal(after.weights, torch.where(m, 1, before.weights))
        assert torch.equal(after.boxes, before.boxes)
    assert labels[1].weights.tolist() == [0, 0, 1]  # what was given is not changed
    teacher = step.teacher.score_regions(step.teacher_features, [BOXES, BOXES]).logits
    rows = torch.tensor([1, 4])
    expected = self_assignment_loss(
        step.main.regions.logits[rows], teacher[rows], torch.ones(2), len(samples.classes)
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("mining", ["student", "teacher"])
@pytest.mark.parametrize("what", ["score", "place"])
def test_an_unsure_teacher_mines_nothing(mining, what):
    teacher = _exact(_detector(1))
    with torch.no_grad():
        if what == "score":
            teacher.classifier.bias[0] = 0  # a third for each
        else:
            teacher.box_deltas.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    step = _step([_labels([0.0, 0.0, 0.0])], teacher)
    _run(LabelMatch(mining=mining), step)
    assert step.main.samples.weights.tolist() == [0, 0, 1]
    assert not step.pseudo_labels[0].reliable.any()


def test_refined_boxes_are_clipped_to_the_image():
    """A box at the border is refined beyond it by a teacher that is right."""
    teacher = _exact(_detector(1))
    with torch.no_grad():
        teacher.box_deltas.bias.copy_(torch.tensor([-40.0, -40.0, 40.0, 40.0]))
    whole = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    step = _step([_labels([0.0, 0.0], boxes=whole)], teacher)
    _run(LabelMatch(), step)
    assert step.pseudo_labels[0].reliable.tolist() == [True, False]


@pytest.mark.parametrize("mining", ["student", "teacher", "none"])
@pytest.mark.parametrize(
    "weights",
    [[[], []], [[0.0], []], [[1.0], [1.0, 1.0]]],
    ids=["no box", "one region", "reliable"],
)
def test_with_nothing_to_assign_the_loss_is_a_connected_zero(mining, weights):
    """One box of one image: its only region is background here, the last one."""
    step = _step([_labels(w) for w in weights])
    step.student.propose = lambda f, b, t: ([BOXES[:1]] * 2, {})
    (loss,) = _run(LabelMatch(mining=mining), step).values()
    assert loss == 0
    loss.backward()
    assert torch.equal(step.student.body.weight.grad, torch.zeros_like(step.student.body.weight))
    metrics = LabelMatch(mining=mining).metrics(step)
    assert not any(metrics.values())


def test_proposals_of_the_teacher_that_overlap_no_box_enough_say_nothing():
    step = _step([_labels([0.0])], _exact(_detector(1)))  # two proposals are elsewhere
    _run(LabelMatch(mining="teacher"), step)
    assert step.pseudo_labels[0].reliable.tolist() == [True]


@pytest.mark.parametrize(("mining", "mined", "assigned"), [("student", 0.5, 1), ("teacher", 1, 1)])
def test_metrics_count_mined_boxes_and_assigned_regions(mining, mined, assigned):
    step = _step([_labels([1.0, 0.0, 0.0]), _labels([0.0, 0.0, 1.0])], _exact(_detector(1)))
    method = LabelMatch(mining=mining)
    assert method.metrics(step) == {}
    _run(method, step)
    assert {name: float(v) for name, v in method.metrics(step).items()} == {
        "pseudo/mined_per_image": mined,
        "pseudo/self_assigned_per_image": assigned,
    }


# ---------------------------------------------------------------- in the teacher-student


def _model(labels, *methods, **options):
    torch.manual_seed(0)
    options = {"burn_in_iters": 1, "ema_decay": 0.5, "unsup_loss_weight": 2.0} | options
    named = {type(method).__name__: method for method in methods}
    options["unsup_box_losses"] = True
    return TeacherStudent(FakeDetector(), labels, methods=named, **options)


@pytest.mark.parametrize("mining", ["student", "teacher"])
def test_with_reliable_boxes_alone_it_is_exactly_the_plain_filter(mining):
    models = _model(FixedThreshold(0.3), LabelMatch(mining=mining)), _model(FixedThreshold(0.3))
    lines = [train(training_step(model), 5) for model in models]
    for line in lines[0]:
        added = {n for n in line if "self_assign" in n or "mined" in n}
        assert all(line.pop(name) == 0 for name in added)
    assert lines[0] == lines[1]
    assert lines[1][-1]["pseudo/num_per_image"] > 0
    for name, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], value), name


@pytest.mark.parametrize(
    "labels",
    [
        lambda: FixedThreshold(0.99, 0.0),
        lambda: AdaptiveClassThreshold(NUM_CLASSES, reliable_fraction=0.0),
        lambda: SoftMatchWeighting(NUM_CLASSES, pool_floor=0.0),
    ],
    ids=["two thresholds", "ACT", "SoftMatch"],
)
def test_it_learns_with_every_filter(labels):
    model = _model(labels(), LabelMatch())
    model.pseudo_label_filter.set_label_distribution(torch.tensor([20, 10]), num_labeled=5)
    lines = train(training_step(model), 4)[1:]
    assert any(line["loss_self_assign_unsup"] > 0 for line in lines)
    plain = _model(labels())
    plain.pseudo_label_filter.set_label_distribution(torch.tensor([20, 10]), num_labeled=5)
    train(training_step(plain), 4)
    states = [m.student.state_dict() for m in (model, plain)]
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])


def test_undecided_boxes_of_two_thresholds_are_not_background_to_the_main_branch():
    with_it, without = (
        _model(FixedThreshold(0.99, 0.0), *methods, burn_in_iters=0)
        for methods in ([LabelMatch(mining="none")], [])
    )
    losses = []
    for model in (with_it, without):
        model.start_teacher_if_due()
        losses.append(model(make_batch()))
    assert losses[0]["loss_cls_unsup"] < losses[1]["loss_cls_unsup"]


def test_the_second_branch_does_not_distil_mined_boxes():
    step = _step([_labels([0.0, 0.0, 1.0])], _exact(_detector(1)))
    branch = LowResolutionBranch(_detector(3))
    _run(LabelMatch(), step)
    after = branch.losses(step)["loss_distill"]
    step.pseudo_labels = [_labels([1.0, 0.0, 1.0])]
    torch.testing.assert_close(after, branch.losses(step)["loss_distill"])
    step.pseudo_labels = [_labels([0.0, 0.0, 1.0])]
    assert branch.losses(step)["loss_distill"] > after


def test_reliable_and_undecided_boxes_are_as_many_as_labels_make_expect():
    """The invariant of LabelMatch: of B boxes a labeled image, B are kept and 0.2 B reliable."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.tensor([3.0, 1.5, 0.5])  # of each class, an image
    true = torch.poisson(frequency.expand(400, 3), generator=generator).long()
    labels = AdaptiveClassThreshold(3, queue_images=400, reliable_fraction=0.2)
    labels.set_label_distribution(true[:200].sum(0), num_labeled=200)
    images = []
    for counts in true[200:]:
        classes = torch.cat([torch.arange(3).repeat_interleave(counts), torch.arange(3).repeat(4)])
        scores = torch.rand(len(classes), generator=generator) ** 0.5
        scores[counts.sum() :] **= 4  # of false ones
        probs = torch.zeros(len(classes), 4)
        boxes = torch.zeros(len(classes), 4)
        images.append(Detections(boxes, scores, classes, probs, probs))
    labels(images)
    kept = PseudoLabels.cat(labels.eval()(images))
    boxes_per_image = true[:200].sum().item() / 200
    assert len(kept) / 200 == pytest.approx(boxes_per_image, rel=0.02)
    assert kept.reliable.sum().item() / 200 == pytest.approx(0.2 * boxes_per_image, rel=0.02)
    per_class = kept.classes.bincount(minlength=3)
    assert per_class.tolist() == true[:200].sum(0).tolist()


def test_samples_of_other_methods_keep_their_weights():
    step = _step([_labels([1.0, 0.0, 1.0])])
    method = LabelMatch()
    targets = [labels.to_targets() for labels in step.pseudo_labels]
    samples = step.student.sample([BOXES], targets)
    changed = replace(samples, weights=torch.tensor([0.5, 0.0, 0.25]))
    kept = method.reweight(step, changed, step.student.score_regions(step.features, [BOXES]))
    assert kept.weights.tolist() == [0.5, 0.0, 0.25]


@pytest.mark.parametrize("mining", ["student", "none"])
def test_regions_learn_what_other_methods_make_of_the_teachers_word(mining):
    """A teacher that is sure of class 0, of which another method makes class 1."""
    step = _step([_labels([0.0, 0.0])], _exact(_detector(1)))
    embeddings = []

    def rescore(class_probs, found):
        embeddings.append(found)
        return class_probs[:, [1, 0, 2]]

    step.rescore = rescore
    (loss,) = _run(LabelMatch(mining=mining), step).values()
    plain = step.teacher.score_regions(step.teacher_features, [BOXES[:2]])
    assert torch.equal(embeddings[0], plain.embeddings)
    # The first box is of class 0, the second of class 1, and is mined then.
    assert step.pseudo_labels[0].reliable.tolist() == [False, mining == "student"]
    rows = torch.arange(1 if mining == "student" else 2)
    logits = plain.logits[rows][:, [1, 0, 2]]
    expected = self_assignment_loss(
        step.main.regions.logits[rows], logits, torch.ones(len(rows)), 3
    )
    torch.testing.assert_close(loss, expected)
    wrong = self_assignment_loss(
        step.main.regions.logits[rows], plain.logits[rows], torch.ones(len(rows)), 3
    )
    assert not torch.isclose(loss, wrong, rtol=1e-3)
