import copy
import io
from dataclasses import replace

import pytest
import torch
from fake_detector import BOXES, NUM_CLASSES, FakeDetector

from ssod.core.filters import FixedThreshold
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.self_distillation import SelfDistillation
from ssod.core.structures import PseudoLabels, Targets, TwoStreamBatch, Views
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


def _branch(detector, distillation="default", classifier="own", seed=5, **kwargs):
    torch.manual_seed(seed)
    if distillation == "default":
        distillation = SelfDistillation()
    own = torch.nn.Linear(5, NUM_CLASSES + 1) if classifier == "own" else None
    return LowResolutionBranch(own, distillation, **kwargs)


def _run(detector, branch, labels=LABELS, iterations=100, num_images=2):
    batch = detector.preprocess(_images(num_images))
    features = detector.features(batch)
    main = detector.losses(features, batch, [p.to_targets() for p in labels])
    return branch(detector, batch, features, main, labels, iterations)


def _assert_same(actual, expected, names=None):
    for name in expected if names is None else names:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)


def test_losses_are_the_students_own_on_the_small_image_and_all_boxes():
    detector = _detector()
    branch = _branch(detector, weight=0.5)
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
    branch = _branch(detector)
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
    base = _run(_detector(), _branch(None))
    pim = _run(_detector(), _branch(None, weight=1.0))
    distilled = _run(_detector(), _branch(None, SelfDistillation(weight=3.0)))
    for name in PIM:
        torch.testing.assert_close(pim[name], 2 * base[name])
    _assert_same(pim, base, ["loss_distill"])
    torch.testing.assert_close(distilled["loss_distill"], 3 * base["loss_distill"])
    _assert_same(distilled, base, PIM)


def test_without_distillation_its_loss_is_left_out_and_the_others_stay():
    base, without = _run(_detector(), _branch(None)), _run(_detector(), _branch(None, None))
    assert without.keys() == PIM
    _assert_same(without, base, PIM)


def test_head_main_scores_with_the_students_classifier():
    detector = _detector()
    branch = _branch(detector)
    branch.start(detector)  # the copy is the main one
    copied = _run(_detector(), branch)
    main = _run(_detector(), _branch(None, classifier="main"))
    _assert_same(main, copied)
    assert not list(_branch(None, classifier="main").parameters())


def test_head_starts_as_a_copy_or_stays_random():
    detector = _detector()
    copied, random = _branch(detector), _branch(detector, head_init="random")
    before = copy.deepcopy(random.state_dict())
    state = torch.get_rng_state()
    for branch in (copied, random):
        branch.start(detector)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(copied.classifier.weight, detector.classifier.weight)
    assert torch.equal(copied.classifier.bias, detector.classifier.bias)
    assert torch.equal(random.classifier.weight, before["classifier.weight"])
    assert (random.classifier.bias == 0).all()
    assert 0 < random.classifier.weight.abs().max() < 0.1


def test_box_losses_of_reliable_boxes_are_those_of_the_main_branch():
    detector = _detector()
    base = _run(detector, _branch(None))
    reliable = _run(_detector(), _branch(None, box_loss="reliable"))
    none = _run(_detector(), _branch(None, box_loss="none"))
    _assert_same(reliable, base, ["loss_cls_low_res", "loss_distill"])
    assert 0 < reliable["loss_box_reg_low_res"] < base["loss_box_reg_low_res"]
    assert none.keys() == base.keys() - {"loss_box_reg_low_res"}
    _assert_same(none, base, none)
    sure = [_labels([1.0, 1.0], seed=2), _labels([1.0, 1.0, 1.0], seed=3)]
    same = [_run(_detector(), _branch(None, box_loss=b), sure) for b in ("all", "reliable")]
    _assert_same(*same)


