import copy
import io

import pytest
import torch
from fake_detector import LOSS_NAMES, FakeDetector
from fake_training import make_batch, train, trained, training_step

from ssod.core.filters import FixedThreshold
from ssod.core.method import Step
from ssod.core.strong_views import describe, leave_out_empty
from ssod.core.structures import PseudoLabels
from ssod.core.teacher_student import TeacherStudent

BOX_LOSSES = {"loss_box_reg", "loss_rpn_loc"}


class DownweightingFilter(FixedThreshold):
    """Keeps what `FixedThreshold` keeps, with weights below 1."""

    def forward(self, detections):
        labels = super().forward(detections)
        for label in labels:
            label.weights = label.scores / 2
            label.box_weights = label.scores / 4
        return labels


def _model(score_thresh=0.4, **kwargs):
    torch.manual_seed(0)
    arguments = {"burn_in_iters": 2, "ema_decay": 0.75, "unsup_loss_weight": 3.0}
    labels = DownweightingFilter(score_thresh)
    return TeacherStudent(FakeDetector(), labels, **{**arguments, **kwargs})


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def _detector_losses(detector, images, targets):
    """Losses of a copy of `detector`, so that its batch norm statistics stay."""
    detector = copy.deepcopy(detector)
    batch = detector.preprocess(images)
    return detector.losses(detector.features(batch), batch, targets).losses


def _pseudo_targets(model, images):
    """Targets from the teacher, without the code under test."""
    teacher = copy.deepcopy(model.teacher).eval()
    with torch.no_grad():
        batch = teacher.preprocess(images)
        detections = teacher.predict(teacher.features(batch), batch)
    return [labels.to_targets() for labels in model.pseudo_label_filter(detections)]


@pytest.mark.parametrize("unlabeled", [True, False])
def test_burn_in_learns_labeled_images_alone(unlabeled):
    model = _model()
    losses = model(make_batch(unlabeled=unlabeled))
    labeled = make_batch().labeled
    expected = _detector_losses(
        _model().student, labeled.strong + labeled.weak, labeled.targets * 2
    )
    assert losses.keys() == LOSS_NAMES
    _assert_equal(losses, expected)
    assert model.metrics == {}
    assert not model.uses_unlabeled


@pytest.mark.parametrize("views", ["strong", "weak"])
def test_one_view_of_labeled_images_can_be_chosen(views):
    labeled = make_batch().labeled
    expected = _detector_losses(_model().student, getattr(labeled, views), labeled.targets)
    _assert_equal(_model(labeled_views=views)(make_batch()), expected)


def test_teacher_becomes_a_copy_at_the_end_of_the_burn_in_and_not_before():
    model = _model(burn_in_iters=2)
    initial = _state(model.teacher)
    step = training_step(model)
    train(step, 1)
    assert not model.teacher_started
    _assert_equal(_state(model.teacher), initial)
    train(step, 1)
    assert model.teacher_started
    assert not torch.equal(model.student.body.weight, initial["body.weight"])
    _assert_equal(_state(model.teacher), _state(model.student))


@pytest.mark.parametrize("unsup_loss_weight", [0.0, 3.0])
def test_teacher_follows_the_ema_recurrence_after_the_burn_in(unsup_loss_weight):
    model = _model(burn_in_iters=1, unsup_loss_weight=unsup_loss_weight)
    step = training_step(model)
    train(step, 1)
    expected = {name: tensor.double() for name, tensor in _state(model.teacher).items()}
    for _ in range(4):
        train(step, 1)
        for name, tensor in _state(model.student).items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor.double()
    counter = "norm.num_batches_tracked"
    expected[counter] = model.student.norm.num_batches_tracked.double()
    for name, tensor in _state(model.teacher).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("burn_in_iters", [0, 2])
@pytest.mark.parametrize("ema_gamma", [1.5, 4.0])
def test_a_young_teacher_follows_faster(burn_in_iters, ema_gamma):
    model = _model(burn_in_iters=burn_in_iters, ema_decay=0.6, ema_gamma=ema_gamma)
    step = training_step(model)
    train(step, burn_in_iters)
    expected, decays = None, []
    for t in range(9):
        train(step, 1)
        decays.append(min(0.6, 1 - ema_gamma / (ema_gamma + t)))
        student = {name: tensor.double() for name, tensor in _state(model.student).items()}
        expected = student if t == 0 else expected
        for name, tensor in student.items():
            expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * tensor
        expected["norm.num_batches_tracked"] = student["norm.num_batches_tracked"]
        for name, tensor in _state(model.teacher).items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert decays[0] == 0 and 0 < decays[1] < decays[-1] == 0.6


