"""
DASO and class-aware contrast where they were published: classification, in small.

The functions of `ssod.core` take plain (N, K) probabilities as they take regions. Here they are
added to FixMatch, with the EMA teacher and the burn-in of this project, on the 8 x 8 digits that
come with scikit-learn. What the papers claim:

- long-tailed labels: DASO (https://arxiv.org/abs/2106.05682) finds more of the rare classes, also
  where the unlabeled images are distributed otherwise than the labeled ones;
- unlabeled images of classes that no label has: CCSSL (https://arxiv.org/abs/2203.02261) is harmed
  less by them.

The table says what is found, for or against: accuracy of the teacher on as many test images of
each class, in percent. A seed draws which digits are frequent or known, all images, the initial
weights and the batches, which are the same for all methods. Settings were chosen on other images
than those of the table (`--validation`). Needs scikit-learn; some minutes on one thread:
python benchmarks/classification.py
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from digits import STRONG, WEAK, Data, distort, draw_data, long_tail
from torch import Tensor, nn

from ssod.core.class_queue import ClassQueue
from ssod.core.contrastive import class_aware_contrastive_loss, contrastive_targets
from ssod.core.daso import (
    blend_class_probs,
    blend_coefficients,
    semantic_alignment_loss,
    similarity_probs,
)
from ssod.core.ema import update_ema
from ssod.evaluation.report import format_table

ITERATIONS, BURN_IN = 1000, 200
LABELED_BATCH, UNLABELED_BATCH = 32, 96
LEARNING_RATE, EMA_DECAY = 0.03, 0.99
T_DIST = 0.3  # DASO's for distributions that differ; it has 1.5 for others
PUSH_THRESHOLD = 0.9  # CCSSL's for noisy labels
THRESHOLD = 0.95  # least probability of a pseudo-label (FixMatch, DASO, CCSSL)
EMBEDDING_SIZE = 64


class FixMatch:
    """Pseudo-labels as the teacher gives them; methods change its hooks, which do nothing."""

    num_views = 1  # strong ones

    def __init__(self, num_classes: int):
        self.projection = nn.Identity()

    def observe_labeled(self, embeddings: Tensor, labels: Tensor) -> None:
        """See what the teacher makes of the labeled images."""

    def relabel(self, probs: Tensor, embeddings: Tensor) -> Tensor:
        """Return (N, K) probabilities in the place of the teacher's."""
        return probs

    def loss(self, probs: Tensor, weak: Tensor, strong: list[Tensor]) -> Tensor | float:
        """Return a loss of the student's embeddings of the strong views."""
        return 0.0


class LabelsAlone(FixMatch):
    """No unlabeled images."""

    num_views = 0


class DASO(FixMatch):
    """As published, but with one T_dist, and without a delay after the burn-in."""

    window = 100  # iterations

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.queue = ClassQueue(num_classes, 256, EMBEDDING_SIZE)
        self.counts, self.window_counts = torch.zeros(num_classes), torch.zeros(num_classes)
        self.age = 0

    def observe_labeled(self, embeddings: Tensor, labels: Tensor) -> None:
        self.queue.add(self.queue.sum_by_class(embeddings, labels))
        self.queue.close()

    def relabel(self, probs: Tensor, embeddings: Tensor) -> Tensor:
        if self.age == self.window:
            self.counts, self.window_counts = self.window_counts, torch.zeros_like(self.counts)
            self.age = 0
        similarity = similarity_probs(embeddings, self.queue.prototypes())
        coefficients = blend_coefficients(self.counts, T_DIST)
        probs = blend_class_probs(probs, similarity, coefficients)
        self.window_counts += probs.argmax(1).bincount(minlength=len(self.counts))
        self.age += 1
        return probs

    def loss(self, probs: Tensor, weak: Tensor, strong: list[Tensor]) -> Tensor:
        every = torch.ones(len(weak))
        return semantic_alignment_loss(strong[0], weak, self.queue.prototypes(), every)


class CCSSL(FixMatch):
    """Both strong views with a gradient, as published; classes and scores are the teacher's."""

    num_views = 2

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.projection = nn.Sequential(
            nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE), nn.ReLU(), nn.Linear(EMBEDDING_SIZE, 64)
        )

    def loss(self, probs: Tensor, weak: Tensor, strong: list[Tensor]) -> Tensor:
        scores, labels = probs.max(1)
        targets = contrastive_targets(labels, scores, PUSH_THRESHOLD)
        views = [F.normalize(self.projection(view), eps=1e-6) for view in strong]
        return class_aware_contrastive_loss(*views, targets)


