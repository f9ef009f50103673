"""The torchvision adapter and, for comparison, torchvision's own model with its weights."""

from contextlib import nullcontext

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from ssod.config import merge_config
from ssod.hosts.torchvision.build import build_backbone, build_detector
from ssod.hosts.torchvision.defaults import get_config

NUM_CLASSES = 3
CHANNELS = (0, 1, 2)  # of RGB, in the model's order
OVERRIDES = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.NORM": "GN",  # no batch statistics: two calls give the same output
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "SSOD.FOCAL_GAMMA": 0.0,
}


def storage():
    """Return the context the host needs around training calls: none."""
    return nullcontext()


def build(**keys):
    """Return the adapter, with keys of `SSOD`."""
    flat = [str(item) for pair in OVERRIDES.items() for item in pair]
    cfg = merge_config(get_config(), "", flat)
    cfg.SSOD.update(keys)
    return build_detector(cfg)


def host_model(detector):
    """Return an unmodified FasterRCNN with the detector's weights and mode."""
    cfg = merge_config(get_config(), "", [str(item) for pair in OVERRIDES.items() for item in pair])
    model = FasterRCNN(
        build_backbone(cfg),
        rpn_post_nms_top_n_train=cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        box_head=TwoMLPHead(16 * 49, 32),
        box_predictor=FastRCNNPredictor(32, NUM_CLASSES + 1),
        box_score_thresh=0.2,
        box_batch_size_per_image=32,
    )
    model.load_state_dict(detector.state_dict())
    return model.train(detector.training)


def _forward(detector, batch, targets, seed=0):
    model = host_model(detector)
    torch.manual_seed(seed)  # after building, which draws initial weights
    images = ImageList(batch.tensor, batch.sizes)
    features = model.backbone(batch.tensor)
    proposals, rpn_losses = model.rpn(images, features, targets)
    found, losses = model.roi_heads(features, proposals, batch.sizes, targets)
    return found, rpn_losses | losses


def host_losses(detector, batch, targets, seed):
    """Return the losses torchvision itself computes, under this project's names."""
    _, losses = _forward(
        detector, batch, [{"boxes": t.boxes, "labels": t.classes + 1} for t in targets], seed
    )
    return {
        "loss_rpn_cls": losses["loss_objectness"],
        "loss_rpn_loc": losses["loss_rpn_box_reg"],
        "loss_cls": losses["loss_classifier"],
        "loss_box_reg": losses["loss_box_reg"],
    }


@torch.no_grad()
def host_inference(detector, batch):
    """Return (boxes, scores, classes) of each image as torchvision itself detects them."""
    found, _ = _forward(detector, batch, None)
    return [(f["boxes"], f["scores"], f["labels"] - 1) for f in found]


def shifted_pyramid(features):
    """Return P3, P4, P5 under the names of P2, P3, P4 (the coarsest level stays in its place)."""
    return {"0": features["1"], "1": features["2"], "2": features["3"], "3": features["3"]}


def rpn_head(detector):
    """Return the module whose first output is the objectness of each level."""
    return detector.rpn.head


def sample_every_anchor(detector):
    """Make the RPN learn every anchor that is not ignored."""
    detector.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    detector.rpn.fg_bg_sampler.positive_fraction = 0.5


def classifier(detector):
    """Return the box head's classifier."""
    return detector.roi_heads.box_predictor.cls_score