def test_a_students_weight_is_a_power_of_its_iteration():
    model = _model(burn_in_iters=5, ema_decay=0.9999, ema_gamma=4.0)
    weights = []
    for model.iteration in range(5, 405):
        decay = model.current_decay
        weights = [decay * w for w in weights] + [1 - decay]
    assert sum(weights) == pytest.approx(1)
    # 300 is 3 / 4 of 400, whose weight is the last.
    assert weights[300] / weights[-1] == pytest.approx((3 / 4) ** 3, rel=0.02)


def test_the_schedule_counts_from_the_burn_in_that_a_run_is_resumed_with():
    model = trained(_model(burn_in_iters=3, ema_gamma=4.0), 2)
    state = copy.deepcopy(model.state_dict())
    for burn_in_iters, t in ((1, 1), (0, 2), (9, 0)):
        other = _model(burn_in_iters=burn_in_iters, ema_decay=0.9, ema_gamma=4.0)
        other.load_state_dict(state)
        assert other.current_decay == pytest.approx(t / (4 + t))


def test_unsupervised_losses_use_the_weak_view_of_the_teacher_and_the_strong_of_the_student():
    model = trained(_model(unsup_box_losses=True), 5)
    batch = make_batch(5)
    targets = _pseudo_targets(model, batch.unlabeled.weak)
    assert sum(len(t) for t in targets) > 0
    # The labeled forward comes first; batch norm in train mode does not depend on its statistics.
    expected = _detector_losses(model.student, batch.unlabeled.strong, targets)
    losses = model(batch)
    assert losses.keys() == LOSS_NAMES | {f"{name}_unsup" for name in LOSS_NAMES}
    for name in LOSS_NAMES:
        torch.testing.assert_close(losses[f"{name}_unsup"], 3.0 * expected[name])


@pytest.mark.parametrize("unsup_box_losses", [False, True])
def test_losses_sum_to_the_objective(unsup_box_losses):
    model = trained(_model(unsup_box_losses=unsup_box_losses), 3)
    batch = make_batch(3)
    labeled, unlabeled = batch.labeled, batch.unlabeled
    reference = copy.deepcopy(model.student)

    def reference_losses(images, targets):
        images = reference.preprocess(images)
        return reference.losses(reference.features(images), images, targets).losses

    supervised = reference_losses(labeled.strong + labeled.weak, labeled.targets * 2)
    pseudo = reference_losses(unlabeled.strong, _pseudo_targets(model, unlabeled.weak))
    kept = LOSS_NAMES if unsup_box_losses else LOSS_NAMES - BOX_LOSSES
    objective = sum(supervised.values()) + 3.0 * sum(pseudo[name] for name in kept)

    losses = model(batch)
    assert losses.keys() == LOSS_NAMES | {f"{name}_unsup" for name in kept}
    expected = torch.autograd.grad(objective, list(reference.parameters()))
    gradients = torch.autograd.grad(sum(losses.values()), list(model.student.parameters()))
    for gradient, reference_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference_gradient)


def test_weight_zero_needs_no_unlabeled_images_and_ignores_them():
    models = [trained(_model(unsup_loss_weight=0.0), 3) for _ in range(2)]
    losses = [m(make_batch(3, unlabeled=u)) for m, u in zip(models, (True, False), strict=True)]
    assert losses[0].keys() == LOSS_NAMES
    _assert_equal(losses[0], losses[1])
    assert models[0].metrics == {}


def test_missing_unlabeled_images_are_reported():
    model = trained(_model(burn_in_iters=1), 1)
    with pytest.raises(ValueError, match="iteration 1 is past SSOD.BURN_IN_ITERS 1 and needs"):
        model(make_batch(unlabeled=False))


@pytest.mark.parametrize("mode", [True, False])
def test_teacher_stays_in_eval_mode_and_the_rest_follows(mode):
    model = _model()
    model.train(mode)
    assert not any(module.training for module in model.teacher.modules())
    assert all(module.training == mode for module in model.student.modules())
    assert model.pseudo_label_filter.training == mode