class Classifier(nn.Module):
    """Two convolutions and a layer of embeddings, and the linear classifier `head` of these."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 16, EMBEDDING_SIZE), nn.ReLU()),
        )
        self.head = nn.Linear(EMBEDDING_SIZE, num_classes)


def train(build: type[FixMatch], data: Data, seed: int) -> list[float]:
    """Return the teacher's accuracy on each class."""
    (images, labels), (unlabeled, _), (test, truth) = data
    torch.manual_seed(seed)
    num_classes = int(labels.max()) + 1
    student = Classifier(num_classes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    method = build(num_classes)
    trained = [*student.parameters(), *method.projection.parameters()]
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(trained, LEARNING_RATE, **options)
    for iteration in range(ITERATIONS):
        torch.manual_seed(seed * ITERATIONS + iteration)  # whatever a method draws
        rows = torch.randint(len(images), (LABELED_BATCH,))
        weak, target = distort(images[rows], **WEAK), labels[rows]
        loss = F.cross_entropy(student.head(student.encoder(weak)), target)
        if iteration >= BURN_IN and method.num_views:
            batch = unlabeled[torch.randint(len(unlabeled), (UNLABELED_BATCH,))]
            with torch.no_grad():
                method.observe_labeled(teacher.encoder(weak), target)
                seen = teacher.encoder(distort(batch, **WEAK))
                probs = method.relabel(teacher.head(seen).softmax(1), seen)
            views = [student.encoder(distort(batch, **STRONG)) for _ in range(method.num_views)]
            scores, pseudo = probs.max(1)
            losses = F.cross_entropy(student.head(views[0]), pseudo, reduction="none")
            loss = loss + (losses * (scores >= THRESHOLD)).mean()
            loss = loss + method.loss(probs, seen, views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(teacher, student, EMA_DECAY if iteration >= BURN_IN else 0)
    with torch.no_grad():
        hits = (teacher.head(teacher.encoder(test)).argmax(1) == truth).float()
    return [100 * hits[truth == label].mean().item() for label in truth.unique()]


COLUMNS = ("method", "head", "middle", "tail", "all", "gain", "gain of each seed")
LABELED, UNLABELED = long_tail(15, 15), long_tail(90, 15)
TASKS: dict[str, tuple[list[int], list[int], type[FixMatch]]] = {
    "long-tailed, unlabeled images alike": (LABELED, UNLABELED, DASO),
    "long-tailed, unlabeled images the other way round": (LABELED, UNLABELED[::-1], DASO),
    "unlabeled images of classes without labels": ([4] * 6 + [0] * 4, [90] * 10, CCSSL),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--validation", action="store_true", help="measure on other images than the table's"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # more do not help so small a network
    for title, (labeled, unlabeled, method) in TASKS.items():
        data = [draw_data(labeled, unlabeled, seed, args.validation) for seed in args.seeds]
        builds = {"labels alone": LabelsAlone, "FixMatch": FixMatch}
        builds[f"FixMatch + {method.__name__}"] = method
        found = {}
        for name, build in builds.items():
            runs = zip(data, args.seeds, strict=True)
            found[name] = np.array([train(build, parts, seed) for parts, seed in runs])
        print(f"{title}: images of each class labeled {labeled}, unlabeled {unlabeled}")
        is_even = len({*labeled} - {0}) == 1
        columns = [c for c in COLUMNS if not is_even or c not in ("head", "middle", "tail")]
        print(format_table(summarize(found), columns), end="\n\n", flush=True)


def summarize(found: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """Describe (seeds, K) accuracies of each method; gains are over FixMatch, of all classes."""
    rows = []
    for name, accuracies in found.items():
        parts = dict(zip(COLUMNS[1:4], np.array_split(accuracies, 3, 1), strict=True))
        parts["all"] = accuracies
        row = {"method": name} | {part: _spread(value.mean(1)) for part, value in parts.items()}
        if name != "FixMatch":
            gains = (accuracies - found["FixMatch"]).mean(1)
            row["gain"] = _spread(gains, "+")
            row["gain of each seed"] = ", ".join(f"{gain:+.1f}" for gain in gains)
        rows.append(row)
    return rows


def _spread(values: np.ndarray, sign: str = "") -> str:
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{spread}"


if __name__ == "__main__":
    main()