def test_rpn_losses_are_those_of_halved_boxes_on_the_small_image():
    detector = _detector()
    names = ("loss_rpn_cls", "loss_rpn_loc")
    losses = _run(detector, _branch(None, rpn_losses=names, weight=2.0))
    base = _run(_detector(), _branch(None, weight=2.0))
    _assert_same(losses, base)
    reference = _detector()
    batch = reference.preprocess(_images())
    reference.features(batch)  # of the main branch, which moves the running statistics
    reference.norm.eval()
    small = batch.half()
    halves = [Targets.from_ground_truth(p.boxes / 2, p.classes, NUM_CLASSES) for p in LABELS]
    _, expected = reference.propose(reference.features(small), small, halves)
    for name in names:
        torch.testing.assert_close(losses[f"{name}_low_res"], 2 * expected[name])
    only = _run(_detector(), _branch(None, rpn_losses=("loss_rpn_cls",)))
    assert only.keys() == base.keys() | {"loss_rpn_cls_low_res"}


@pytest.mark.parametrize("levels", [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4)])
@pytest.mark.parametrize("drop", [False, True])
def test_levels_and_dropping_zero_the_weights_of_other_regions(levels, drop):
    # Levels 2, 3 and 4 of the full image; the first is kept on level 2 of the small one.
    small = {2: 2, 3: 2, 4: 3}
    counts = [small[n] in levels and not (drop and n == 2) for n in (2, 3, 4)]

    class Masked(FakeDetector):
        def region_losses(self, output, samples):
            mask = torch.tensor(counts * 2).float()
            samples = replace(
                samples, weights=samples.weights * mask, box_weights=samples.box_weights * mask
            )
            return super().region_losses(output, samples)

    branch = _branch(None, levels=levels, drop_unaligned=drop)
    losses = _run(_detector(), branch)
    reference = _detector()
    reference.__class__ = Masked
    masked = _run(reference, _branch(None))
    _assert_same(losses, masked, PIM)
    if all(counts):
        _assert_same(losses, _run(_detector(), _branch(None)))
    # Of the two distilled regions one is of level 3, the other of level 2.
    kept = [n for n, distilled in ((3, counts[1]), (2, counts[0])) if distilled]
    assert (losses["loss_distill"] > 0) == bool(kept)


def test_main_regions_are_labelled_anew_and_not_scored_again():
    detector = _detector()
    calls = []

    class Counting(FakeDetector):
        def score_regions(self, features, boxes, stride_shift=0):
            calls.append(stride_shift)
            return super().score_regions(features, boxes, stride_shift)

        def sample(self, proposals, targets):
            calls.append("sample")
            return super().sample(proposals, targets)

    detector.__class__ = Counting
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.2], [0.0, 1.5, 4.0, 4.0]])  # IoU 0.91 and 0.83
    label = replace(
        _labels([1.0, 0.0]), boxes=boxes, classes=torch.tensor([0, 1]), scores=torch.rand(2)
    )
    losses = _run(detector, _branch(None, proposals="main"), [label, _labels([])])
    assert calls == ["sample", 0, 1]  # of the main branch; of the small image
    matched = _run(
        _detector(), _branch(None, proposals="main", foreground_iou=0.85), [label, label]
    )
    apart = _run(_detector(), _branch(None, proposals="main", foreground_iou=0.95), [label, label])
    assert losses["loss_distill"] > 0
    # Without a match nothing is an object, so there are no boxes to learn and nothing to distil.
    assert matched["loss_box_reg_low_res"] > 0
    assert matched["loss_distill"] == 0  # the low box has an overlap of 0.83
    assert apart["loss_box_reg_low_res"] == 0


def test_small_image_is_the_mean_of_2x2_pixels():
    detector, seen = _detector(), []
    detector.body.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    _run(detector, _branch(None))
    full, small = seen
    torch.testing.assert_close(small[:, :, :2, :2], torch.nn.functional.avg_pool2d(full, 2))
    assert small[:, :, 2:].abs().sum() == small[:, :, :, 2:].abs().sum() == 0


@pytest.mark.parametrize(("iterations", "factor"), [(0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)])
def test_all_losses_grow_linearly(iterations, factor):
    base = _run(_detector(), _branch(None))
    ramped = _run(_detector(), _branch(None, ramp_iters=20), iterations=iterations)
    for name, loss in base.items():
        torch.testing.assert_close(ramped[name], factor * loss)


def test_batch_norm_statistics_are_used_and_not_moved_by_the_small_image():
    detector = _detector()
    batch = detector.preprocess(_images())
    features = detector.features(batch)
    main = detector.losses(features, batch, [p.to_targets() for p in LABELS])
    before = copy.deepcopy(detector.norm.state_dict())
    _branch(None)(detector, batch, features, main, LABELS, 0)
    for name, value in detector.norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert detector.norm.training


