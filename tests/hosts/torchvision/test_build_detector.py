import pytest
import torch
from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d, box_iou

from ssod.config import merge_config
from ssod.core.structures import Targets
from ssod.errors import InputError
from ssod.hosts.torchvision.build import build_backbone, build_detector
from ssod.hosts.torchvision.defaults import get_config
from tiny_run import OPTIONS

NORM_LAYERS = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm)


def _config(*overrides):
    options = [str(item) for pair in OPTIONS.items() for item in pair]
    return merge_config(get_config(), "", options + [str(item) for item in overrides])


def _num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "of R-18 must be a multiple of 1 up to 64"),
        ("MODEL.FPN.NORM", "GN", "MODEL.FPN.NORM GN needs channels in multiples of 32, got 16"),
        ("MODEL.RESNETS.DEPTH", 101, r"DEPTH must be one of \[18, 34, 50\], got 101"),
        ("MODEL.RESNETS.NORM", "SyncBN", r"RESNETS.NORM must be one of .*'GN'.*, got 'SyncBN'"),
        ("MODEL.RESNETS.NORM", "", r"RESNETS.NORM must be one of .*, got ''"),
        ("MODEL.FPN.NORM", "LN", r"FPN.NORM must be one of \['', .*'GN'.*, got 'LN'"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]", "one list for each of the 5 .*, got 2"),
    ],
)
def test_value_that_is_not_supported_is_refused(key, value, message):
    with pytest.raises(InputError, match=message):
        build_detector(_config(key, value))


@pytest.mark.parametrize(
    ("norm", "layer"), [*zip(("BN", "FrozenBN", "GN"), NORM_LAYERS, strict=True)]
)
def test_norm_of_the_backbone(norm, layer):
    body = build_backbone(_config("MODEL.RESNETS.NORM", norm)).body
    layers = [module for module in body.modules() if isinstance(module, NORM_LAYERS)]
    assert len(layers) == 21  # of a narrow R-18: two a block, the stem's and four shortcuts'
    assert {type(module) for module in layers} == {layer}
    learns = [p.requires_grad for module in layers for p in module.parameters()]
    assert all(learns) and bool(learns) == (norm != "FrozenBN")


@pytest.mark.parametrize(("norm", "count"), [("", 0), ("BN", 8), ("GN", 8)])
def test_norm_of_the_pyramid(norm, count):
    fpn = build_backbone(_config("MODEL.FPN.NORM", norm, "MODEL.FPN.OUT_CHANNELS", 64)).fpn
    assert sum(isinstance(module, NORM_LAYERS) for module in fpn.modules()) == count


def test_channels_of_the_pyramid_change_the_layers_that_see_them():
    def expected(channels):
        lateral = (32 + 64 + 128 + 256) * channels + 4 * channels
        smooth = 4 * (9 * channels**2 + channels)
        rpn_head = 9 * channels**2 + channels + 3 * (1 + 4) * (channels + 1)
        return lateral + smooth + rpn_head + 49 * channels * 32

    narrow, wide = (
        _num_parameters(build_detector(_config("MODEL.FPN.OUT_CHANNELS", c))) for c in (16, 40)
    )
    assert wide - narrow == expected(40) - expected(16)


def test_resnet_50_is_built_with_its_wider_stages():
    cfg = _config("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    detector = build_detector(cfg)
    lateral = [block[0].in_channels for block in detector.backbone.fpn.inner_blocks]
    assert lateral == [256, 512, 1024, 2048]


def test_heads_have_the_configured_sizes():
    detector = build_detector(
        _config(
            "MODEL.ROI_HEADS.NUM_CLASSES",
            5,
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
            "[[0.5, 1.0]]",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
            3,
        )
    )
    predictor, rpn = detector.roi_heads.box_predictor, detector.rpn.head
    assert (predictor.cls_score.out_features, predictor.bbox_pred.out_features) == (6, 24)
    assert (rpn.cls_logits.out_channels, rpn.bbox_pred.out_channels) == (2, 8)
    assert detector.roi_heads.box_head.fc6.in_features == 16 * 3 * 3


def _random_boxes(count, size):
    corners = 100 * torch.rand(count, 2, 2)
    return torch.cat([corners[:, 0], corners[:, 0] + 1 + size * corners[:, 1] / 100], 1)


@pytest.mark.parametrize("counts", [(3, 0, 1), (0,), (20,)])
def test_trusted_anchors_are_labeled_as_the_host_does_with_one_matching(counts):
    torch.manual_seed(0)
    rpn, calls = build_detector(_config()).rpn, []
    anchors = [_random_boxes(200, size=60) for _ in counts]
    targets = [{"boxes": _random_boxes(n, size=60), "weights": torch.ones(n)} for n in counts]
    expected = RegionProposalNetwork.assign_targets_to_anchors(rpn, anchors, targets)
    rpn.box_similarity = lambda *boxes: calls.append(1) or box_iou(*boxes)
    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    assert len(calls) == sum(count > 0 for count in counts)
    for actual, host in zip([*labels, *matched], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(actual, host, rtol=0, atol=0)
    assert any((label == 1).any() and (label == -1).any() for label in labels) or counts == (0,)


def test_losses_of_the_rpn_are_zeros_where_every_anchor_is_ignored():
    torch.manual_seed(0)
    detector = build_detector(_config()).train()
    detector.rpn.proposal_matcher.low_threshold = 0.0
    batch = detector.preprocess([torch.randint(256, (3, 64, 64), dtype=torch.uint8)])
    target = Targets.from_ground_truth(
        torch.tensor([[4.0, 6.0, 40.0, 50.0]]), torch.tensor([1]), detector.num_classes
    )
    target.weights = torch.zeros(1)
    _, losses = detector.propose(detector.features(batch), batch, [target])
    assert [loss.item() for loss in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert all((p.grad == 0).all() for p in detector.rpn.parameters())
