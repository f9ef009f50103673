"""The same assertions for every host's adapter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_area, box_iou

from ssod.core.filters import FixedThreshold
from ssod.core.method import Step
from ssod.core.structures import PseudoLabels, RegionSamples, Targets, TwoStreamBatch, Views
from ssod.core.teacher_student import TeacherStudent

NUM_CLASSES = 3


def _images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes
    ]


def _targets(*rows, weight=1.0):
    targets = []
    for boxes in rows:
        boxes = torch.tensor(boxes).reshape(-1, 4)
        classes = torch.arange(len(boxes)) % NUM_CLASSES
        target = Targets.from_ground_truth(boxes, classes, NUM_CLASSES)
        target.weights = torch.full((len(boxes),), weight)
        target.box_weights = torch.full((len(boxes),), weight)
        targets.append(target)
    return targets


TWO_BOXES = [[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 60.0]]
ONE_BOX = [[8.0, 8.0, 50.0, 44.0]]
NO_BOX: list = []


def _losses(detector, targets, seed=3):
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    torch.manual_seed(seed)
    return detector.losses(detector.features(batch), batch, targets)


def test_the_mean_color_is_what_padding_looks_like(detector):
    color = detector.mean_color
    image = color.round().to(torch.uint8)[:, None, None].repeat(1, 8, 8)
    # Within what rounding leaves, of values of which a step of one is 1/57 to 1.
    step = detector.preprocess([image + 1]).tensor - detector.preprocess([image]).tensor
    batch = detector.preprocess([image]).tensor[..., :8, :8]
    assert (batch.abs() <= 0.501 * step[..., :8, :8].abs()).all()
    assert color.shape == (3,) and color.unique().numel() == 3


def test_preprocess_pads_and_never_resizes(case, detector):
    images = _images((50, 64), (33, 40))
    batch = detector.preprocess(images)
    assert batch.sizes == [(50, 64), (33, 40)]
    assert batch.tensor.shape == (2, 3, 64, 64)
    # Normalisation is affine, so pixels must relate to the input linearly in every channel.
    for image, normalised in zip(images, batch.tensor, strict=True):
        inside = normalised[:, : image.shape[1], : image.shape[2]]
        for row, channel in enumerate(case.CHANNELS):
            pair = torch.stack([image[channel].float().flatten(), inside[row].flatten()])
            assert torch.corrcoef(pair)[0, 1] > 1 - 1e-5
    assert batch.tensor[1, :, 33:, :].abs().sum() == 0
    assert batch.tensor[1, :, :, 40:].abs().sum() == 0


@pytest.mark.parametrize(
    "rows", [(TWO_BOXES, ONE_BOX), (TWO_BOXES, NO_BOX), (NO_BOX, NO_BOX)], ids=["2+1", "2+0", "0+0"]
)
def test_weights_of_one_give_the_hosts_own_losses(case, detector, rows):
    targets = _targets(*rows)
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    expected = case.host_losses(detector, batch, targets, seed=3)
    actual = _losses(detector, targets, seed=3).losses
    assert actual.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss, rtol=1e-6, atol=1e-6, msg=name)


def test_weights_of_zero_leave_the_background_term_alone(detector):
    output = _losses(detector, _targets(TWO_BOXES, ONE_BOX, weight=0.0))
    background = output.samples.classes == NUM_CLASSES
    assert background.any() and not background.all()
    cross_entropy = F.cross_entropy(
        output.regions.logits[background], output.samples.classes[background], reduction="sum"
    )
    torch.testing.assert_close(output.losses["loss_cls"], cross_entropy / len(background))
    assert output.losses["loss_box_reg"] == 0
    assert output.losses["loss_rpn_loc"] == 0
    assert output.losses["loss_rpn_cls"] > 0


def test_losses_are_linear_in_the_weights_of_foreground(detector):
    low, middle, high = (
        _losses(detector, _targets(TWO_BOXES, ONE_BOX, weight=weight)).losses
        for weight in (0.5, 0.75, 1.0)  # all above the weight that the RPN ignores
    )
    for name in ("loss_cls", "loss_box_reg"):
        torch.testing.assert_close(middle[name], (low[name] + high[name]) / 2)
        assert high[name] != low[name]


def test_soft_labels_reach_the_classification_loss(detector):
    targets = _targets(TWO_BOXES, ONE_BOX)
    for target in targets:
        target.probs = torch.full_like(target.probs, 1 / (NUM_CLASSES + 1))
    output = _losses(detector, targets)
    foreground = output.samples.classes < NUM_CLASSES
    log_probs = output.regions.logits.log_softmax(1)
    rows = torch.where(foreground, -log_probs.mean(1), -log_probs[torch.arange(len(log_probs)), -1])
    torch.testing.assert_close(output.losses["loss_cls"], rows.mean())


def test_rpn_ignores_boxes_of_low_weight_instead_of_calling_them_background(case, detector):
    batch = detector.preprocess(_images((64, 64)))
    features = detector.features(batch)
    head = case.rpn_head(detector)
    logits: list = []
    handle = head.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[0]))

    def gradient_signs(targets):
        logits.clear()
        case.sample_every_anchor(detector)
        loss = detector.propose(features, batch, targets)[1]["loss_rpn_cls"]
        gradients = torch.autograd.grad(loss, logits[0])
        return torch.cat([g.flatten() for g in gradients]).sign()

    trusted = gradient_signs(_targets(ONE_BOX))
    ignored = gradient_signs(_targets(ONE_BOX, weight=0.0))
    handle.remove()
    # The loss pulls objects up (a negative gradient) and pushes background down.
    objects = trusted < 0
    assert objects.any()
    assert (ignored[objects] == 0).all()
    assert torch.equal(ignored[~objects], trusted[~objects])


def test_focal_gamma_reaches_the_classification_loss(detector):
    plain = _losses(detector, _targets(TWO_BOXES, ONE_BOX))
    detector.focal_gamma = 1.5
    focal = _losses(detector, _targets(TWO_BOXES, ONE_BOX)).losses["loss_cls"]
    cross_entropy = F.cross_entropy(plain.regions.logits, plain.samples.classes, reduction="none")
    expected = ((1 - (-cross_entropy).exp()) ** 1.5 * cross_entropy).mean()
    torch.testing.assert_close(focal, expected)


@pytest.mark.parametrize("rows", [(TWO_BOXES, NO_BOX), (NO_BOX, NO_BOX)])
def test_images_without_boxes_give_finite_connected_losses(detector, rows):
    losses = _losses(detector, _targets(*rows)).losses
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_sampled_regions_carry_their_own_images_targets(detector):
    targets = _targets(TWO_BOXES, ONE_BOX)
    targets[1].weights = torch.tensor([0.25])
    samples = _losses(detector, targets).samples
    start = 0
    for boxes, target in zip(samples.boxes, targets, strict=True):
        rows = slice(start, start + len(boxes))
        foreground = samples.classes[rows] < NUM_CLASSES
        matched = samples.matched[rows][foreground]
        torch.testing.assert_close(samples.gt_boxes[rows][foreground], target.boxes[matched])
        torch.testing.assert_close(samples.weights[rows][foreground], target.weights[matched])
        torch.testing.assert_close(samples.classes[rows][foreground], target.classes[matched])
        assert (samples.weights[rows][~foreground] == 1).all()
        start += len(boxes)
    assert start == len(samples.classes)


def _around(box, count, seed):
    """Regions that overlap a box by more than half."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(box) + 2 * torch.rand(count, 4, generator=generator)