def test_a_forward_pass_changes_nothing_of_the_teacher():
    model = trained(_model(), 3)
    before = _state(model.teacher)
    sum(model(make_batch(3)).values()).backward()
    _assert_equal(_state(model.teacher), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_with_burn_in_zero_weights_loaded_after_construction_reach_the_teacher():
    model = _model(burn_in_iters=0)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 0.125
    weights = _state(model.student)
    assert model.start_teacher_if_due()
    _assert_equal(_state(model.teacher), weights)
    assert "loss_cls_unsup" in model(make_batch())
    assert not model.start_teacher_if_due()


def test_a_teacher_that_has_not_started_is_reported():
    with pytest.raises(ValueError, match="has not started: call start_teacher_if_due before"):
        _model(burn_in_iters=0)(make_batch())


@pytest.mark.parametrize("saved_at", [1, 3, 5])
def test_resumed_run_equals_an_uninterrupted_one(saved_at):
    whole = training_step(_model(burn_in_iters=3))
    train(whole, saved_at)
    file = io.BytesIO()
    torch.save([whole.model.state_dict(), whole.state_dict()], file)
    file.seek(0)
    model_state, step_state = torch.load(file, weights_only=True)

    resumed = training_step(_model(burn_in_iters=3))
    resumed.model.load_state_dict(model_state)
    resumed.load_state_dict(step_state, "the file")
    model = resumed.model
    assert (model.iteration, model.teacher_started) == (saved_at, saved_at >= 3)
    for _ in range(saved_at, 7):
        assert train(resumed, 1) == train(whole, 1)
        _assert_equal(model.state_dict(), whole.model.state_dict())


def test_resuming_past_a_shortened_burn_in_copies_the_student_first():
    model = _model(burn_in_iters=1)
    model.load_state_dict(trained(_model(burn_in_iters=10), 2).state_dict())
    assert not model.teacher_started
    student = _state(model.student)
    training_step(model).prepare()
    assert model.teacher_started
    _assert_equal(_state(model.teacher), student)
    assert "loss_cls_unsup" in model(make_batch(2))


def test_metrics_describe_the_pseudo_labels():
    model = trained(_model(), 4)
    batch = make_batch(4)
    labels = model.pseudo_labels(batch.unlabeled.weak)
    scores = [score for label in labels for score in label.scores.tolist()]
    assert scores
    model(batch)
    expected = {
        "pseudo/num_per_image": len(scores) / 3,
        "pseudo/undecided_per_image": 0,
        "pseudo/score_per_image": sum(scores) / 3,
        "pseudo/weight_per_image": sum(scores) / 2 / 3,
        "pseudo/empty_images": sum(not len(label) for label in labels) / 3,
    }
    assert {name: float(value) for name, value in model.metrics.items()} == pytest.approx(expected)
    assert not any("loss" in name for name in model.metrics)
    assert not any(value.requires_grad for value in model.metrics.values())


def test_metrics_leave_undecided_boxes_out():
    # A weight that vanished is that of a box that is learned all the same.
    scores, weights = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([1.0, 0.0, 0.0])
    rest = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    reliable = torch.tensor([True, True, False])
    labels = PseudoLabels(*rest, scores, weights, weights, torch.zeros(3, 4), reliable)
    views = make_batch().unlabeled[:2]
    both = [labels, labels[:0]]
    step = Step(None, None, 0, None, unlabeled=views, pseudo_labels=both, learned=both)
    assert leave_out_empty(step, "background") == 1
    assert {name: float(value) for name, value in describe(step).items()} == {
        "pseudo/num_per_image": 1,
        "pseudo/undecided_per_image": 0.5,
        "pseudo/score_per_image": pytest.approx(0.85),
        "pseudo/weight_per_image": 0.5,
        "pseudo/empty_images": 0.5,
    }


def test_without_pseudo_labels_losses_and_metrics_are_finite():
    model = trained(_model(score_thresh=1.0, unsup_box_losses=True), 3)
    losses = model(make_batch(3))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.student.parameters())
    assert losses["loss_box_reg_unsup"] == 0
    assert model.metrics.pop("pseudo/empty_images") == 1
    assert [float(value) for value in model.metrics.values()] == [0.0] * 4


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("burn_in_iters", -1, "SSOD.BURN_IN_ITERS must be at least 0, got -1"),
        ("ema_decay", 1.0, r"SSOD.EMA_DECAY must be in \[0, 1\), got 1.0"),
        ("ema_decay", -0.1, r"SSOD.EMA_DECAY must be in \[0, 1\), got -0.1"),
        ("ema_gamma", -1.0, "SSOD.EMA_GAMMA must be finite and at least 0, got -1.0"),
        ("ema_gamma", float("nan"), "SSOD.EMA_GAMMA must be finite and at least 0, got nan"),
        ("ema_gamma", float("inf"), "SSOD.EMA_GAMMA must be finite and at least 0, got inf"),
        ("unsup_loss_weight", -1.0, "SSOD.UNSUP_LOSS_WEIGHT must be at least 0, got -1.0"),
        ("labeled_views", "all", "SSOD.LABELED_VIEWS must be one of .*'both'.*got 'all'"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(ValueError, match=message):
        _model(**{argument: value})
