import io
import math
from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, NUM_CLASSES, FakeDetector
from fake_training import make_images, train, training_step
from test_filters import HostReads

from ssod.core.daso import DASO, OBSERVE_PERIOD, similarity_probs
from ssod.core.filters import FixedThreshold
from ssod.core.method import Method, Step
from ssod.core.structures import PseudoLabels, Targets, Views
from ssod.core.teacher_student import TeacherStudent

BURN_IN = 1
# Two iterations have 18 boxes at most, of the 20 that a window needs.
ACTIVE = {"delay": 2, "window": 2, "pool_floor": 0.3, "t_dist": 1.5, "t_proto": 0.3}


class Spy(Method):
    """Counts with Python numbers what the method of the same run should count."""

    group = "SPY"

    def __init__(self):
        super().__init__()
        self.pools, self.embeddings, self.steps = [], [], []

    def observe_labeled(self, step):
        if step.iterations < 0:
            return
        views = step.labeled.weak or step.labeled.strong
        for image, target in zip(views, step.labeled.targets, strict=True):
            features = step.teacher.features(step.teacher.preprocess([image]))
            for box, label in zip(target.boxes, target.classes.tolist(), strict=True):
                row = step.teacher.score_regions(features, [box[None]]).embeddings[0]
                self.embeddings.append((step.iterations, label, row.detach().double()))

    def metrics(self, step):
        counts = [0] * NUM_CLASSES
        for image in step.detections:
            rows = zip(image.class_probs, image.scores, image.classes, strict=True)
            for probs, score, label in rows:
                is_top = int(probs[:-1].argmax()) == int(label)
                counts[int(label)] += is_top and float(score) >= ACTIVE["pool_floor"]
        self.pools.append(counts)
        self.steps.append(replace(step))
        return {}


def _model(burn_in_iters=BURN_IN, **kwargs):
    torch.manual_seed(0)
    student = FakeDetector()
    with torch.no_grad():
        student.classifier.weight.mul_(12)
    methods = {"DASO": DASO(student, **ACTIVE | kwargs), "SPY": Spy()}
    return TeacherStudent(
        student,
        FixedThreshold(0.05),
        burn_in_iters=burn_in_iters,
        ema_decay=0.75,
        unsup_loss_weight=1.0,
        methods=methods,
    )