@pytest.mark.parametrize("num_sure", [0, 3, 500])
def test_regions_of_weight_zero_take_the_places_that_are_left(detector, num_sure):
    """Regions that overlap both boxes, these more, are the first box's all the same."""
    boxes = [[4.0, 4.0, 44.0, 44.0], [4.0, 18.0, 44.0, 58.0]]
    generator = torch.Generator().manual_seed(0)
    corners = 60 + 20 * torch.rand(200, 2, generator=generator)
    nothing = torch.cat([corners, corners + 9], 1)
    sure, last = _around(boxes[0], num_sure, 1), _around(boxes[1], 500, 2)
    both = torch.tensor([[4.0, 12.0, 44.0, 52.0]])
    proposals = [torch.cat([sure, last, both, nothing])]
    (targets,) = _targets(boxes)
    quota = (detector.sample(proposals, [targets]).classes < NUM_CLASSES).sum().item()
    assert quota < 500
    targets.weights = torch.tensor([1.0, 0.0])
    samples = detector.sample(proposals, [targets])
    (drawn,) = samples.boxes
    overlaps = box_iou(targets.boxes, drawn)
    is_sure = overlaps[0] >= 0.5
    pool = torch.cat([*proposals, targets.boxes])
    matches_sure = box_iou(targets.boxes[:1], pool)[0] >= 0.5
    assert is_sure.sum() == min(quota, int(matches_sure.sum()))
    is_last = ~is_sure & (overlaps[1] >= 0.5)
    assert is_sure.sum() + is_last.sum() == quota
    expected = torch.full_like(samples.classes, NUM_CLASSES)
    expected[is_last], expected[is_sure] = 1, 0
    assert torch.equal(samples.classes, expected)
    assert torch.equal(samples.weights, (~is_last).float())
    assert matches_sure.sum() == num_sure + 2


