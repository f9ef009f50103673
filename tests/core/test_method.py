import copy
from dataclasses import replace

import pytest
import torch
from fake_detector import LOSS_NAMES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, train, training_step
from torch import nn

from ssod.core.filters import FixedThreshold
from ssod.core.method import Method, Step
from ssod.core.teacher_student import TeacherStudent

HOOKS = ["observe_labeled", "rescore", "mix", "reweight", "losses", "metrics"]
UNSUP = {f"{name}_unsup" for name in LOSS_NAMES}
WEIGHT = 3.0


class Idle(Method):
    """Overrides nothing."""

    group = "IDLE"


class Recorder(Method):
    """
    Overrides every hook: notes its arguments as they are at the call, and does something that can
    be told afterwards.
    """

    group = "RECORDER"

    def __init__(self, name="first", calls=None):
        super().__init__()
        self.name = name
        self.calls = [] if calls is None else calls
        self.scale = nn.Parameter(torch.ones(2))

    def _note(self, hook, *arguments):
        seen = [replace(a) if isinstance(a, Step) else a for a in arguments]
        self.calls.append((self.name, hook, seen))

    def start(self, student, teacher):
        self._note("start", student, teacher)

    def observe_labeled(self, step):
        self._note("observe_labeled", step)
        step.shared[self.name] = [step.iterations]

    def rescore(self, class_probs, embeddings):
        self._note("rescore", class_probs, embeddings)
        return class_probs.roll(1, 1)  # the last class, the background, becomes the first

    def mix(self, views, pseudo_labels):
        self._note("mix", views, pseudo_labels)
        strong = [255 - image for image in views.strong]
        return replace(views, strong=strong), [labels[:2] for labels in pseudo_labels]

    def reweight(self, step, samples, regions):
        self._note("reweight", step, samples, regions)
        step.shared[self.name].append("reweight")
        return replace(samples, weights=samples.weights / 2)

    def losses(self, step):
        self._note("losses", step)
        return {f"loss_{self.name}": (self.scale * step.main.regions.logits.mean()).sum()}

    def metrics(self, step):
        self._note("metrics")
        return {f"{self.name}/scale": self.scale.detach().sum()}

    def last(self, hook):
        """What the hook was given at its last call."""
        return [seen for name, h, seen in self.calls if (name, h) == (self.name, hook)][-1]


def _model(*methods, **kwargs):
    torch.manual_seed(0)
    arguments = {"burn_in_iters": 0, "ema_decay": 0.75, "unsup_loss_weight": WEIGHT}
    methods = {f"M{i}": method for i, method in enumerate(methods)}
    # A low threshold: classes of all three regions are learned.
    return TeacherStudent(
        FakeDetector(),
        FixedThreshold(0.05),
        methods=methods,
        **arguments | {"unsup_box_losses": True} | kwargs,
    )


def _started(*methods, **kwargs):
    model = _model(*methods, **kwargs)
    assert model.start_teacher_if_due()
    return model


def _losses(student, images, targets):
    """Of a copy, so that batch norm statistics stay."""
    detector = copy.deepcopy(student)
    batch = detector.preprocess(images)
    return detector.losses(detector.features(batch), batch, targets)


def _hooks(calls):
    return [(name, hook) for name, hook, _ in calls]


def test_hooks_of_an_iteration_are_called_in_order_and_start_once():
    method = Recorder()
    step = training_step(_model(method, burn_in_iters=2))
    train(step, 1)
    assert _hooks(method.calls) == [("first", "observe_labeled"), ("first", "metrics")]
    method.calls.clear()
    train(step, 1)
    burn_in = ["observe_labeled", "metrics"]
    assert [hook for _, hook in _hooks(method.calls)] == [*burn_in, "start"]
    for _ in range(2):
        method.calls.clear()
        train(step, 1)
        assert [hook for _, hook in _hooks(method.calls)] == HOOKS


def test_hooks_of_two_methods_are_called_in_their_order():
    calls = []
    model = _started(Recorder("first", calls), Recorder("second", calls))
    model(make_batch())
    hooks = ["start", *HOOKS]
    assert _hooks(calls) == [(name, hook) for hook in hooks for name in ("first", "second")]


def test_a_method_starts_with_a_teacher_that_is_a_copy():
    method = Recorder()

    def start(student, teacher):
        weights = zip(student.parameters(), teacher.parameters(), strict=True)
        seen.append(all(torch.equal(a, b) for a, b in weights))

    seen, method.start = [], start
    train(training_step(_model(method, burn_in_iters=2)), 3)
    assert seen == [True]


