import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, LOSS_NAMES, NUM_CLASSES, FakeDetector
from fake_training import make_batch, train, training_step

from ssod.core.filters import FixedThreshold
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.method import Step
from ssod.core.structures import PseudoLabels, Targets
from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError

PIM = {"loss_cls_low_res", "loss_box_reg_low_res"}


def _detector(seed=0):
    torch.manual_seed(seed)
    detector = FakeDetector().train()
    with torch.no_grad():  # running statistics of a trained one
        detector.norm.running_mean.uniform_(-0.2, 0.2)
        detector.norm.running_var.uniform_(0.5, 1.5)
    return detector


def _images(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator))


def _labels(weights, seed=2):
    """Boxes of random places and classes that the main branch learns with these weights."""
    generator = torch.Generator().manual_seed(seed)
    count, weights = len(weights), torch.tensor(weights)
    corner = 2 * torch.rand(count, 2, generator=generator)
    return PseudoLabels(
        boxes=torch.cat([corner, corner + 1], 1),
        classes=torch.randint(NUM_CLASSES, (count,), generator=generator),
        scores=torch.full((count,), 0.6),
        weights=weights,
        box_weights=weights,
        class_probs=torch.rand(count, NUM_CLASSES + 1, generator=generator),
        reliable=weights > 0,
    )


LABELS = [_labels([1.0, 0.0], seed=2), _labels([0.25, 1.0, 0.0], seed=3)]


def _branch(seed=5, **kwargs):
    """A branch whose classifier is that of another detector."""
    torch.manual_seed(seed)
    return LowResolutionBranch(FakeDetector(), **kwargs)


def _step(detector, labels=LABELS):
    """The record after the main branch."""
    batch = detector.preprocess(_images())
    features = detector.features(batch)
    main = detector.losses(features, batch, [p.to_targets() for p in labels])
    rest = {"pseudo_labels": labels, "batch": batch, "features": features, "main": main}
    return Step(detector, detector, 0, None, **rest)


def _run(detector, branch, labels=LABELS):
    return branch.losses(_step(detector, labels))


def _assert_same(actual, expected, names=None):
    for name in expected if names is None else names:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)


def test_losses_are_the_students_own_on_the_small_image_and_all_boxes():
    detector = _detector()
    branch = _branch(weight=0.5)
    batch = detector.preprocess(_images())
    ones = [
        replace(p.to_targets(), weights=torch.ones(len(p)), box_weights=torch.ones(len(p)))
        for p in LABELS
    ]
    reference = _detector()
    reference.features(batch)  # of the main branch, which moves the running statistics
    reference.norm.eval()
    small = reference.features(batch.half())
    samples = reference.sample([BOXES, BOXES], ones)
    output = reference.score_regions(small, samples.boxes, stride_shift=1)
    output = replace(output, logits=branch.classifier(output.embeddings))
    expected = reference.region_losses(output, samples)
    losses = _run(detector, branch)
    assert losses.keys() == PIM | {"loss_distill"}
    torch.testing.assert_close(losses["loss_cls_low_res"], 0.5 * expected["loss_cls"])
    torch.testing.assert_close(losses["loss_box_reg_low_res"], 0.5 * expected["loss_box_reg"])


def test_distillation_pairs_both_classifiers_on_the_regions_of_low_boxes():
    detector = _detector()
    branch = _branch()
    losses = _run(detector, branch)
    batch = detector.preprocess(_images())
    detector = _detector()
    main = detector.score_regions(detector.features(batch), [BOXES, BOXES]).logits
    detector.eval()
    embeddings = detector.score_regions(detector.features(batch.half()), [BOXES, BOXES]).embeddings
    aux = branch.classifier(embeddings)
    # `FakeDetector` matches the i-th region with the i-th box; the last region is background.
    weights = torch.tensor([0.0, 1.0, 0.0, 0.75, 0.0, 0.0])
    kl = (aux.softmax(1) * (aux.log_softmax(1) - main.log_softmax(1))).sum(1)
    torch.testing.assert_close(losses["loss_distill"], (weights * kl).sum() / 6)
    assert losses["loss_distill"] > 0
    # Every other pairing gives another value, so the rows differ enough to tell.
    for other in (aux.roll(1, 0), aux.flip(0), aux.roll(3, 0)):
        kl = (other.softmax(1) * (other.log_softmax(1) - main.log_softmax(1))).sum(1)
        assert not torch.isclose(losses["loss_distill"], (weights * kl).sum() / 6, rtol=1e-3)