@pytest.mark.parametrize("rescore", [None, lambda class_probs, embeddings: class_probs])
def test_predict_with_identity_rescoring_is_the_hosts_inference(case, detector, rescore):
    detector.eval()
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    with torch.no_grad():
        detections = detector.predict(detector.features(batch), batch, rescore)
    expected = case.host_inference(detector, batch)
    assert sum(len(d) for d in detections) > 0
    for found, (boxes, scores, classes) in zip(detections, expected, strict=True):
        torch.testing.assert_close(found.boxes, boxes)
        torch.testing.assert_close(found.scores, scores)
        assert torch.equal(found.classes, classes)
        rows = torch.arange(len(found))
        torch.testing.assert_close(found.class_probs[rows, found.classes], found.scores)
        torch.testing.assert_close(found.class_probs.sum(1), torch.ones(len(found)))
        assert (found.scores.diff() <= 0).all()


def test_rescoring_is_called_once_for_all_images_and_decides_the_scores(detector):
    detector.eval()
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    calls = []

    def only_class_one(class_probs, embeddings):
        calls.append((class_probs.shape, embeddings.shape))
        changed = torch.zeros_like(class_probs)
        changed[:, 1] = 0.9
        changed[:, -1] = 0.1
        return changed

    with torch.no_grad():
        features = detector.features(batch)
        proposals, _ = detector.propose(features, batch)
        detections = detector.predict(features, batch, only_class_one)
    regions = sum(len(p) for p in proposals)
    assert [call[0] for call in calls] == [(regions, NUM_CLASSES + 1)]
    assert calls[0][1][0] == regions
    for found in detections:
        assert len(found) > 0
        assert (found.classes == 1).all()
        torch.testing.assert_close(found.scores, torch.full((len(found),), 0.9))


class _MeanPyramid(torch.nn.Module):
    """A backbone whose level k is the image's mean over squares of 2**k pixels."""

    def __init__(self, names, channels):
        super().__init__()
        self.names, self.channels = names, channels

    def forward(self, x):
        gray = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        return {name: F.avg_pool2d(gray, 2**k) for k, name in enumerate(self.names, start=2)}


def test_half_size_image_gives_the_features_of_the_next_level(detector):
    """Level k - 1 of the half-size image equals level k here, so what is pooled must be equal."""
    batch = detector.preprocess(_images((256, 512)))
    pyramid = detector.features(batch)
    detector.backbone = _MeanPyramid(list(pyramid), next(iter(pyramid.values())).shape[1])
    boxes = torch.tensor(
        [[5.0, 7.0, 140.0, 150.0], [0.0, 0.0, 250.0, 240.0], [9.0, 3.0, 503.0, 251.0]]
    )
    assert detector.levels([boxes]).tolist() == [3, 4, 4]
    detector.roi_heads.box_head.register_forward_hook(lambda m, inputs, out: pooled.append(inputs))
    pooled: list = []
    detector.score_regions(detector.features(batch), [boxes])
    detector.score_regions(detector.features(batch.half()), [boxes], stride_shift=1)
    (full,), (small,) = pooled
    assert full.std() > 0.01
    torch.testing.assert_close(small, full)


def test_levels_follow_the_canonical_size(detector):
    sides = torch.tensor([20.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 2000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], 1)
    levels = detector.levels([boxes[:3], boxes[3:3], boxes[3:]])
    assert levels.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert detector.levels([boxes[:0]]).shape == (0,)


