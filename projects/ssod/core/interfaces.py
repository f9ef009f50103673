"""
What a host's detector must offer to the algorithms.

Shape shorthand: N images, R regions of all images, P_i proposals of image i, K foreground
classes (background is index K), D embedding size. Boxes are XYXY pixels of the image that was
given to `preprocess`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import skip_init

from ssod.core.losses import weighted_box_loss, weighted_classification_loss
from ssod.core.structures import Detections, ImageBatch, RegionOutput, RegionSamples, Targets

BOX_LOSSES = ("loss_box_reg", "loss_rpn_loc")
Features = dict[str, Tensor]
Rescore = Callable[[Tensor, Tensor], Tensor]
Reweight = Callable[[RegionSamples, RegionOutput], RegionSamples]


@dataclass
class LossOutput:
    """
    Losses of one forward pass and what they were computed from, for methods that add terms.

    Attributes:
        losses: `loss_cls`, `loss_box_reg`, `loss_rpn_cls`, `loss_rpn_loc`, scalars.
        proposals: (P_i, 4) an image.
        samples: the regions the losses were taken over.
        regions: head outputs of these regions, rows as in `samples`.
    """

    losses: dict[str, Tensor]
    proposals: list[Tensor]
    samples: RegionSamples
    regions: RegionOutput


@dataclass
class Candidates:
    """
    What a detector finds in N images before non-maximum suppression.

    Attributes:
        boxes: (P_i, 4) proposals of each image.
        output: head outputs of R = sum(P_i) regions.
        class_probs: (R, K + 1), rescored.
    """

    boxes: list[Tensor]
    output: RegionOutput
    class_probs: Tensor


class RegionDetector(nn.Module, ABC):
    """
    A two-stage detector, split where the semi-supervised methods need to reach in.

    A host's adapter subclasses the host's model and this class, so parameter names stay the
    host's. Methods follow the mode of the module (`train()` or `eval()`) as the host does. Every
    one takes one or more images, each with or without boxes.

    Attributes:
        num_classes: K.
        classifier: the box head's layer from D to K + 1.
        background_first: whether column 0 of `classifier` is the background, not K.
        focal_gamma: exponent of the classification loss, 0 for cross entropy.
        box_loss_beta: where the box loss turns from L2 to L1; 0 for L1.
        loss_weights: factors on the host's losses of regions, by name; 1 for others.
        score_floor: detections have a higher score; to be changed by `at_score_floor` alone.
    """

    num_classes: int
    classifier: nn.Linear
    background_first = False
    focal_gamma = 0.0
    box_loss_beta = 0.0
    loss_weights: Mapping[str, float] = {}
    score_floor: float

    @property
    @abstractmethod
    def mean_color(self) -> Tensor:
        """The (3,) RGB color, of 0 to 255, that `preprocess` makes 0, with which it pads."""

    @abstractmethod
    def preprocess(self, images: list[Tensor]) -> ImageBatch:
        """Normalise and pad N uint8 RGB (3, h, w) images as the host does; never resize."""

    @abstractmethod
    def features(self, batch: ImageBatch) -> Features:
        """Return the pyramid, finest first: fp32 (N, C, H / stride, W / stride) by level."""

    def predict(
        self, features: Features, batch: ImageBatch, rescore: Rescore | None = None
    ) -> list[Detections]:
        """
        Detect objects: (R,) of each of N images, R = 0 allowed; eval mode only.

        `rescore(class_probs (R, K + 1), embeddings (R, D)) -> (R, K + 1)` is called once for the
        regions of all images before non-maximum suppression. The identity gives the host's own
        inference.
        """
        return self.suppress(self.candidates(features, batch, rescore), batch)

    def candidates(
        self, features: Features, batch: ImageBatch, rescore: Rescore | None = None
    ) -> Candidates:
        """Return what `predict` chooses detections from, scored and rescored."""
        assert not self.training, (
            "predict needs eval mode: the RPN proposes differently in training"
        )
        proposals, _ = self.propose(features, batch)
        output = self.score_regions(features, proposals)
        class_probs = output.logits.softmax(1)
        if rescore is not None:
            class_probs = rescore(class_probs, output.embeddings)
        return Candidates(proposals, output, class_probs)

    def suppress(self, found: Candidates, batch: ImageBatch) -> list[Detections]:
        """Return the detections (R,) of each of N images, R = 0 allowed."""
        ends = accumulate(len(boxes) for boxes in found.boxes)
        rows = [slice(end - len(boxes), end) for boxes, end in zip(found.boxes, ends, strict=True)]
        return [
            self.detect(boxes, found.output[row], found.class_probs[row], size)
            for boxes, row, size in zip(found.boxes, rows, batch.sizes, strict=True)
        ]

    @contextmanager
    def at_score_floor(self, floor: float) -> Iterator[None]:
        """Drop detections at or below a score of `floor` meanwhile, instead of `score_floor`."""
        before, self.score_floor = self.score_floor, floor
        try:
            yield
        finally:
            self.score_floor = before

    @abstractmethod
    def detect(
        self, boxes: Tensor, output: RegionOutput, class_probs: Tensor, size: tuple[int, int]
    ) -> Detections:
        """
        Decode one image's R scored regions, maybe none, and suppress as the host does.

        Args:
            boxes: (R, 4) regions.
            output: of `score_regions` for them, R rows; only its logits are out of date.
            class_probs: (R, K + 1), what they became.
            size: (height, width) of the image, which detections are clipped to.
        """

    @abstractmethod
    def propose(
        self, features: Features, batch: ImageBatch, targets: list[Targets] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """
        Run the region proposal network once.

        Returns:
            (P_i, 4) proposals of each image and, in train mode, `loss_rpn_cls` and
            `loss_rpn_loc`, for which `targets` are required. Anchors of targets whose weight is
            below the adapter's `rpn_ignore_weight` are ignored: neither object nor background.
        """

    @abstractmethod
    def sample(self, proposals: list[Tensor], targets: list[Targets]) -> RegionSamples:
        """
        Draw R regions of (P_i, 4) proposals and (M_i,) targets' boxes as the host does.

        Regions of targets of weight 0 only take places that those of others leave, as
        `ssod.core.sampling.weighted_first` says.
        """

    @abstractmethod
    def score_regions(
        self, features: Features, boxes: list[Tensor], stride_shift: int = 0
    ) -> RegionOutput:
        """
        Pool regions (R_i, 4) of each image and run the box head and predictors.

        With `stride_shift` s the features are those of the image at 1 / 2**s of its size while
        `boxes` stay in full-size pixels: level k of the small image stands in for level k + s of
        the full one. Regions of a level below 2 + s go to the finest one of the small image, whose
        s coarsest levels are not used. Pooling is done in fp32 under autocast.
        """

    @abstractmethod
    def levels(self, boxes: list[Tensor]) -> Tensor:
        """Return (R,) log2 of the stride that each of (R_i, 4) regions is pooled from."""

    @abstractmethod
    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        """Return the (R, 4) deltas that turn (R, 4) boxes into (R, 4) others."""

    @abstractmethod
    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Apply (R, K or 1, 4) deltas to (R, 4) boxes, giving (R, K or 1, 4) boxes."""

    def regress(self, boxes: Tensor, deltas: Tensor, classes: Tensor) -> Tensor:
        """Apply of (R, K or 1, 4) deltas those of (R,) foreground classes to (R, 4) boxes."""
        column = classes.clamp(max=deltas.shape[1] - 1)
        own = deltas[torch.arange(len(column), device=column.device), column]
        return self.decode(boxes, own[:, None])[:, 0]

    def region_losses(self, output: RegionOutput, samples: RegionSamples) -> dict[str, Tensor]:
        """Return the host's `loss_cls` and `loss_box_reg` of R regions, weighted; R = 0 gives 0."""
        loss_cls = weighted_classification_loss(
            output.logits, samples.probs, samples.weights, self.focal_gamma
        )
        loss_box_reg = weighted_box_loss(output, samples, self.encode, self.box_loss_beta)
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        return {name: loss * self.loss_weights.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def new_classifier(self) -> nn.Linear:
        """Return a copy of the classifier (D to K + 1), background last whatever the host does."""
        source = self.classifier
        # Without random draws: they would shift those of the training step.
        new = skip_init(nn.Linear, source.in_features, source.out_features).to(source.weight)
        for copied, values in zip(new.parameters(), source.parameters(), strict=True):
            copied.copy_(values.roll(-1, dims=0) if self.background_first else values)
        return new

    @contextmanager
    def fixed_norm_statistics(self) -> Iterator[None]:
        """Let batch norms in train mode use their running statistics and leave those alone."""
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()

    def losses(
        self,
        features: Features,
        batch: ImageBatch,
        targets: list[Targets],
        reweight: Reweight | None = None,
    ) -> LossOutput:
        """
        Compute the host's own losses of N images, weighted by (M_i,) targets; train mode only.

        `reweight(samples, regions)` may change weights and targets of the sampled regions once they
        are scored. The order of the calls keeps the host's random draws.
        """
        proposals, losses = self.propose(features, batch, targets)
        samples = self.sample(proposals, targets)
        regions = self.score_regions(features, samples.boxes)
        if reweight is not None:
            samples = reweight(samples, regions)
        losses.update(self.region_losses(regions, samples))
        return LossOutput(losses, proposals, samples, regions)
