"""
Pseudo-labels blended with the similarity to prototypes of the classes, most for frequent classes.

DASO (https://arxiv.org/abs/2106.05682), carried from images to regions.

Shape shorthand: R regions of all images, K foreground classes (background is index K),
D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.core.class_queue import ClassQueue
from ssod.core.distributed import all_reduce_sum
from ssod.core.interfaces import RegionDetector
from ssod.core.method import METHOD_REGISTRY, Method, Step, choose_layer
from ssod.core.semantic_blend import (
    blend_class_probs,
    blend_coefficients,
    semantic_alignment_loss,
    similarity_probs,
)
from ssod.core.structures import Detections
from ssod.errors import InputError

__all__ = [
    "DASO",
    "blend_class_probs",
    "blend_coefficients",
    "semantic_alignment_loss",
    "similarity_probs",
]

OBSERVE_PERIOD = 4  # iterations between two looks of the teacher at labeled images
BOXES_PER_CLASS = 10  # least boxes of a window, on average over classes


@METHOD_REGISTRY.register()
class DASO(Method):
    """
    Distribution-aware blending of the teacher's classes, and semantic alignment, in training.

    DASO (https://arxiv.org/abs/2106.05682). A linear classifier prefers frequent classes, the
    similarity to one prototype a class rare ones. The teacher's probabilities of each region are
    blended with that similarity before non-maximum suppression, by `blend_class_probs`, the more
    the more frequent the region's class is among the last pseudo-labels. The student's regions
    learn to be as similar to the prototypes as the teacher's pseudo-box is that they were matched
    to.

    - Prototypes: means of the teacher's embeddings of labeled boxes in the weak view, see
      `ClassQueue`. The teacher looks at labeled images in every fourth iteration alone.
    - Counts: of the pool, over all ranks: detections with a score of at least `pool_floor` whose
      class is the likeliest foreground class of their region. They decide from the end of a window
      on, which is replaced by the next one, and which lasts until it has 10 boxes a class.
    - A class without a prototype has a similarity of 0 and is never blended; with fewer than two
      prototypes, until the first window ends, and for `delay` iterations nothing is.
    - Alignment: of all pseudo-boxes of the main branch, undecided ones included, with a score of
      at least `pool_floor`; after `delay` iterations, and not weighted by the filter.

    What an iteration finds counts from the next one on, whatever parts its batch is divided into.

    Args:
        student: detector, of which K and D are taken.
        weight: factor on the alignment.
        t_dist: of `blend_coefficients`, above 0.
        t_proto: of `similarity_probs`, above 0.
        max_blend: largest coefficient, in [0, 1].
        queue_length: boxes of a class that its prototype is the mean of.
        delay: iterations since the end of the burn-in before anything is blended or aligned.
        window: least iterations of a window.
        pool_floor: probability in [0, 1].

    Raises:
        InputError: if an argument is out of range.

    Note: one reduction a call in train mode, of K numbers, and of K (D + 1) more in every fourth
    iteration. With `rescore` in eval mode nothing changes.
    """

    group = "DASO"
    counts: Tensor
    last_counts: Tensor
    window_counts: Tensor
    window_age: Tensor
    labeled_counts: Tensor

    def __init__(
        self,
        student: RegionDetector,
        *,
        weight: float = 1.0,
        t_dist: float = 0.3,
        t_proto: float = 0.05,
        max_blend: float = 1.0,
        queue_length: int = 256,
        delay: int = 1000,
        window: int = 100,
        pool_floor: float = 0.5,
    ):
        super().__init__()
        for key, value in {"T_DIST": t_dist, "T_PROTO": t_proto}.items():
            if not value > 0:
                raise InputError(f"SSOD.DASO.{key} must be above 0, got {value}")
        for key, value in {"MAX_BLEND": max_blend, "POOL_FLOOR": pool_floor}.items():
            if not 0 <= value <= 1:
                raise InputError(f"SSOD.DASO.{key} must be in [0, 1], got {value}")
        for key, value, least in (
            ("WEIGHT", weight, 0),
            ("QUEUE_LENGTH", queue_length, 1),
            ("DELAY", delay, 0),
            ("WINDOW", window, 1),
        ):
            if not value >= least:
                raise InputError(f"SSOD.DASO.{key} must be at least {least}, got {value}")
        num_classes = student.num_classes
        if num_classes < 2:
            raise InputError(f"SSOD.DASO needs at least 2 classes to blend, got {num_classes}")
        self.weight = weight
        self.t_dist = t_dist
        self.t_proto = t_proto
        self.max_blend = max_blend
        self.delay = delay
        self.window = window
        self.pool_floor = pool_floor
        self.queue = ClassQueue(num_classes, queue_length, student.classifier.in_features)
        for name in ("counts", "last_counts", "window_counts", "labeled_counts"):
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("window_age", torch.tensor(0))
        self.iterations = -1

    def get_extra_state(self) -> Tensor:
        """Return the last iteration since the burn-in, -1 before it, for the checkpoint."""
        return torch.tensor(self.iterations)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.iterations = int(state)

    @property
    def is_active(self) -> bool:
        """Whether the delay is over."""
        return self.iterations >= self.delay

    @torch.no_grad()
    def observe_labeled(self, step: Step) -> None:
        """Begin an iteration, and embed the labeled boxes by the teacher, once it has started."""
        if step.iterations < 0:
            return
        if step.iterations != self.iterations:
            self._begin(step.iterations)
        if step.iterations % OBSERVE_PERIOD == 0:
            labeled, teacher = step.labeled, step.teacher
            assert labeled.targets is not None, "labeled images come with targets"
            batch = teacher.preprocess(labeled.weak)
            boxes = [target.boxes for target in labeled.targets]
            found = teacher.score_regions(teacher.features(batch), boxes).embeddings
            classes = torch.cat([target.classes for target in labeled.targets])
            step.shared["DASO.labeled"] = self.queue.sum_by_class(found, classes)

    def _begin(self, iterations: int) -> None:
        """Let what the last iteration has found count, and replace the window if it is full."""
        self.queue.close()
        self.window_age += self.iterations >= 0
        num_boxes = self.window_counts.sum()
        is_full = (self.window_age >= self.window) & (
            num_boxes >= BOXES_PER_CLASS * len(self.window_counts)
        )
        self.last_counts.copy_(torch.where(is_full, self.counts, self.last_counts))
        self.counts.copy_(torch.where(is_full, self.window_counts, self.counts))
        self.window_counts.masked_fill_(is_full, 0)
        self.window_age.masked_fill_(is_full, 0)
        self.iterations = iterations

    def coefficients(self) -> Tensor:
        """Return (K,) float64 coefficients of the blending as they are now."""
        known = self.queue.seen()
        if not self.is_active:
            return torch.zeros_like(self.counts)
        blend = blend_coefficients(self.counts, self.t_dist).clamp(max=self.max_blend)
        return blend * known * (known.sum() >= 2)

    @torch.no_grad()
    def rescore(self, class_probs: Tensor, embeddings: Tensor) -> Tensor:
        """Blend (R, K + 1) probabilities by their (R, D) embeddings; changes no state."""
        if not self.is_active:
            return class_probs
        prototypes, known = self.queue.prototypes(), self.queue.seen()
        similarity = similarity_probs(embeddings, prototypes, self.t_proto, known)
        return blend_class_probs(class_probs, similarity, self.coefficients())

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return `loss_align`, a scalar, and count the iteration's pool and labeled boxes."""
        self._count(step)
        assert step.main is not None, "after the main branch"
        if not self.is_active:
            return {"loss_align": step.main.regions.embeddings[:0].sum()}
        prototypes, known = self.queue.prototypes(), self.queue.seen()
        targets, is_pooled = self._teachers_embeddings(step)
        loss = semantic_alignment_loss(
            step.main.regions.embeddings,
            targets,
            prototypes,
            is_pooled * (known.sum() >= 2),
            self.t_proto,
            known,
        )
        return {"loss_align": self.weight * loss}

    @torch.no_grad()
    def _count(self, step: Step) -> None:
        found = Detections.cat(step.detections)
        pooled = self._pool(found.class_probs, found.scores, found.classes)
        labels = torch.arange(len(self.counts), device=pooled.device)
        local = ((found.classes == labels[:, None]) & pooled).sum(1).double()
        labeled = step.shared.get("DASO.labeled", local.new_zeros(0))
        total = all_reduce_sum(torch.cat([local, labeled.flatten()]))
        self.window_counts += total[: len(local)]
        if len(labeled):
            sums = total[len(local) :].view(labeled.shape)
            self.queue.add(sums)
            self.labeled_counts += sums[:, -1]

    def _pool(self, class_probs: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        return (class_probs[:, :-1].argmax(1) == classes) & (scores >= self.pool_floor)

    @torch.no_grad()
    def _teachers_embeddings(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return (R, D) of the box that a region was matched to, and (R,) if it is in the pool."""
        assert step.main is not None, "after the main branch"
        assert step.unlabeled is not None, "there are unlabeled images"
        boxes = [labels.found for labels in step.learned]
        seen = [step.ask_teacher(layer, boxes).embeddings for layer in step.unlabeled.layers]
        found = choose_layer(seen, torch.cat([labels.layer for labels in step.learned]))
        rows = torch.arange(len(found), device=found.device)
        samples = step.main.samples
        matched = samples.look_up(rows.split([len(b) for b in boxes]))
        scores = samples.look_up([labels.scores for labels in step.learned])
        # Without any box there is still one row to look up.
        found = torch.cat([found, found.new_zeros(1, found.shape[1])])
        is_foreground = samples.classes < samples.probs.shape[1] - 1
        return found[matched], (is_foreground & (scores >= self.pool_floor)).to(scores)

    @torch.no_grad()
    def metrics(self, step: Step) -> dict[str, Tensor]:
        """Return what the blending is like, and what it has changed in the iteration."""
        if step.candidates is None:
            return {}
        known, coefficients = self.queue.seen(), self.coefficients()
        num_known = known.sum()
        unit = F.normalize(self.queue.prototypes().double(), dim=1)
        # Of the sum of all cosines, with themselves included.
        cosines = unit.sum(0).square().sum() - num_known
        before = step.candidates.output.logits[:, :-1].argmax(1)
        scores, after = step.candidates.class_probs[:, :-1].max(1)
        pooled = scores >= self.pool_floor
        return {
            "pseudo/daso_prototypes": num_known.double(),
            "pseudo/daso_prototype_cosine": cosines / (num_known * (num_known - 1)).clamp(min=1),
            "pseudo/daso_coefficient": coefficients.sum() / num_known.clamp(min=1),
            "pseudo/daso_changed": ((before != after) & pooled).sum() / pooled.sum().clamp(min=1),
            "pseudo/daso_class_kl": _divergence(self.labeled_counts, self.counts),
            "pseudo/daso_window_change": _distance(self.counts, self.last_counts),
        }


def _divergence(labeled: Tensor, counts: Tensor) -> Tensor:
    """KL of (K,) counts' shares from the labeled ones', one box a class added; 0 before any."""
    p, q = ((values + 1) / (values + 1).sum() for values in (labeled, counts))
    return (p * (p / q).log()).sum() * (counts.sum() > 0)


def _distance(counts: Tensor, last: Tensor) -> Tensor:
    """Total variation of (K,) counts' shares, in [0, 1]; 0 before there are two windows."""
    p, q = (values / values.sum().clamp(min=1) for values in (counts, last))
    return (p - q).abs().sum() / 2 * (last.sum() > 0)