def test_canonical_size_is_a_key(case):
    detector = case.build(CANONICAL_BOX_SIZE=56)
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (27, 29, 55, 57, 111, 113)])
    assert detector.levels([boxes]).tolist() == [2, 3, 3, 4, 4, 5]
    features = detector.features(detector.preprocess(_images((128, 128))))
    expected = detector.score_regions(features, [boxes])
    actual = detector.score_regions(case.shifted_pyramid(features), [boxes[1:]], stride_shift=1)
    torch.testing.assert_close(actual.logits, expected.logits[1:])


def test_new_classifier_draws_no_random_numbers(detector):
    state = torch.get_rng_state()
    detector.new_classifier()
    assert torch.equal(torch.get_rng_state(), state)


def test_stride_shift_reads_a_half_size_image_as_halved_boxes_do(detector):
    batch = detector.preprocess(_images((128, 128), (120, 100)))
    small = detector.features(batch.half())
    boxes = [torch.tensor([[0.0, 0.0, 60.0, 90.0], [10.0, 20.0, 118.0, 110.0]])] * 2
    shifted = detector.score_regions(small, boxes, stride_shift=1)
    halved = detector.score_regions(small, [b / 2 for b in boxes])
    torch.testing.assert_close(shifted.logits, halved.logits)
    torch.testing.assert_close(shifted.deltas, halved.deltas)


def test_stride_shift_pools_the_next_coarser_level(case, detector):
    """With P3 to P5 in place of P2 to P4, regions of level 3 and above score as before."""
    batch = detector.preprocess(_images((256, 512)))
    features = detector.features(batch)
    boxes = torch.tensor(
        [
            *([5.0, 7.0, 140.0, 150.0], [0.0, 0.0, 250.0, 240.0], [9.0, 3.0, 503.0, 251.0]),
            [-400.0, -400.0, 900.0, 900.0],  # halved, it would still be of level 5
        ]
    )
    assert (box_area(boxes).sqrt() >= 112).all()
    expected = detector.score_regions(features, [boxes])
    actual = detector.score_regions(case.shifted_pyramid(features), [boxes], stride_shift=1)
    torch.testing.assert_close(actual.embeddings, expected.embeddings)
    torch.testing.assert_close(actual.logits, expected.logits)


def test_regions_do_not_depend_on_the_first_batch_seen(detector):
    """A small first image must not fix the scales that later boxes are pooled with."""
    boxes = [torch.tensor([[3.0, 5.0, 50.0, 60.0]])]
    large = detector.preprocess(_images((128, 128)))
    fresh = copy.deepcopy(detector)
    tiny = detector.preprocess(_images((66, 66)))
    detector.score_regions(detector.features(tiny), boxes)
    torch.testing.assert_close(
        detector.score_regions(detector.features(large), boxes).logits,
        fresh.score_regions(fresh.features(large), boxes).logits,
    )


def test_no_regions_are_allowed(detector):
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    output = detector.score_regions(detector.features(batch), [torch.zeros(0, 4)] * 2)
    assert output.logits.shape == (0, NUM_CLASSES + 1)
    assert output.deltas.shape[0] == 0
    boxes = torch.zeros(0, 4)
    assert detector.decode(boxes, output.deltas).shape == output.deltas.shape
    assert detector.encode(boxes, boxes).shape == (0, 4)
    found = detector.detect(boxes, output, output.logits.softmax(1), (64, 64))
    assert (len(found), found.class_probs.shape) == (0, (0, NUM_CLASSES + 1))
    samples = RegionSamples.from_matches(
        [boxes] * 2, [torch.zeros(0).long()] * 2, [torch.zeros(0).long()] * 2, _targets([], []), 3
    )
    losses = detector.region_losses(output, samples)
    assert all(loss == 0 and loss.requires_grad for loss in losses.values())


def test_encoding_undoes_decoding(detector):
    boxes, deltas = torch.tensor(TWO_BOXES), torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.0] * 4])
    decoded = detector.decode(boxes, deltas[:, None].expand(-1, NUM_CLASSES, -1))
    for column in decoded.unbind(1):
        torch.testing.assert_close(detector.encode(column, boxes), deltas, rtol=1e-4, atol=1e-5)


def test_zero_deltas_decode_to_the_boxes_themselves(detector):
    boxes = torch.tensor(TWO_BOXES)
    decoded = detector.decode(boxes, torch.zeros(2, NUM_CLASSES, 4))
    torch.testing.assert_close(decoded, boxes[:, None].expand(-1, NUM_CLASSES, -1))


