"""The low-resolution branch on every host's adapter."""

import copy

import pytest
import torch
from torch.nn.functional import one_hot

from ssod.core.filters import FixedThreshold
from ssod.core.low_resolution import LowResolutionBranch
from ssod.core.method import Step
from ssod.core.structures import PseudoLabels, Targets, TwoStreamBatch, Views
from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError

NUM_CLASSES = 3
PIM = ("loss_cls_low_res", "loss_box_reg_low_res")


def _images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes
    ]


def _labels(boxes, weights):
    boxes, weights = torch.tensor(boxes).reshape(-1, 4), torch.tensor(weights)
    classes = torch.arange(len(boxes)) % NUM_CLASSES
    probs = one_hot(classes, NUM_CLASSES + 1).float()
    return PseudoLabels(boxes, classes, 0.6 * weights, weights, weights, probs, weights > 0)


LABELS = [
    _labels([[4.0, 6.0, 60.0, 50.0], [30.0, 10.0, 160.0, 150.0]], [1.0, 0.0]),
    _labels([[0.0, 0.0, 250.0, 240.0]], [0.0]),
]
NONE = [_labels([], []), _labels([], [])]


def _random_boxes(count, generator):
    """Boxes of 20 to 1,300 pixels, many of them far larger than the image."""
    side = 20 * 65 ** torch.rand(count, 2, generator=generator)
    corner = 100 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner - side / 4, corner + 3 * side / 4], 1)


def _step(detector, labels=LABELS, seed=3):
    """The record after the main branch."""
    batch = detector.preprocess(_images((256, 320), (256, 256)))
    features = detector.features(batch)
    torch.manual_seed(seed)
    main = detector.losses(features, batch, [p.to_targets() for p in labels])
    rest = {"pseudo_labels": labels, "batch": batch, "features": features, "main": main}
    return Step(detector, detector, 0, None, **rest)


def _scored(detector, monkeypatch):
    """The list that arguments of the region losses go into from now on."""
    scored, region_losses = [], detector.region_losses
    monkeypatch.setattr(
        detector, "region_losses", lambda *args: scored.append(args) or region_losses(*args)
    )
    return scored


def test_branch_on_the_full_images_own_levels_gives_the_main_logits(case, detector, monkeypatch):
    step = _step(detector)
    generator = torch.Generator().manual_seed(0)
    step.main.proposals = [_random_boxes(40, generator) for _ in LABELS]
    scored = _scored(detector, monkeypatch)
    monkeypatch.setattr(detector, "features", lambda small: case.shifted_pyramid(step.features))
    LowResolutionBranch(detector).losses(step)
    ((output, samples),) = scored
    expected = detector.score_regions(step.features, samples.boxes).logits
    levels = detector.levels(samples.boxes)
    assert set(levels.tolist()) == {2, 3, 4, 5}
    torch.testing.assert_close(output.logits[levels >= 3], expected[levels >= 3])
    assert not torch.allclose(output.logits[levels == 2], expected[levels == 2])


@pytest.mark.parametrize("labels", [LABELS, NONE, [LABELS[0], NONE[1]]], ids=["2+1", "0+0", "2+0"])
def test_losses_are_finite_and_connected(detector, labels):
    losses = LowResolutionBranch(detector).losses(_step(detector, labels))
    assert losses.keys() == {*PIM, "loss_distill"}
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    if labels is NONE:
        assert losses["loss_box_reg_low_res"] == losses["loss_distill"] == 0
    else:
        assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


def _detached(features):
    return {name: level.detach() for name, level in features.items()}


@pytest.mark.parametrize("route", ["small image", "full image"])
def test_each_loss_reaches_the_backbone_and_its_classifiers(case, detector, monkeypatch, route):
    """With the features of the other image cut off; the full image is only distilled."""
    branch = LowResolutionBranch(detector)
    weights = {
        "backbone": list(detector.backbone.parameters()),
        "main": [case.classifier(detector).weight],
        "aux": [branch.classifier.weight],
    }
    expected = {
        "loss_cls_low_res": {"backbone", "aux"} if route == "small image" else {"aux"},
        "loss_box_reg_low_res": {"backbone"} if route == "small image" else set(),
        "loss_distill": {"backbone", "main", "aux"},
    }
    step = _step(detector)
    if route == "small image":
        step.features = _detached(step.features)
    else:
        of_image = detector.features
        monkeypatch.setattr(detector, "features", lambda image: _detached(of_image(image)))
    losses = branch.losses(step)
    for name, reached in expected.items():
        found = set()
        for part, parameters in weights.items():
            options = {"retain_graph": True, "allow_unused": True}
            gradients = torch.autograd.grad(losses[name], parameters, **options)
            if any(g is not None and g.any() for g in gradients):
                found.add(part)
        assert found == reached, name


