"""The Detectron2 adapter and, for comparison, Detectron2's own model with its weights."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from ssod.hosts.detectron2.adapter import Detectron2RCNN
from ssod.keys import add_ssod_config

NUM_CLASSES = 3
CHANNELS = (2, 1, 0)  # BGR
OVERRIDES = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",  # no batch statistics: two calls give the same output
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.PROPOSAL_GENERATOR.NAME": "IgnoringRPN",
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 200,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "SSOD.FOCAL_GAMMA": 0.0,
}


def config():
    """Return the config of the tiny model."""
    cfg = get_cfg()
    add_ssod_config(cfg)
    cfg.merge_from_list([item for pair in OVERRIDES.items() for item in pair])
    return cfg


def storage():
    """Return the context in which Detectron2 logs."""
    return EventStorage()


def build(**keys):
    """Return the adapter, with keys of `SSOD`."""
    cfg = config()
    cfg.SSOD.update(keys)
    return Detectron2RCNN(cfg)


def host_model(detector):
    """Return an unmodified GeneralizedRCNN with the detector's weights and mode."""
    cfg = config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    model = GeneralizedRCNN(cfg)
    model.load_state_dict(detector.state_dict())
    return model.train(detector.training)


def host_losses(detector, batch, targets, seed):
    """Return the losses Detectron2 itself computes."""
    model = host_model(detector)
    torch.manual_seed(seed)  # after building, which draws initial weights
    instances = [
        Instances(size, gt_boxes=Boxes(t.boxes), gt_classes=t.classes)
        for size, t in zip(batch.sizes, targets, strict=True)
    ]
    images = ImageList(batch.tensor, batch.sizes)
    features = model.backbone(batch.tensor)
    proposals, rpn_losses = model.proposal_generator(images, features, instances)
    _, losses = model.roi_heads(images, features, proposals, instances)
    return rpn_losses | losses


@torch.no_grad()
def host_inference(detector, batch):
    """Return (boxes, scores, classes) of each image as Detectron2 itself detects them."""
    model = host_model(detector)
    images = ImageList(batch.tensor, batch.sizes)
    features = model.backbone(batch.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    found, _ = model.roi_heads(images, features, proposals, None)
    return [(f.pred_boxes.tensor, f.scores, f.pred_classes) for f in found]


def shifted_pyramid(features):
    """Return P3, P4, P5 under the names of P2, P3, P4 (the coarsest level stays in its place)."""
    return {"p2": features["p3"], "p3": features["p4"], "p4": features["p5"], "p5": features["p5"]}


def rpn_head(detector):
    """Return the module whose first output is the objectness of each level."""
    return detector.proposal_generator.rpn_head


def sample_every_anchor(detector):
    """Make the RPN learn every anchor that is not ignored."""
    detector.proposal_generator.batch_size_per_image = 10**6


def classifier(detector):
    """Return the box head's classifier."""
    return detector.roi_heads.box_predictor.cls_score