def test_new_classifier_copies_the_main_one_with_background_last(detector):
    batch = detector.preprocess(_images((64, 64)))
    output = detector.score_regions(detector.features(batch), [torch.tensor(TWO_BOXES)])
    classifier = detector.new_classifier()
    torch.testing.assert_close(classifier(output.embeddings), output.logits)
    with torch.no_grad():
        classifier.weight.zero_()
    again = detector.score_regions(detector.features(batch), [torch.tensor(TWO_BOXES)])
    torch.testing.assert_close(again.logits, output.logits)


def test_bfloat16_autocast_stays_close_to_fp32_and_keeps_boxes_in_fp32(detector):
    detector.eval()
    batch = detector.preprocess(_images((64, 64), (56, 70)))
    boxes = [torch.tensor(TWO_BOXES), torch.tensor(ONE_BOX)]
    with torch.no_grad():
        exact = detector.score_regions(detector.features(batch), boxes)
        with torch.autocast("cpu", torch.bfloat16):
            features = detector.features(batch)
            rounded = detector.score_regions(features, boxes)
            proposals, _ = detector.propose(features, batch)
            detections = detector.predict(features, batch)
    scale = exact.logits.abs().max()
    assert (rounded.logits - exact.logits).abs().max() < 0.05 * scale
    tensors = [rounded.logits, rounded.deltas, *proposals]
    tensors += [t for d in detections for t in (d.boxes, d.scores, d.class_probs)]
    assert {t.dtype for t in tensors} == {torch.float32}


def test_bfloat16_losses_are_close_to_fp32(detector):
    targets = _targets(TWO_BOXES, ONE_BOX)
    exact = _losses(detector, targets).losses
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _losses(detector, targets).losses
    # The RPN's losses see the same anchors; the box head may be given other proposals.
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=1e-3)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in rounded.values())


def _batch(boxes=TWO_BOXES):
    labeled, unlabeled = _images((64, 64), seed=1), _images((64, 64), seed=2)
    return TwoStreamBatch(
        Views(labeled, labeled, _targets(boxes), [1]), Views(unlabeled, unlabeled, None, [2]), []
    )


def test_teacher_gets_no_gradient_and_stays_in_eval_mode(detector):
    model = TeacherStudent(
        detector,
        FixedThreshold(0.2),
        burn_in_iters=0,
        ema_decay=0.9,
        unsup_loss_weight=1.0,
        unsup_box_losses=True,
    ).train()
    assert model.start_teacher_if_due()
    losses = model(_batch())
    assert model.metrics["pseudo/num_per_image"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert not any(module.training for module in model.teacher.modules())
    assert all(module.training for module in model.student.modules())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters())


def test_pseudo_labels_equal_to_truth_give_the_supervised_losses(detector):
    model = TeacherStudent(
        detector,
        FixedThreshold(0.5),
        burn_in_iters=0,
        ema_decay=0.9,
        unsup_loss_weight=2.0,
        unsup_box_losses=True,
        labeled_views="strong",
    ).train()
    images, truth = _images((64, 64), seed=1), _targets(TWO_BOXES)[0]
    pseudo = PseudoLabels(
        truth.boxes,
        truth.classes,
        scores=torch.ones(2),
        weights=truth.weights,
        box_weights=truth.box_weights,
        class_probs=truth.probs,
        reliable=torch.ones(2, dtype=torch.bool),
    )
    views = Views(images, images, [truth], [1])
    torch.manual_seed(5)
    step = Step(model.student, model.teacher, 0, views, unlabeled=views, pseudo_labels=[pseudo])
    supervised = model.supervised_losses(step)
    torch.manual_seed(5)
    unsupervised = model.unsupervised_losses(step)
    for name, loss in supervised.items():
        torch.testing.assert_close(unsupervised[f"{name}_unsup"], 2 * loss, rtol=0, atol=0)


def test_predict_in_train_mode_is_refused(detector):
    batch = detector.preprocess(_images((64, 64)))
    with pytest.raises(AssertionError, match="predict needs eval mode"):
        detector.predict(detector.features(batch), batch)


def test_state_dict_has_the_hosts_own_names(case, detector):
    assert list(case.host_model(detector).state_dict()) == list(detector.state_dict())