def test_weights_scale_their_own_losses_and_no_other():
    base = _run(_detector(), _branch())
    pim = _run(_detector(), _branch(weight=1.0))
    distilled = _run(_detector(), _branch(distill_weight=3.0))
    for name in PIM:
        torch.testing.assert_close(pim[name], 2 * base[name])
    _assert_same(pim, base, ["loss_distill"])
    torch.testing.assert_close(distilled["loss_distill"], 3 * base["loss_distill"])
    _assert_same(distilled, base, PIM)


def test_without_distillation_its_loss_is_left_out_and_the_others_stay():
    base = _run(_detector(), _branch())
    without = _run(_detector(), _branch(distill_weight=0.0))
    assert without.keys() == PIM
    _assert_same(without, base, PIM)


def test_head_main_scores_with_the_students_classifier():
    detector = _detector()
    branch = _branch()
    branch.start(detector, detector)
    copied = _run(_detector(), branch)
    main = _branch(head="main", unsup_box_losses=True)
    _assert_same(_run(_detector(), main), copied)
    assert not list(main.parameters())


def test_head_main_learns_coordinates_only_where_the_main_branch_does():
    losses = _run(_detector(), _branch(head="main"))
    with_boxes = _run(_detector(), _branch(head="main", unsup_box_losses=True))
    assert losses.keys() == with_boxes.keys() - {"loss_box_reg_low_res"}
    _assert_same(losses, with_boxes, losses)
    _assert_same(_run(_detector(), _branch(unsup_box_losses=True)), _run(_detector(), _branch()))


def test_head_starts_as_a_copy_and_draws_nothing():
    detector, branch = _detector(), _branch()
    assert not torch.equal(branch.classifier.weight, detector.classifier.weight)
    state = torch.get_rng_state()
    branch.start(detector, detector)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(branch.classifier.weight, detector.classifier.weight)
    assert torch.equal(branch.classifier.bias, detector.classifier.bias)
    assert branch.classifier.weight is not detector.classifier.weight


def test_rpn_losses_are_those_of_halved_boxes_on_the_small_image():
    names = ("loss_rpn_cls", "loss_rpn_loc")
    losses = _run(_detector(), _branch(rpn_loss=True, unsup_box_losses=True, weight=2.0))
    base = _run(_detector(), _branch(weight=2.0))
    _assert_same(losses, base, base)
    reference = _detector()
    batch = reference.preprocess(_images())
    reference.features(batch)  # of the main branch, which moves the running statistics
    reference.norm.eval()
    small = batch.half()
    halves = [Targets.from_ground_truth(p.boxes / 2, p.classes, NUM_CLASSES) for p in LABELS]
    _, expected = reference.propose(reference.features(small), small, halves)
    for name in names:
        torch.testing.assert_close(losses[f"{name}_low_res"], 2 * expected[name])
    only = _run(_detector(), _branch(rpn_loss=True))
    assert only.keys() == base.keys() | {"loss_rpn_cls_low_res"}


@pytest.mark.parametrize("levels", [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4)])
def test_levels_zero_the_weights_of_other_regions(levels):
    # Levels 2, 3 and 4 of the full image; the first is kept on level 2 of the small one.
    small = {2: 2, 3: 2, 4: 3}
    counts = [small[n] in levels for n in (2, 3, 4)]

    class Masked(FakeDetector):
        def region_losses(self, output, samples):
            mask = torch.tensor(counts * 2).float()
            samples = replace(
                samples, weights=samples.weights * mask, box_weights=samples.box_weights * mask
            )
            return super().region_losses(output, samples)

    branch = _branch(levels=levels)
    losses = _run(_detector(), branch)
    reference = _detector()
    reference.__class__ = Masked
    masked = _run(reference, _branch())
    _assert_same(losses, masked, PIM)
    if all(counts):
        _assert_same(losses, _run(_detector(), _branch()))
    # Of the two distilled regions one is of level 3, the other of level 2.
    kept = [n for n, distilled in ((3, counts[1]), (2, counts[0])) if distilled]
    assert (losses["loss_distill"] > 0) == bool(kept)