def test_the_record_is_filled_from_top_to_bottom():
    method = Recorder()
    model = _started(method)
    model.iteration = 5
    batch = make_batch()
    model(batch)
    (step,) = method.last("observe_labeled")
    assert (step.student, step.teacher, step.iterations) == (model.student, model.teacher, 5)
    assert step.labeled is batch.labeled
    assert len(step.labeled_batch) == 4  # strong and weak views
    assert torch.equal(
        step.labeled_batch.tensor,
        model.student.preprocess(batch.labeled.strong + batch.labeled.weak).tensor,
    )
    assert step.labeled_features["0"].shape == (4, 4, 4, 4)
    assert step.labeled_output.losses.keys() == LOSS_NAMES
    assert (step.unlabeled, step.batch, step.main) == (None, None, None)
    assert step.detections == step.pseudo_labels == []
    assert step.features == {}

    views, labels = method.last("mix")
    assert views is batch.unlabeled
    step, samples, regions = method.last("reweight")
    assert step.labeled_output.losses.keys() == LOSS_NAMES
    assert step.main is None
    assert [len(d) for d in step.detections] == [3] * 3
    assert [len(boxes) for boxes in step.candidates.boxes] == [3] * 3
    weak = model.teacher.preprocess(batch.unlabeled.weak)
    assert torch.equal(step.teacher_features["0"], model.teacher.features(weak)["0"])
    assert [len(p) for p in step.pseudo_labels] == [2] * 3  # of `mix`
    assert torch.equal(step.pseudo_labels[0].boxes, labels[0].boxes[:2])
    assert torch.equal(step.unlabeled.strong[0], 255 - batch.unlabeled.strong[0])
    assert torch.equal(step.batch.tensor, model.student.preprocess(step.unlabeled.strong).tensor)
    assert step.features["0"].shape == (3, 4, 4, 4)
    assert len(samples.weights) == len(regions.logits) == 9

    (step,) = method.last("losses")
    assert all(torch.equal(p.boxes, q.boxes[:2]) for p, q in zip(step.learned, labels, strict=True))
    probs, values = torch.eye(3), torch.zeros(3, 5)
    assert torch.equal(step.rescore(probs, values), probs.roll(1, 1))
    assert step.main.regions is regions
    assert step.main.losses.keys() == LOSS_NAMES
    assert torch.equal(step.main.samples.weights, samples.weights / 2)
    assert step.shared == {"first": [5, "reweight"]}


def test_what_is_shared_is_of_one_iteration():
    method = Recorder()
    model = _started(method)
    for iteration in range(2):
        model(make_batch())
        model.after_step()
        assert method.last("losses")[0].shared == {"first": [iteration, "reweight"]}


def test_burn_in_only_shows_the_labels_and_gives_every_parameter_a_gradient_of_zero():
    method, plain = Recorder(), _model(burn_in_iters=3)
    model = _model(method, burn_in_iters=3)
    losses = model(make_batch())
    expected = plain(make_batch())
    assert losses.keys() == expected.keys() == LOSS_NAMES
    assert all(torch.equal(losses[name], expected[name]) for name in LOSS_NAMES)
    sum(losses.values()).backward()
    assert method.scale.grad.tolist() == [0, 0]
    (step,) = method.last("observe_labeled")
    assert step.iterations == -3
    assert step.unlabeled is None
    assert model.metrics.keys() == {"first/scale"}
    assert {hook for _, hook in _hooks(method.calls)} == {"observe_labeled", "metrics"}


def test_a_run_on_labels_alone_is_like_a_burn_in():
    method = Recorder()
    losses = _started(method, unsup_loss_weight=0.0)(make_batch())
    sum(losses.values()).backward()
    assert losses.keys() == LOSS_NAMES
    assert method.scale.grad.tolist() == [0, 0]
    assert [hook for _, hook in _hooks(method.calls)] == ["start", "observe_labeled", "metrics"]


def test_rescored_probabilities_reach_the_filter():
    class Swapping(Idle):
        def rescore(self, class_probs, embeddings):
            seen.append((class_probs, embeddings))
            return class_probs[:, [1, 0, 2]]

    seen = []
    images = make_batch().unlabeled.weak
    plain, swapped = _started(), _started(Swapping())
    for expected, found in zip(
        plain.pseudo_labels(images), swapped.pseudo_labels(images), strict=True
    ):
        assert torch.equal(found.classes, 1 - expected.classes)
        assert torch.equal(found.class_probs, expected.class_probs[:, [1, 0, 2]])
    ((class_probs, embeddings),) = seen
    teacher = plain.teacher
    batch = teacher.preprocess(images)
    features = teacher.features(batch)
    output = teacher.score_regions(features, teacher.propose(features, batch)[0])
    torch.testing.assert_close(class_probs, output.logits.softmax(1))
    torch.testing.assert_close(embeddings, output.embeddings)
    assert not class_probs.requires_grad