@pytest.mark.parametrize("proposals", ["rpn", "main"])
@pytest.mark.parametrize("norm", ["sampled", "distilled"])
@pytest.mark.parametrize(
    "labels",
    [[_labels([]), _labels([])], [_labels([1.0]), _labels([1.0, 1.0])]],
    ids=["none", "sure"],
)
def test_without_low_boxes_distillation_is_a_zero_connected_to_both_heads(labels, norm, proposals):
    detector = _detector()
    branch = _branch(detector, SelfDistillation(norm=norm), proposals=proposals)
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
    branch = _branch(None)
    loss = branch.idle_loss()
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in branch.parameters())
    assert _branch(None, classifier="main").idle_loss() == 0


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("weight", -0.5, "SSOD.LSM.WEIGHT must be at least 0, got -0.5"),
        ("ramp_iters", -1, "SSOD.LSM.RAMP_ITERS must be at least 0, got -1"),
        ("levels", (), r"SSOD.LSM.LEVELS must be some of \(2, 3, 4\), got \(\)"),
        ("levels", (2, 5), r"SSOD.LSM.LEVELS must be some of \(2, 3, 4\), got \(2, 5\)"),
        ("proposals", "all", "SSOD.LSM.PROPOSALS must be one of .*got 'all'"),
        ("interpolation", "cubic", "SSOD.LSM.INTERPOLATION must be one of .*got 'cubic'"),
        ("head_init", "zero", "SSOD.LSM.HEAD_INIT must be one of .*got 'zero'"),
        ("box_loss", "off", "SSOD.LSM.BOX_LOSS must be one of .*got 'off'"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        _branch(None, **{argument: value})


# With the rest of the training iteration


def _model(branch=None, labels=None, **kwargs):
    torch.manual_seed(0)
    arguments = {"burn_in_iters": 1, "ema_decay": 0.75, "unsup_loss_weight": 3.0} | kwargs
    labels = labels or FixedThreshold(0.9, 0.5)
    return TeacherStudent(_detector(), labels, low_resolution=branch, **arguments)


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Targets.from_ground_truth(
            torch.rand(count, 4, generator=generator),
            torch.randint(NUM_CLASSES, (count,), generator=generator),
            NUM_CLASSES,
        )
        for count in (1, 2)
    ]
    labeled = Views(_images(2, 7), _images(2, 8), targets, [1, 2])
    unlabeled = Views(_images(3, seed + 9), _images(3, seed + 90), None, [3, 4, 5])
    return TwoStreamBatch(labeled, unlabeled, [])


def _train(model, iterations, start=0):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    losses = {}
    for iteration in range(start, start + iterations):
        losses = model(_batch(iteration))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in trained), "DistributedDataParallel would fail"
        optimizer.step()
        model.after_step()
    return losses


def test_classifier_waits_for_the_burn_in_and_then_is_a_copy():
    branch = _branch(None)
    before = branch.classifier.weight.clone()
    model = _model(branch, burn_in_iters=3)
    losses = _train(model, 2)
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert torch.equal(branch.classifier.weight, before)
    _train(model, 1, start=2)
    assert torch.equal(branch.classifier.weight, model.student.classifier.weight)
    _train(model, 1, start=3)
    assert not torch.equal(branch.classifier.weight, model.student.classifier.weight)


