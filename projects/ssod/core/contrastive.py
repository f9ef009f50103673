"""
Contrast of the objects of a batch, by their pseudo-classes.

CCSSL, class-aware contrastive semi-supervised learning (https://arxiv.org/abs/2203.02261).

Shape shorthand: N boxes of all images of a pass, each in two views; K foreground classes, D
embedding size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ssod.core.filters import kept_rows
from ssod.core.interfaces import RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method, Step, choose_layer, score_shown
from ssod.core.structures import PseudoLabels
from ssod.errors import InputError

SecondView = Literal["teacher", "student"]
BASE_TEMPERATURE = 0.07  # at which the published loss is not scaled
PROJECTION_SIZE = 64
MAX_BOXES = 64
DUPLICATE_IOU = 0.7
EPS = 1e-6  # bounds the gradient of normalising a projection that is 0


def contrastive_targets(
    labels: Tensor, scores: Tensor, push_threshold: float | None = None
) -> Tensor:
    """
    Return how much each pair of boxes is pulled together.

    The target matrix of CCSSL (https://arxiv.org/abs/2203.02261): `scores[i] * scores[j]` for two
    boxes of one class, 0 for others, and 1 for the two views of one box. The latter is of the
    code as it is today; what the paper reports was trained with the squared score there.

    Args:
        labels: (N,) int64.
        scores: (N,) in [0, 1].
        push_threshold: pairs count only if both scores reach it; the others are contrasted as
            images are, with their own other view alone. None: all pairs count.

    Returns:
        (N, N), symmetric, of the scores' type; N = 0 is allowed.
    """
    pulled = labels[:, None] == labels
    if push_threshold is not None:
        is_sure = scores >= push_threshold
        pulled = pulled & is_sure[:, None] & is_sure
    weights = scores[:, None] * scores * pulled
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return weights.masked_fill(own, 1)


def class_aware_contrastive_loss(
    view_a: Tensor, view_b: Tensor, targets: Tensor, temperature: float = 0.07
) -> Tensor:
    """
    Pull the embeddings of pairs together by their targets, and push all others apart.

    CCSSL (https://arxiv.org/abs/2203.02261), as its code has it: each of the 2N embeddings is
    compared with the 2N - 1 others, and its cross entropies are averaged by the targets, so these
    act by their ratios within a row. Without pairs of different boxes it is the loss of SimCLR. It
    is multiplied by `temperature / 0.07`.

    Args:
        view_a: (N, D) unit vectors.
        view_b: (N, D) unit vectors of the same boxes in another view.
        targets: (N, N) of `contrastive_targets`; no row may be all 0.
        temperature: above 0.

    Returns:
        Scalar, the mean over the embeddings of both views. 0 for N = 1, which has nothing to be
        told from, and for N = 0; both are connected to the graph.
    """
    embeddings = torch.cat([view_a, view_b])
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    logits = (embeddings @ embeddings.T / temperature).masked_fill(itself, -torch.inf)
    log_probs = logits.log_softmax(1).masked_fill(itself, 0)
    weights = targets.repeat(2, 2).masked_fill(itself, 0)
    rows = (weights * log_probs).sum(1) / weights.sum(1)
    return -temperature / BASE_TEMPERATURE * rows.sum() / max(len(rows), 1)


@METHOD_REGISTRY.register()
class ClassAwareContrast(Method):
    """
    Contrastive learning of region embeddings by pseudo-classes, in training only.

    CCSSL (https://arxiv.org/abs/2203.02261) on boxes. What the paper does with images is done with
    the pseudo-boxes of an iteration, undecided ones included: a box's embedding in the strong view
    is pulled to that in a second view, and to those of boxes of its class if the teacher is sure of
    both. A box counts once, as the class of the best score at its place, and of many boxes the
    best 64 do. Embeddings are the box head's, projected to 64 numbers by two layers of its own.

    Pairs are those of one process and one pass, as published.

    Differs from the paper: the second view is the teacher's, of the weak view, and has no
    gradient; the teacher's embeddings go through the student's projection, as there is no average
    of it.

    Args:
        student: detector whose embeddings are compared.
        weight: factor on the loss.
        ramp_iters: iterations after the burn-in over which the weight rises linearly; 0 for none.
        push_thresh: score that both boxes of a pair need.
        views: whose second view: the "teacher"'s of the weak view, or the "student"'s of a second
            strong view, which has a gradient as well and costs another forward pass (paper).

    Raises:
        InputError: if an argument is out of range.
    """

    group = "CONTRASTIVE"
    undecided = "branch"

    def __init__(
        self,
        student: RegionDetector,
        *,
        weight: float = 0.5,
        ramp_iters: int = 2000,
        push_thresh: float = 0.9,
        views: SecondView = "teacher",
    ):
        super().__init__()
        for key, value in {"WEIGHT": weight, "RAMP_ITERS": ramp_iters}.items():
            if not value >= 0:
                raise InputError(f"SSOD.CONTRASTIVE.{key} must be at least 0, got {value}")
        if not 0 <= push_thresh <= 1:
            raise InputError(f"SSOD.CONTRASTIVE.PUSH_THRESH must be in [0, 1], got {push_thresh}")
        if views not in get_args(SecondView):
            raise InputError(
                f"SSOD.CONTRASTIVE.VIEWS must be one of {get_args(SecondView)}, got {views!r}"
            )
        self.weight = weight
        self.ramp_iters = ramp_iters
        self.push_thresh = push_thresh
        self.views = views
        if student.num_classes < 2:
            raise InputError("SSOD.CONTRASTIVE needs at least 2 classes to tell apart, got 1")
        width = student.classifier.in_features
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION_SIZE)
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return `loss_contrast`, a scalar; with fewer than two boxes a zero with its graph."""
        labels = step.pseudo_labels
        rows = _best_boxes(labels)
        kept = [p[row] for p, row in zip(labels, rows, strict=True)]
        boxes = [p.boxes for p in kept]
        with step.student.fixed_norm_statistics():
            embeddings = step.student.score_regions(step.features, boxes).embeddings
            others = self._second_view(step, kept)
        pseudo = PseudoLabels.cat(kept)
        with torch.autocast(embeddings.device.type, enabled=False):
            view_a = self._project(embeddings)
            with torch.set_grad_enabled(self.views == "student"):
                view_b = self._project(others)
            targets = contrastive_targets(pseudo.classes, pseudo.scores.float(), self.push_thresh)
            loss = class_aware_contrastive_loss(view_a, view_b, targets)
            step.shared["ClassAwareContrast"] = {
                "pseudo/contrast_boxes_per_image": step.per_image(torch.ones_like(pseudo.scores)),
                **_describe(view_a.detach(), view_b.detach(), pseudo.classes, targets),
            }
        ramp = min((step.iterations + 1) / max(self.ramp_iters, 1), 1.0)
        return {"loss_contrast": self.weight * ramp * loss}

    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return what the contrast was of, and how far its classes are apart."""
        return step.shared.get("ClassAwareContrast", {})

    def _second_view(self, step: Step, labels: list[PseudoLabels]) -> Tensor:
        """Return the (N, D) embeddings of boxes in the other view."""
        views = step.unlabeled
        assert views is not None, "there are unlabeled images"
        detector, features = step.teacher, step.teacher_features
        if self.views == "student":
            detector = step.student
            features = detector.features(detector.preprocess(views.second_strong))
        found = [p.found for p in labels]
        with torch.set_grad_enabled(self.views == "student"):
            seen = [
                score_shown(detector, features, len(views), layer, found).embeddings
                for layer in views.layers
            ]
            return choose_layer(seen, torch.cat([p.layer for p in labels]))

    def _project(self, embeddings: Tensor) -> Tensor:
        """Return (N, 64) unit vectors, in fp32."""
        return F.normalize(self.projection(embeddings.float()), eps=EPS)


def _best_boxes(labels: list[PseudoLabels]) -> list[Tensor]:
    """Return the rows of the best boxes of all images together, one at each place."""
    boxes = torch.cat([p.boxes for p in labels])
    scores = torch.cat([p.scores for p in labels])
    images = torch.cat([torch.full_like(p.classes, i) for i, p in enumerate(labels)])
    best = batched_nms(boxes, scores, images, DUPLICATE_IOU)[:MAX_BOXES]  # by score
    is_best = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)
    return kept_rows(is_best.split([len(p) for p in labels]))


def _describe(
    view_a: Tensor, view_b: Tensor, classes: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return metrics of (N, D) views of N boxes; what there are no pairs for is nan."""
    other = ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    is_same = classes[:, None] == classes
    same, different = is_same & other, ~is_same
    cosines = view_a @ view_b.T
    pulled, pushed = ((cosines * pairs).sum() / pairs.sum() for pairs in (same, different))
    return {
        "pseudo/contrast_gap": pulled - pushed,
        "pseudo/contrast_other_class_cosine": pushed,
        "pseudo/contrast_share_with_pairs": ((targets > 0) & other).any(1).sum()
        / max(len(classes), 1),
    }