def test_rescoring_goes_through_all_methods():
    calls = []
    first, second = Recorder("first", calls), Recorder("second", calls)
    _started(first, second)(make_batch())
    assert torch.equal(second.last("rescore")[0], first.last("rescore")[0].roll(1, 1))


def test_mixed_views_reach_the_student():
    class Mixing(Idle):
        def mix(self, views, pseudo_labels):
            images = [255 - image for image in views.strong]
            labels = [replace(p, classes=1 - p.classes) for p in pseudo_labels]
            return replace(views, strong=images[::-1]), labels[::-1]

    model, batch = _started(Mixing()), make_batch()
    labels = _started().pseudo_labels(batch.unlabeled.weak)
    assert sum(map(len, labels)) > 3
    targets = [replace(p, classes=1 - p.classes).to_targets() for p in labels[::-1]]
    images = [255 - image for image in batch.unlabeled.strong[::-1]]
    expected = _losses(model.student, images, targets).losses
    losses = model(batch)
    for name in LOSS_NAMES:
        torch.testing.assert_close(losses[f"{name}_unsup"], WEIGHT * expected[name])


def test_reweighted_samples_reach_the_region_losses_of_the_main_branch_alone():
    class Halving(Idle):
        def reweight(self, step, samples, regions):
            return replace(
                samples, weights=samples.weights / 2, box_weights=samples.box_weights / 4
            )

    expected, losses = _started()(make_batch()), _started(Halving(), Halving())(make_batch())
    assert losses.keys() == expected.keys() == LOSS_NAMES | UNSUP
    factors = {"loss_cls_unsup": 1 / 4, "loss_box_reg_unsup": 1 / 16}
    for name, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(losses[name], factors.get(name, 1) * loss)


def test_losses_and_metrics_are_added_under_their_names():
    method = Recorder()
    model = _started(method, Recorder("second"))
    losses = model(make_batch())
    assert losses.keys() == LOSS_NAMES | UNSUP | {"loss_first_unsup", "loss_second_unsup"}
    (step,) = method.last("losses")
    expected = WEIGHT * 2 * step.main.regions.logits.mean()
    torch.testing.assert_close(losses["loss_first_unsup"], expected)
    assert model.metrics["first/scale"] == model.metrics["second/scale"] == 2
    assert "pseudo/num_per_image" in model.metrics
    losses["loss_first_unsup"].backward()
    assert method.scale.grad.abs().sum() > 0
    assert model.student.body.weight.grad.abs().sum() > 0


def test_what_a_method_learns_is_trained_saved_and_not_averaged():
    method = Recorder()
    model = _model(method, burn_in_iters=1)
    step = training_step(model)
    train(step, 1)
    assert method.scale.tolist() == [1, 1]
    train(step, 1)
    assert (method.scale != 1).all()
    assert torch.equal(model.state_dict()["methods.M0.scale"], method.scale)
    assert not any("methods" in name for name in model.teacher.state_dict())


def test_a_method_that_does_nothing_changes_nothing():
    models = _model(burn_in_iters=2), _model(Idle(), burn_in_iters=2)
    plain, idle = (train(training_step(model), 5) for model in models)
    assert plain == idle
    assert "loss_cls_unsup" in plain[-1]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert Idle().idle_loss() == 0


@pytest.mark.parametrize("taken", ["loss_cls", "loss_first"])
def test_a_loss_of_a_name_that_is_taken_is_an_error(taken):
    class Greedy(Idle):
        def losses(self, step):
            return {taken: step.main.losses["loss_cls"]}

    with pytest.raises(AssertionError, match="M1 has losses of names that are taken"):
        _started(Recorder(), Greedy())(make_batch())


def test_hooks_do_nothing_by_default():
    method, batch = Idle(), make_batch()
    probs, labels = torch.rand(4, NUM_CLASSES + 1), []
    assert method.rescore(probs, torch.rand(4, 5)) is probs
    views, same = method.mix(batch.unlabeled, labels)
    assert views is batch.unlabeled and same is labels
    assert method.losses(None) == method.metrics(None) == {}
    assert method.reweight(None, labels, None) is labels
