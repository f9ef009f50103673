"""
The formulas of DASO: pseudo-labels blended with the similarity to prototypes of the classes.

DASO (https://arxiv.org/abs/2106.05682); the method is in `ssod.core.daso`.

Shape shorthand: R regions of all images, K foreground classes (background is index K),
D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blend_coefficients(counts: Tensor, t_dist: float) -> Tensor:
    """
    Return how much of a class's pseudo-labels similarity decides: `(m_k / max m)^(1 / t_dist)`.

    DASO (https://arxiv.org/abs/2106.05682): its shares, raised to 1 / T and divided by the largest.

    Args:
        counts: (K,) pseudo-labels of each class, of whole or floating numbers.
        t_dist: above 0; a small one spares all classes but the most frequent.

    Returns:
        (K,) in [0, 1]: 1 for the most frequent class, 0 for one without pseudo-labels, and zeros if
        there are none at all. Whole numbers give float64.
    """
    counts = counts if counts.is_floating_point() else counts.double()
    return (counts / counts.max().clamp(min=torch.finfo(counts.dtype).tiny)) ** (1 / t_dist)


def similarity_probs(
    embeddings: Tensor, prototypes: Tensor, t_proto: float = 0.05, known: Tensor | None = None
) -> Tensor:
    """
    Return the softmax of the cosines of embeddings and prototypes over `t_proto`.

    DASO (https://arxiv.org/abs/2106.05682). Computed in the prototypes' precision, also under
    autocast; the prototypes get no gradient.

    Args:
        embeddings: (R, D); R = 0 is allowed.
        prototypes: (K, D) of any lengths; one of zeros has a cosine of 0 with everything.
        t_proto: temperature, above 0.
        known: (K,) bool, classes that have a prototype; the others get 0. All by default.

    Returns:
        (R, K); uniform if no class is known.
    """
    return _similarity_logits(embeddings, prototypes, t_proto, known).softmax(1)


def _similarity_logits(
    embeddings: Tensor, prototypes: Tensor, t_proto: float, known: Tensor | None
) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        prototypes = F.normalize(prototypes.detach(), dim=1)
        logits = F.normalize(embeddings.to(prototypes), dim=1) @ prototypes.T / t_proto
    if known is None:
        return logits
    # Not -inf, of which a product with a probability of 0 is not a number.
    return logits.masked_fill(~known, torch.finfo(logits.dtype).min)


def blend_class_probs(class_probs: Tensor, similarity: Tensor, coefficients: Tensor) -> Tensor:
    """
    Move probability between the foreground classes of regions, towards their similarity.

    DASO (https://arxiv.org/abs/2106.05682): `(1 - v) p + v q`, with v of the class of the largest
    p. On regions q is multiplied by the foreground's probability, and the background keeps its
    own: it has no prototype, and would be by far the most frequent class.

    Args:
        class_probs: (R, K + 1), or (R, K) without background; R = 0 is allowed.
        similarity: (R, K) distributions q.
        coefficients: (K,) v in [0, 1]. Where it is 0, rows stay as they are, bit for bit.

    Returns:
        As `class_probs`, with the sums of the rows kept.
    """
    num_classes = similarity.shape[1]
    foreground = class_probs[:, :num_classes]
    share = coefficients.to(foreground)[foreground.argmax(1)][:, None]
    mass = foreground.sum(1, keepdim=True)
    blended = (1 - share) * foreground + share * mass * similarity.to(foreground)
    return torch.cat([torch.where(share > 0, blended, foreground), class_probs[:, num_classes:]], 1)


def semantic_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    weights: Tensor,
    t_proto: float = 0.05,
    known: Tensor | None = None,
) -> Tensor:
    """
    Cross entropy of the student's similarities to the prototypes against the teacher's.

    DASO (https://arxiv.org/abs/2106.05682), semantic alignment: H(q of the weak view, q of the
    strong one).

    Args:
        student: (R, D) embeddings; alone they get a gradient.
        teacher: (R, D) embeddings of the same objects.
        prototypes: (K, D).
        weights: (R,) factor on each row, in [0, 1].
        t_proto: temperature, above 0.
        known: (K,) bool, as in `similarity_probs`.

    Returns:
        Scalar, the sum over rows by the sum of weights, or by 1 if that is more; with R = 0 a zero
        connected to `student`.
    """
    target = similarity_probs(teacher.detach(), prototypes, t_proto, known)
    log_q = _similarity_logits(student, prototypes, t_proto, known).log_softmax(1)
    losses = -(target * log_q).sum(1)
    return (weights.to(losses) * losses).sum() / weights.sum().clamp(min=1)
