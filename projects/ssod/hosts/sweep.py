"""
What filters need of a run besides the teacher's detections in training: its labels, and sweeps.

Shape shorthand: K foreground classes.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from fvcore.common.config import CfgNode

from ssod.core.distributed import all_gather, get_rank, get_world_size
from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData
from ssod.hosts.inference import find
from ssod.progress import progress_bar

logger = logging.getLogger(__name__)


def tell_labels(model: TeacherStudent, data: RunData) -> None:
    """Tell the filter how often labels have each class."""
    model.pseudo_label_filter.set_label_distribution(
        torch.from_numpy(data.labeled.class_counts),
        len(data.labeled),
    )


def sweep_if_due(model: TeacherStudent, data: RunData, cfg: CfgNode, device: torch.device) -> None:
    """
    Let the teacher label a sample of unlabeled images, if the filter asks for one.

    Every rank must call this before each iteration, once the teacher has started. The sample
    depends on seed and iteration alone and is divided among the ranks, so a run that is resumed
    at a sweep makes the same one. Files that cannot be decoded are left out.
    """
    if not model.uses_unlabeled:
        return
    size = model.pseudo_label_filter.sweep_request(model.iteration - model.burn_in_iters)
    if size is None:
        return
    unlabeled = data.unlabeled
    rng = np.random.default_rng((cfg.SEED, model.iteration))
    sample = rng.permutation(len(unlabeled))[:size]
    mine = [unlabeled.image_ids[i] for i in sample[get_rank() :: get_world_size()]]
    # As long on every rank; empty places are of class K, the background, and not counted.
    places = -(-len(sample) // get_world_size()) * cfg.TEST.DETECTIONS_PER_IMAGE
    block = torch.zeros(places + 1, 2, device=device)
    block[:, 1] = data.labeled.num_classes
    # Rescored by the methods, as the detections are that the thresholds are for.
    keys = {"skip_broken": True, "rescore": model.rescore}
    images = find(model.teacher, unlabeled.select(mine), cfg, device, **keys)
    progress = progress_bar(
        images,
        total=len(mine),
        desc=f"sweep at iteration {model.iteration}",
        unit="image",
        disable=get_rank() > 0,
        leave=False,
    )
    found = [detections for _, detections in progress]
    if found:
        scores = torch.cat([detections.scores for detections in found])
        block[: len(scores), 0] = scores.to(device)
        block[: len(scores), 1] = torch.cat([d.classes for d in found]).to(block)
    block[-1, 0] = len(found)
    blocks = all_gather(block)
    num_images = int(blocks[:, -1, 0].sum())
    scores, classes = blocks[:, :-1].flatten(0, 1).unbind(1)
    model.pseudo_label_filter.set_thresholds_from(scores, classes.long(), num_images)
    logger.info("iteration %d: thresholds from %d images", model.iteration, num_images)