def test_the_main_branch_scores_only_regions_that_are_distilled():
    scored = []

    class Recording(FakeDetector):
        def score_regions(self, features, boxes, stride_shift=0):
            scored.append((stride_shift, [len(b) for b in boxes]))
            return super().score_regions(features, boxes, stride_shift)

    detector = _detector()
    detector.__class__ = Recording
    step = _step(detector)
    scored.clear()
    _branch().losses(step)
    # One region of each image belongs to a box that is not learned fully, see below.
    assert scored == [(1, [3, 3]), (0, [1, 1])]


def test_batch_norm_statistics_are_used_and_not_moved_by_the_small_image():
    detector = _detector()
    step = _step(detector)
    before = copy.deepcopy(detector.norm.state_dict())
    _branch().losses(step)
    for name, value in detector.norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert detector.norm.training


@pytest.mark.parametrize(
    "labels",
    [[_labels([]), _labels([])], [_labels([1.0]), _labels([1.0, 1.0])]],
    ids=["none", "sure"],
)
def test_without_low_boxes_distillation_is_a_zero_connected_to_both_heads(labels):
    detector = _detector()
    branch = _branch()
    losses = _run(detector, branch, labels)
    heads = [branch.classifier.weight, detector.classifier.weight]
    assert losses["loss_distill"] == 0
    gradients = torch.autograd.grad(losses["loss_distill"], heads, retain_graph=True)
    assert all((g == 0).all() for g in gradients)
    if not len(labels[0]):
        assert losses["loss_box_reg_low_res"] == 0
        assert losses["loss_box_reg_low_res"].requires_grad
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_idle_loss_is_zero_and_reaches_every_parameter():
    branch = _branch()
    loss = branch.idle_loss()
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in branch.parameters())
    assert _branch(head="main").idle_loss() == 0


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("weight", -0.5, "SSOD.LSM.WEIGHT must be at least 0, got -0.5"),
        ("distill_weight", -1.0, "SSOD.LSM.DISTILL_WEIGHT must be at least 0, got -1.0"),
        ("distill_weight", math.nan, "SSOD.LSM.DISTILL_WEIGHT must be at least 0, got nan"),
        ("head", "none", r"SSOD.LSM.HEAD must be one of \('aux', 'main'\), got 'none'"),
        ("levels", (), r"SSOD.LSM.LEVELS must be some of \(2, 3, 4\), got \(\)"),
        ("levels", (2, 5), r"SSOD.LSM.LEVELS must be some of \(2, 3, 4\), got \(2, 5\)"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        _branch(**{argument: value})


def test_a_student_with_other_levels_is_refused():
    class Coarse(FakeDetector):
        def levels(self, boxes):
            return super().levels(boxes).clamp(min=3)

    with pytest.raises(InputError, match="needs regions pooled from levels 2 to 5, got 3 to 5"):
        LowResolutionBranch(Coarse())


# With the rest of the training iteration


def _model(branch=None, labels=None, **kwargs):
    torch.manual_seed(0)
    arguments = {"burn_in_iters": 1, "ema_decay": 0.75, "unsup_loss_weight": 3.0} | kwargs
    labels = labels or FixedThreshold(0.9, 0.5)
    methods = {} if branch is None else {"LSM": branch}
    return TeacherStudent(_detector(), labels, methods=methods, **arguments)


def test_classifier_waits_for_the_burn_in_and_then_is_a_copy():
    branch = _branch()
    before = branch.classifier.weight.clone()
    model = _model(branch, burn_in_iters=3)
    step = training_step(model)
    for metrics in train(step, 2):
        assert {name for name in metrics if name.startswith("loss")} == LOSS_NAMES
    assert torch.equal(branch.classifier.weight, before)
    train(step, 1)
    assert torch.equal(branch.classifier.weight, model.student.classifier.weight)
    train(step, 1)
    assert not torch.equal(branch.classifier.weight, model.student.classifier.weight)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_optimizer_state_of_the_burn_in_is_forgotten(name):
    """As many zero gradients would leave Adam with steps that are many times too large."""
    model = _model(_branch(), burn_in_iters=30)
    step = training_step(model, "SSOD.OPTIMIZER", name)
    train(step, 30)
    parameter = model.methods.LSM.classifier.weight
    # The reference has never seen another gradient.
    fresh_parameter = torch.nn.Parameter(parameter.detach().clone())
    options = {"momentum": 0.9} if name == "SGD" else {}
    fresh = getattr(torch.optim, name)([fresh_parameter], lr=0.02, weight_decay=0.0, **options)
    for _ in range(3):
        train(step, 1)
        fresh_parameter.grad = parameter.grad.clone()
        assert fresh_parameter.grad.any()
        fresh.step()
        torch.testing.assert_close(parameter, fresh_parameter)


def test_weight_zero_gives_exactly_the_losses_and_weights_of_the_mean_teacher():
    branch = _branch(weight=0.0, distill_weight=0.0)
    models = [_model(branch), _model(labels=FixedThreshold(0.9))]
    for with_branch, expected in zip(*(train(training_step(m), 4) for m in models), strict=True):
        added = {name: v for name, v in with_branch.items() if "low_res" in name}
        assert not any(added.values())
        undecided = {"pseudo/undecided_per_image", "pseudo/empty_images"}
        rest = with_branch.keys() - added.keys() - undecided
        assert {n: with_branch[n] for n in rest} == {n: expected[n] for n in rest}
    assert added
    for name, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], value), name