def test_ramp_begins_at_the_end_of_the_burn_in():
    ramped, plain = (_model(_branch(None, ramp_iters=r), burn_in_iters=3) for r in (4, 0))
    for iteration in range(6):
        losses, expected = (model(_batch(iteration)) for model in (ramped, plain))
        for model in (ramped, plain):
            model.after_step()
        for name in ("loss_cls_low_res_unsup", "loss_distill_unsup"):
            assert (name in losses) == (iteration >= 3)
            if name in losses:
                factor = (iteration - 3) / 4
                torch.testing.assert_close(losses[name], factor * expected[name])


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_optimizer_state_of_the_burn_in_is_forgotten(optimizer):
    """As many zero gradients would leave Adam with steps that are many times too large."""
    model = _model(_branch(None), burn_in_iters=50)
    parameter = model.low_resolution.classifier.weight
    options = {"lr": 0.1, "weight_decay": 0.0}
    build = getattr(torch.optim, optimizer)
    used = build([parameter], **options | ({"momentum": 0.9} if optimizer == "SGD" else {}))
    for _ in range(50):
        parameter.grad = torch.zeros_like(parameter)
        used.step()
    model.reset_branch_state(used)
    fresh_parameter = torch.nn.Parameter(parameter.detach().clone())
    fresh = build([fresh_parameter], **options | ({"momentum": 0.9} if optimizer == "SGD" else {}))
    for _ in range(3):
        gradient = torch.randn_like(parameter)
        parameter.grad, fresh_parameter.grad = gradient, gradient.clone()
        used.step()
        fresh.step()
        torch.testing.assert_close(parameter, fresh_parameter)


@pytest.mark.parametrize("ramp_iters", [0, 10])
def test_weight_zero_gives_exactly_the_losses_and_weights_of_the_mean_teacher(ramp_iters):
    distillation = SelfDistillation(weight=0.0)
    branch = _branch(None, distillation, weight=0.0, ramp_iters=ramp_iters)
    with_branch, without = _model(branch), _model(labels=FixedThreshold(0.9))
    for iteration in range(4):
        losses = _train(with_branch, 1, iteration)
        expected = _train(without, 1, iteration)
        _assert_same(losses, expected)
        assert all(losses[name] == 0 for name in losses.keys() - expected.keys())
    for name, value in without.state_dict().items():
        assert torch.equal(with_branch.state_dict()[name], value), name


def test_low_boxes_are_background_to_the_main_branch_or_ignored_by_it():
    def model(*labels, branch=None):
        model = _model(branch, FixedThreshold(*labels), burn_in_iters=0, unsup_box_losses=True)
        with torch.no_grad():  # the widest box scores best
            model.student.classifier.weight[0, -1] += 2
        model.start_teacher_if_due()
        return model

    scores = model(0.0).pseudo_labels(_batch().unlabeled.weak)[0].scores
    high, low = scores[:2].mean().item(), scores[2].item() - 1e-3
    background = model(high, low, branch=_branch(None))
    ignored = model(high, low, True, branch=_branch(None))
    plain = model(high)
    labels = plain.pseudo_labels(_batch().unlabeled.weak)
    low = background.pseudo_labels(_batch().unlabeled.weak)
    assert (len(labels[0]), len(low[0])) == (1, 3)
    losses = [m.unsupervised_losses(_batch().unlabeled, low) for m in (background, ignored)]
    expected = plain.unsupervised_losses(_batch().unlabeled, labels)
    _assert_same(losses[0], expected)
    assert losses[1]["loss_cls_unsup"] != expected["loss_cls_unsup"]
    for name in ("loss_cls_low_res_unsup", "loss_box_reg_low_res_unsup", "loss_distill_unsup"):
        assert losses[0][name] == losses[1][name] > 0


def test_losses_are_part_of_the_unsupervised_weight():
    models = [_model(_branch(None), unsup_loss_weight=w) for w in (1.0, 4.0)]
    losses = []
    for model in models:
        model.iteration = 1
        model.start_teacher_if_due()
        losses.append(model(_batch()))
    for name in losses[0]:
        factor = 4 if name.endswith("_unsup") else 1
        torch.testing.assert_close(losses[1][name], factor * losses[0][name])


@pytest.mark.parametrize("saved_at", [1, 3])
def test_resumed_run_equals_an_uninterrupted_one(saved_at):
    whole = _model(_branch(None, ramp_iters=5), burn_in_iters=2)
    _train(whole, saved_at)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = _model(_branch(None, seed=6, ramp_iters=5), burn_in_iters=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    _assert_same(_train(resumed, 3, saved_at), _train(whole, 3, saved_at))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_teacher_has_nothing_of_the_branch():
    model = _model(_branch(None))
    assert model.teacher.state_dict().keys() == FakeDetector().state_dict().keys()
    assert any(name.startswith("low_resolution.") for name in model.state_dict())
