"""A detector without a host: every method of the interface on 4 x 4 pixel images."""

import torch
from torch import nn

from ssod.core.interfaces import RegionDetector
from ssod.core.structures import Detections, ImageBatch, RegionOutput, RegionSamples

NUM_CLASSES = 2
LOSS_NAMES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
BOXES = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 4.0, 2.75], [0.0, 1.0, 4.0, 4.0]])


class FakeDetector(RegionDetector):
    """
    Scores three fixed boxes per image from the mean color of its corner; every loss depends on the
    pixels, on the targets and on parameters of its own. Draws no random numbers.
    """

    num_classes = NUM_CLASSES

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.objectness = nn.Linear(4, 1)
        self.anchor_deltas = nn.Linear(4, 4)
        self.classifier = nn.Linear(4 + 1, NUM_CLASSES + 1)
        self.box_deltas = nn.Linear(4 + 1, 4)

    @property
    def mean_color(self):
        return torch.zeros(3)

    def preprocess(self, images):
        tensor = torch.stack(images).float() / 255
        return ImageBatch(tensor, [tuple(image.shape[-2:]) for image in images])

    def features(self, batch):
        return {"0": self.norm(self.body(batch.tensor))}

    def detect(self, boxes, output, class_probs, size):
        probs = class_probs**5  # softmax of five times the logits
        probs = probs / probs.sum(1, keepdim=True)
        scores, classes = probs[:, :-1].max(1)
        found = Detections(boxes, scores, classes, probs, output.embeddings)
        return found[scores.argsort(descending=True)]

    def propose(self, features, batch, targets=None):
        proposals = [BOXES for _ in range(len(batch))]
        if not self.training:
            return proposals, {}
        pooled = features["0"][..., :2, :2].mean((2, 3))
        counts = torch.tensor([float(len(t)) for t in targets])
        corners = torch.stack([t.boxes.sum(0) for t in targets])
        return proposals, {
            "loss_rpn_cls": (self.objectness(pooled).squeeze(1) - counts).square().mean(),
            "loss_rpn_loc": (self.anchor_deltas(pooled) - corners).abs().mean(),
        }

    def sample(self, proposals, targets):
        matched, classes = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            match = torch.arange(len(boxes)) % max(len(target), 1)
            label = target.classes[match].clone() if len(target) else torch.zeros_like(match)
            # The last region of each image, and all without targets, are background.
            label[-1 if len(target) else 0 :] = NUM_CLASSES
            matched.append(match)
            classes.append(label)
        return RegionSamples.from_matches(proposals, classes, matched, targets, NUM_CLASSES)

    def score_regions(self, features, boxes, stride_shift=0):
        pooled = features["0"][..., :2, :2].mean((2, 3))
        width = [(b[:, 2:3] - b[:, 0:1]) / 4 for b in boxes]
        embeddings = torch.cat(
            [torch.cat([p.expand(len(w), -1), w], 1) for p, w in zip(pooled, width, strict=True)]
        )
        deltas = self.box_deltas(embeddings)[:, None]
        return RegionOutput(self.classifier(embeddings), deltas, embeddings)

    def levels(self, boxes):
        """2, 3 and 4 for the three boxes, 5 for larger ones."""
        areas = torch.cat([(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in boxes])
        return ((areas / 4).long() + 1).clamp(2, 5)

    def encode(self, gt_boxes, boxes):
        return gt_boxes

    def decode(self, boxes, deltas):
        return boxes[:, None] + deltas
