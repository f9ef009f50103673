import pytest
import torch
from detectron2.structures import Boxes, Instances

from contract import detectron2_case
from ssod.core.structures import RegionOutput
from ssod.errors import InputError
from ssod.hosts.detectron2.adapter import Detectron2RCNN


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "CascadeROIHeads"),
        ("MODEL.MASK_ON", True, "MODEL.MASK_ON"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou", "BBOX_REG_LOSS_TYPE giou"),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "USE_SIGMOID_CE"),
        ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "TRAIN_ON_PRED_BOXES"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "PROPOSAL_GENERATOR.NAME RPN"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "RotatedAnchorGenerator"),
    ],
)
def test_head_that_is_not_supported_is_refused_with_those_that_are(key, value, found):
    cfg = detectron2_case.config()
    cfg.merge_from_list([key, value, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True])
    with pytest.raises(InputError, match=f"{found}.* is not supported; .*StandardROIHeads"):
        Detectron2RCNN(cfg)


def test_rows_of_detections_count_from_before_broken_regions_were_dropped():
    """Detectron2 drops rows that are not finite before it counts the kept ones."""
    detector = detectron2_case.build().eval()
    boxes = torch.tensor(
        [[0.0, 0, 5, 5], [1, 1, 4, 4], [2, 2, 7, 7], [20, 3, 30, 6], [20, 20, 30, 30]]
    )
    deltas = torch.zeros(5, detectron2_case.NUM_CLASSES, 4)
    deltas[1] = torch.nan
    class_probs = torch.full((5, 4), 0.02)
    for row, (label, score) in enumerate([(0, 0.9), (0, 0.8), (1, torch.nan), (2, 0.7), (1, 0.96)]):
        class_probs[row, label] = score
    class_probs[:, -1] = 1 - class_probs[:, :-1].sum(1)
    output = RegionOutput(torch.zeros(5, 4), deltas, torch.arange(5.0)[:, None])
    # The fourth region lies at the right of the image: its box is clipped to nothing.
    found = detector.detect(boxes, output, class_probs, (40, 18))
    assert found.embeddings.flatten().tolist() == [0]
    found = detector.detect(boxes, output, class_probs, (40, 40))
    assert found.embeddings.flatten().tolist() == [4, 0, 3]
    assert torch.equal(found.boxes, boxes[[4, 0, 3]])
    assert torch.equal(found.class_probs, class_probs[[4, 0, 3]])
    assert found.classes.tolist() == [1, 0, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.96, 0.9, 0.7]))


def test_bgr_models_get_bgr_and_rgb_models_rgb():
    image = torch.stack([torch.full((4, 4), v, dtype=torch.uint8) for v in (10, 20, 30)])
    detector = detectron2_case.build()
    detector.pixel_mean.zero_()
    detector.pixel_std.fill_(1)
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [30, 20, 10]
    detector.input_format = "RGB"
    assert detector.preprocess([image]).tensor[0, :, 0, 0].tolist() == [10, 20, 30]


SIZES = [(64, 48), (50, 64), (64, 64)]
BOXES = [[[4, 4, 40, 30], [20, 0, 46, 64]], [[0, 0, 50, 50]], []]


def _rpns(boundary_thresh):
    """The adapter's RPN, Detectron2's own, and arguments for their labels: all weights are 1."""
    detector = detectron2_case.build()
    own, plain = (d.proposal_generator for d in (detector, detectron2_case.host_model(detector)))
    own.anchor_boundary_thresh = plain.anchor_boundary_thresh = boundary_thresh
    levels = [torch.zeros(1, 1, 64 // 2**i, 64 // 2**i) for i in range(2, 7)]
    targets = []
    for size, rows in zip(SIZES, BOXES, strict=True):
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
        targets.append(Instances(size, gt_boxes=Boxes(boxes), gt_weights=torch.ones(len(boxes))))
    return own, plain, (own.anchor_generator(levels), targets)


def _label(rpn, arguments):
    """Labels (N, A) and matched boxes (N, A, 4)."""
    torch.manual_seed(0)
    return [torch.stack(found) for found in rpn.label_and_sample_anchors(*arguments)]


@pytest.mark.parametrize("boundary_thresh", [-1, 0, 8, 1000])
def test_anchors_are_labeled_as_detectron2_does_also_across_the_border(boundary_thresh):
    own, plain, arguments = _rpns(boundary_thresh)
    found, expected = _label(own, arguments), _label(plain, arguments)
    assert all(map(torch.equal, found, expected))
    if boundary_thresh == 0:
        anchors = Boxes.cat(arguments[0])
        for labels, size in zip(found[0], SIZES, strict=True):
            assert (labels[~anchors.inside_box(size)] == -1).all() and (labels >= 0).any()


def test_anchors_of_targets_of_low_weight_take_no_place_in_the_sample():
    own, plain, arguments = _rpns(0)
    own.batch_size_per_image = plain.batch_size_per_image = 10**6
    expected, _ = _label(plain, arguments)
    _, (two_boxes, *_) = arguments
    two_boxes.gt_weights[1] = own.ignore_weight - 0.01
    found, matched = _label(own, arguments)
    is_low = (matched[0] == two_boxes.gt_boxes.tensor[1]).all(1) & (expected[0] == 1)
    assert is_low.any() and (expected[0][~is_low] == 1).any()
    assert torch.equal(found[0], expected[0].masked_fill(is_low, -1))
    assert torch.equal(found[1:], expected[1:])
    # As many trusted anchors are learned as there are places.
    own.batch_size_per_image, own.positive_fraction = 8, 1.0
    assert (_label(own, arguments)[0][0] >= 0).sum() == 8


def test_matching_is_repeated_after_running_out_of_memory():
    own, _, arguments = _rpns(-1)
    expected = _label(own, arguments)
    matcher, calls = own.anchor_matcher, []

    def match(overlaps):
        calls.append(overlaps)
        if len(calls) % 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return matcher(overlaps)

    own.anchor_matcher = match
    assert all(map(torch.equal, _label(own, arguments), expected))
    assert len(calls) == 2 * len(SIZES) and own.anchor_matcher is match