def test_distillation_compares_both_classifiers_on_the_same_regions(detector, monkeypatch):
    branch = LowResolutionBranch(detector)
    torch.manual_seed(1)
    torch.nn.init.normal_(branch.classifier.weight)  # far from the main one
    step = _step(detector)
    scored = _scored(detector, monkeypatch)
    loss = branch.losses(step)["loss_distill"]
    ((output, samples),) = scored
    small = detector.features(step.batch.half())
    aux = detector.score_regions(small, samples.boxes, stride_shift=1).embeddings
    aux = branch.classifier(aux).log_softmax(1)
    full = detector.score_regions(step.features, samples.boxes).logits.log_softmax(1)
    weights, starts = torch.zeros(len(full)), [0, len(samples.boxes[0])]
    for row, (label, match) in enumerate(zip(samples.classes, samples.matched, strict=True)):
        if label < NUM_CLASSES:
            weights[row] = 1 - LABELS[int(row >= starts[1])].weights[match]
    assert 1 < weights.sum() < len(weights) and weights[: starts[1]].any()
    expected = (weights * (aux.exp() * (aux - full)).sum(1)).sum() / len(full)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert output.logits.dtype == torch.float32


def _model(detector, branch, unsup_loss_weight=1.0):
    model = TeacherStudent(
        detector,
        FixedThreshold(0.9, 0.2),
        burn_in_iters=0,
        ema_decay=0.9,
        unsup_loss_weight=unsup_loss_weight,
        unsup_box_losses=True,
        methods={} if branch is None else {"LSM": branch},
    ).train()
    model.start_teacher_if_due()
    return model


def _batch():
    labeled, unlabeled = _images((64, 64), seed=1), _images((128, 128), seed=2)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 60.0]])
    targets = [Targets.from_ground_truth(boxes, torch.tensor([0, 2]), NUM_CLASSES)]
    return TwoStreamBatch(
        Views(labeled, labeled, targets, [1]), Views(unlabeled, unlabeled, None, [2]), []
    )


@pytest.mark.parametrize(("rpn_loss", "passes"), [(False, 2), (True, 3)])
def test_rpn_runs_once_more_only_if_it_is_trained_there(case, detector, rpn_loss, passes):
    model = _model(detector, LowResolutionBranch(detector, rpn_loss=rpn_loss))
    calls = []
    case.rpn_head(model.student).register_forward_hook(lambda *args: calls.append(1))
    losses = model(_batch())
    assert len(calls) == passes  # labeled images, unlabeled ones, and those at half the size
    assert ("loss_rpn_cls_low_res_unsup" in losses) == rpn_loss


def test_weight_zero_gives_exactly_the_gradients_of_the_mean_teacher(detector):
    gradients = []
    for branch in (None, LowResolutionBranch(detector, weight=0.0, distill_weight=0.0)):
        model = _model(copy.deepcopy(detector), branch)
        torch.manual_seed(3)
        losses = model(_batch())
        assert model.metrics["pseudo/num_per_image"] + model.metrics["pseudo/undecided_per_image"]
        sum(losses.values()).backward()
        gradients.append([p.grad for p in model.student.parameters()])
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_nothing_of_the_branch_remains_at_inference(case, detector):
    model = _model(detector, LowResolutionBranch(detector))
    expected = list(case.host_model(detector).state_dict())
    assert list(model.teacher.state_dict()) == list(model.student.state_dict()) == expected


def test_number_of_draws_changes_no_other_draw_of_a_step(detector):
    """With weight 0, after its own forward and seeded as parts of a batch are."""
    losses = []
    for branch in (None, LowResolutionBranch(detector, weight=0.0)):
        model = _model(copy.deepcopy(detector), branch)
        for part in range(2):
            torch.manual_seed(part)
            losses.append(model(_batch()))
    for expected, actual in zip(losses[:2], losses[2:], strict=True):
        for name, loss in expected.items():
            assert actual[name] == loss, name


@pytest.mark.parametrize("levels", [(3, 5), (2, 4)])
def test_other_levels_are_refused(detector, monkeypatch, levels):
    monkeypatch.setattr(detector, "levels", lambda boxes: torch.tensor(levels))
    message = f"SSOD.LSM needs regions pooled from levels 2 to 5, got {levels[0]} to {levels[1]}"
    with pytest.raises(InputError, match=message):
        LowResolutionBranch(detector)


def test_norms_of_the_box_head_keep_their_statistics(detector):
    head = detector.roi_heads.box_head
    norm = torch.nn.BatchNorm1d(detector.new_classifier().in_features)
    head.register_forward_hook(lambda module, inputs, output: norm(output))
    head.add_module("norm", norm)
    step = _step(detector)
    before = copy.deepcopy(norm.state_dict())
    LowResolutionBranch(detector).losses(step)
    assert norm.training
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bfloat16_losses_are_close_to_fp32(detector, monkeypatch):
    branch = LowResolutionBranch(detector)
    exact = branch.losses(_step(detector))
    scored = _scored(detector, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = branch.losses(_step(detector))
    assert [output.logits.dtype for output, _ in scored] == [torch.float32] * 2
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in rounded.values())
    for name, loss in exact.items():  # the regions differ slightly, as the proposals do
        torch.testing.assert_close(rounded[name], loss, rtol=0.3, atol=0.02)