def _buffers(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


# ---------------------------------------------------------------- what is gathered in a run


def test_prototypes_are_means_of_what_the_teacher_sees_in_labeled_boxes():
    model = _model()
    train(training_step(model), BURN_IN + 7)
    method, spy = model.methods["DASO"], model.methods["SPY"]
    # Every fourth iteration alone, the last of which has begun to count.
    for label in range(NUM_CLASSES):
        own = [row for i, c, row in spy.embeddings if c == label and i in (0, OBSERVE_PERIOD)]
        expected = torch.stack(own).mean(0)
        torch.testing.assert_close(method.queue.prototypes()[label].double(), expected)
    assert method.labeled_counts.sum() == 2 * 3


@pytest.mark.parametrize(("least", "ages"), [(2, {3, 4}), (5, {5})], ids=["few boxes", "many"])
def test_counts_are_of_the_last_window_that_has_enough_boxes(least, ages):
    model = _model(window=least)
    method, spy = model.methods["DASO"], model.methods["SPY"]
    step = training_step(model)
    window, age, counts, last, closed = [0, 0], 0, [0, 0], [0, 0], []
    for iteration in range(BURN_IN + 25):
        if iteration > BURN_IN and age >= least and sum(window) >= 10 * NUM_CLASSES:
            last, counts, window = counts, window, [0, 0]
            closed.append(age)
            age = 0
        train(step, 1)
        pool = spy.pools[-1]
        window = [a + b for a, b in zip(window, pool, strict=True)]
        age += iteration >= BURN_IN
        assert method.window_counts.tolist() == window
        assert (method.counts.tolist(), method.last_counts.tolist()) == (counts, last)
    assert len(closed) > 2 and set(closed) <= ages
    assert min(map(sum, zip(*spy.pools[BURN_IN:], strict=True))) > 0  # of both classes


def test_nothing_happens_before_the_teacher_has_started():
    model = _model(burn_in_iters=6)
    step = training_step(model)
    before = _buffers(model.methods["DASO"])
    look, model.teacher.preprocess = model.teacher.preprocess, None
    train(step, 6)
    model.teacher.preprocess = look
    after = _buffers(model.methods["DASO"])
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.methods["DASO"].metrics(Step(model.student, model.teacher, -1, None)) == {}


def test_a_run_resumed_within_a_window_equals_an_uninterrupted_one():
    whole = _model(window=4)
    lines = train(training_step(whole), BURN_IN + 12)
    first = _model(window=4)
    step = training_step(first)
    train(step, BURN_IN + 7)
    assert 0 < first.methods["DASO"].window_age < 4 and first.methods["DASO"].coefficients().any()
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "step": step.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = _model(window=4)
    resumed.load_state_dict(saved["model"])
    assert torch.equal(resumed.methods["DASO"].coefficients(), first.methods["DASO"].coefficients())
    step = training_step(resumed)
    step.load_state_dict(saved["step"], "a test")
    assert train(step, 5) == lines[-5:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# ---------------------------------------------------------------- the blending


def _trained(iterations=8, **kwargs):
    model = _model(**kwargs)
    train(training_step(model), BURN_IN + iterations)
    return model


def _predictions(model, rescore):
    images = make_images(torch.Generator().manual_seed(9), 4)
    batch = model.teacher.preprocess(images)
    with torch.no_grad():
        return model.teacher.candidates(model.teacher.features(batch), batch, rescore)


def test_the_teachers_probabilities_are_blended_before_detections_are_chosen():
    model = _trained()
    method = model.methods["DASO"]
    counts = method.counts.copy_(torch.tensor([5.0, 9.0])).tolist()
    plain, blended = (_predictions(model, r) for r in (None, model.rescore))
    prototypes = method.queue.prototypes().tolist()
    assert {0, 1} <= set(plain.class_probs[:, :-1].argmax(1).tolist())
    for row, z, found in zip(
        plain.class_probs.tolist(),
        plain.output.embeddings.tolist(),
        blended.class_probs.tolist(),
        strict=True,
    ):
        k = row.index(max(row[:-1]))
        v = (counts[k] / max(counts)) ** (1 / 1.5)
        cosines = [
            sum(a * b for a, b in zip(z, p, strict=True)) / math.hypot(*z) / math.hypot(*p)
            for p in prototypes
        ]
        total = sum(math.exp(c / 0.3) for c in cosines)
        q = [math.exp(c / 0.3) / total for c in cosines]
        expected = [(1 - v) * p + v * (1 - row[-1]) * s for p, s in zip(row, q, strict=False)]
        assert found == pytest.approx([*expected, row[-1]], rel=1e-4)
    (step,) = model.methods["SPY"].steps[-1:]
    assert not torch.equal(step.candidates.class_probs, step.candidates.output.logits.softmax(1))


@pytest.mark.parametrize(
    "what", ["delay", "no window", "no prototype", "one prototype", "max_blend", "max_blend 0.25"]
)
def test_when_nothing_is_blended(what):
    arguments = {
        "delay": {"delay": 8},
        "no window": {"window": 99},
        "max_blend": {"max_blend": 0.0},
        "max_blend 0.25": {"max_blend": 0.25},
    }
    model = _trained(**arguments.get(what, {}))
    queue = model.methods["DASO"].queue
    if what.endswith("prototype"):
        queue.counts[: 2 if what.startswith("no") else 1] = 0
    plain, blended = (_predictions(model, r).class_probs for r in (None, model.rescore))
    if what == "max_blend 0.25":
        assert model.methods["DASO"].coefficients().max() == 0.25
        assert not torch.equal(plain, blended)
    else:
        assert torch.equal(plain, blended)


def test_a_class_without_a_prototype_keeps_its_probabilities():
    torch.manual_seed(0)
    detector = FakeDetector()
    detector.num_classes = 3
    method = DASO(detector, delay=0)
    method.queue.add(method.queue.sum_by_class(torch.eye(5)[:2], torch.tensor([0, 2])))
    method.queue.close()
    method.counts += torch.tensor([5.0, 9.0, 3.0])
    method.iterations = 0
    probs = torch.tensor([[0.2, 0.5, 0.1, 0.2], [0.5, 0.3, 0.1, 0.1]])
    found = method.rescore(probs, torch.eye(5)[[0, 1]])
    assert torch.equal(found[0], probs[0])
    assert not torch.equal(found[1], probs[1])
    # It gets nothing either, only what the linear classifier left it.
    v = (5 / 9) ** (1 / 0.3)
    assert found[1, 1].item() == pytest.approx((1 - v) * 0.3)


def test_eval_mode_changes_no_state():
    model = _trained().eval()
    before = _buffers(model)
    labels = model.pseudo_labels(make_images(torch.Generator().manual_seed(9), 4))
    assert sum(map(len, labels)) > 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# ---------------------------------------------------------------- the alignment


def _labels(scores, weights=None):
    scores = torch.tensor(scores)
    count = len(scores)
    weights = torch.ones(count) if weights is None else torch.tensor(weights)
    return PseudoLabels(
        boxes=BOXES[torch.arange(count) % len(BOXES)] + 0.25,
        classes=torch.arange(count) % NUM_CLASSES,
        scores=scores,
        weights=weights,
        box_weights=weights,
        class_probs=torch.full((count, NUM_CLASSES + 1), 1 / (NUM_CLASSES + 1)),
        reliable=weights > 0,
    )


def _step(labels, dropped=()):
    """The record after the main branch of images with these boxes, and some that it never saw."""
    torch.manual_seed(0)
    student, teacher = FakeDetector().train(), FakeDetector().eval()
    views = [make_images(torch.Generator().manual_seed(seed), len(labels)) for seed in (1, 2)]
    step = Step(student, teacher, 5, None, unlabeled=Views(*views, None, list(range(len(labels)))))
    with torch.no_grad():
        weak = teacher.preprocess(views[0])
        step.teacher_features = teacher.features(weak)
        step.candidates = teacher.candidates(step.teacher_features, weak)
        step.detections = teacher.suppress(step.candidates, weak)
    step.learned = labels
    step.pseudo_labels = [PseudoLabels.cat([*dropped, item]) for item in labels]
    step.batch = student.preprocess(views[1])
    step.features = student.features(step.batch)
    targets = [item.to_targets() for item in labels]
    step.main = student.losses(step.features, step.batch, targets)
    return step


def _method(num_known=2, **kwargs):
    method = DASO(FakeDetector(), **ACTIVE | kwargs)
    prototypes = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))[:num_known]
    method.queue.add(method.queue.sum_by_class(prototypes, torch.arange(num_known)))
    method.queue.close()
    method.iterations = 5
    return method