def test_low_boxes_are_background_to_the_main_branch_or_ignored_by_it():
    def model(*labels, branch=None):
        model = _model(branch, FixedThreshold(*labels), burn_in_iters=0, unsup_box_losses=True)
        with torch.no_grad():  # the widest box scores best
            model.student.classifier.weight[0, -1] += 2
        model.start_teacher_if_due()
        return model

    batch = make_batch()
    scores = model(0.0).pseudo_labels(batch.unlabeled.weak)[0].scores
    high, low = scores[:2].mean().item(), scores[2].item() - 1e-3
    plain, background = model(high), model(high, low, branch=_branch())
    ignored = model(high, low, branch=_branch())
    ignored.pseudo_label_filter.drops_undecided = False
    expected, dropped, kept = (m(batch) for m in (plain, background, ignored))
    assert plain.metrics["pseudo/undecided_per_image"] == 0
    assert background.metrics["pseudo/undecided_per_image"] >= 1
    _assert_same(dropped, expected)
    assert kept["loss_cls_unsup"] != expected["loss_cls_unsup"]
    for name in ("loss_cls_low_res_unsup", "loss_box_reg_low_res_unsup", "loss_distill_unsup"):
        assert dropped[name] == kept[name] > 0


def test_losses_are_part_of_the_unsupervised_weight():
    models = [_model(_branch(), burn_in_iters=0, unsup_loss_weight=w) for w in (1.0, 4.0)]
    assert all(model.start_teacher_if_due() for model in models)
    losses = [model(make_batch()) for model in models]
    assert "loss_distill_unsup" in losses[0]
    for name in losses[0]:
        factor = 4 if name.endswith("_unsup") else 1
        torch.testing.assert_close(losses[1][name], factor * losses[0][name])


@pytest.mark.parametrize("saved_at", [1, 3])
def test_resumed_run_equals_an_uninterrupted_one(saved_at):
    whole = training_step(_model(_branch(), burn_in_iters=2))
    train(whole, saved_at)
    file = io.BytesIO()
    torch.save([whole.model.state_dict(), whole.state_dict()], file)
    file.seek(0)
    model_state, step_state = torch.load(file, weights_only=True)
    resumed = training_step(_model(_branch(seed=6), burn_in_iters=2))
    resumed.model.load_state_dict(model_state)
    resumed.load_state_dict(step_state, "the file")
    assert train(resumed, 3) == train(whole, 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_teacher_has_nothing_of_the_branch():
    model = _model(_branch())
    assert model.teacher.state_dict().keys() == FakeDetector().state_dict().keys()
    assert {n for n in model.state_dict() if n.startswith("methods.")} == {
        "methods.LSM.classifier.weight",
        "methods.LSM.classifier.bias",
    }