# `FakeDetector` matches the i-th region with the i-th box; the last region is background.
@pytest.mark.parametrize("with_dropped", [False, True])
def test_the_students_regions_are_aligned_with_the_boxes_of_the_pool(with_dropped):
    labels = [_labels([0.9, 0.2, 0.8]), _labels([]), _labels([0.4, 0.5, 0.3], [0.0, 1.0, 1.0])]
    step = _step(labels, [_labels([0.6])] if with_dropped else [])
    method = _method(weight=3.0)
    loss = method.losses(step)["loss_align"]
    expected = []
    for image, box in ((0, 0), (2, 0), (2, 1)):  # the undecided one included
        features = {"0": step.teacher_features["0"][image : image + 1]}
        z = step.teacher.score_regions(features, [labels[image].boxes[box][None]]).embeddings
        own = step.main.regions.embeddings[3 * image + box][None]
        p, q = (similarity_probs(e, method.queue.prototypes(), 0.3)[0] for e in (z, own))
        expected.append(-sum(a * math.log(b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
    assert loss.item() == pytest.approx(3 * sum(expected) / 3, rel=1e-5)
    loss.backward()
    assert step.student.body.weight.grad.any()
    assert all(p.grad is None for p in step.teacher.parameters())


def test_second_classes_of_a_region_and_low_scores_are_not_counted():
    method, step = _method(), _step([_labels([])])
    (found,) = step.detections
    step.detections = [
        replace(
            found,
            classes=torch.tensor([0, 1, 0]),
            scores=torch.tensor([0.3, 0.5, 0.29]),
            class_probs=torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]),
        )
    ]
    method.losses(step)
    assert method.window_counts.tolist() == [1, 0]


def test_background_regions_are_never_aligned():
    """Of the three regions of an image with one box of score 0, the last is background."""
    step = _step([_labels([0.0])])
    rows = torch.arange(2)
    step.main.regions.embeddings.retain_grad()
    _method(pool_floor=0.0).losses(step)["loss_align"].backward()
    grad = step.main.regions.embeddings.grad
    assert grad[rows].any(1).all() and not grad[2].any()


@pytest.mark.parametrize("what", ["no box", "low scores", "delay", "one prototype", "no prototype"])
def test_with_nothing_to_align_the_loss_is_a_connected_zero(what):
    scores = {"no box": [], "low scores": [0.1, 0.2]}.get(what, [0.9, 0.9])
    step = _step([_labels(scores), _labels([])])
    arguments = {"delay": {"delay": 6}, "one prototype": {"num_known": 1}}
    arguments["no prototype"] = {"num_known": 0}
    loss = _method(**arguments.get(what, {})).losses(step)["loss_align"]
    loss.backward()
    assert loss == 0
    assert torch.equal(step.student.body.weight.grad, torch.zeros_like(step.student.body.weight))


# ---------------------------------------------------------------- metrics, and cost


def test_metrics_describe_prototypes_counts_and_what_was_changed():
    method, step = _method(max_blend=0.5), _step([_labels([0.9])] * 3)
    method.counts += torch.tensor([6.0, 2.0])
    method.last_counts += torch.tensor([1.0, 3.0])
    method.labeled_counts += torch.tensor([3.0, 4.0])
    raw = step.candidates.output.logits.softmax(1)
    flipped = raw[:, [1, 0, 2]]
    keep = torch.arange(len(raw)) % 3 > 0
    step.candidates.class_probs = torch.where(keep[:, None], raw, flipped)
    metrics = method.metrics(step)
    assert all(v.shape == () and v.isfinite() for v in metrics.values())
    assert all(n.startswith("pseudo/daso_") and "loss" not in n for n in metrics)
    found = {name.removeprefix("pseudo/daso_"): float(value) for name, value in metrics.items()}
    a, b = method.queue.prototypes().tolist()
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    pool = (raw[:, :-1].max(1).values >= ACTIVE["pool_floor"]).tolist()
    changed = sum(p and not k for p, k in zip(pool, keep.tolist(), strict=True))
    labeled, counts = (4 / 9, 5 / 9), (7 / 10, 3 / 10)
    assert found == pytest.approx(
        {
            "prototypes": 2,
            "prototype_cosine": cosine,
            "coefficient": (0.5 + (2 / 6) ** (1 / 1.5)) / 2,
            "changed": changed / sum(pool),
            "class_kl": sum(p * math.log(p / q) for p, q in zip(labeled, counts, strict=True)),
            "window_change": 0.5,
        },
        rel=1e-5,
    )
    assert 0 < changed < sum(pool)


def test_metrics_before_anything_is_known_are_zeros():
    metrics = DASO(FakeDetector()).metrics(_step([_labels([])]))
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0)


def test_the_host_never_waits_for_the_device():
    step = _step([_labels([0.9, 0.2, 0.8]), _labels([])])
    targets = [Targets.from_ground_truth(BOXES, torch.tensor([0, 1, 1]), NUM_CLASSES)]
    images = make_images(torch.Generator().manual_seed(1), 1)
    step.labeled = Views(images, images, targets, [1])
    method = _method(num_known=2)
    method.iterations = 7
    step.iterations = 8
    with HostReads() as reads:
        method.observe_labeled(step)
        method.rescore(step.candidates.class_probs, step.candidates.output.embeddings)
        method.losses(step)
        method.metrics(step)
    assert reads.count == 0
