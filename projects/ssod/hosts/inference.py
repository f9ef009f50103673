"""Running detectors over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ssod.core.geometry import map_boxes
from ssod.core.interfaces import RegionDetector, Rescore
from ssod.core.structures import Detections, PseudoLabels
from ssod.core.teacher_student import TeacherStudent
from ssod.data.datasets import DetectionDataset, ImageRecord
from ssod.data.loader import build_test_loader
from ssod.evaluation.coco_metrics import detections_to_coco

Found = Detections | PseudoLabels
IMAGES_PER_BATCH = 8  # images of other sizes in a batch change the padding, and results slightly


def _over_images(
    module: nn.Module,
    label: Callable[[list[Tensor]], Iterable[Sequence[Found]]],
    dataset: DetectionDataset,
    cfg: CfgNode,
    skip_broken: bool = False,
) -> Iterator[tuple[ImageRecord, list[Found]]]:
    """
    Yield the results of `label` for each image, on the CPU and in the image's original pixels.

    `module` is in eval mode meanwhile, and in its own again whatever ends this.
    """
    loader = build_test_loader(
        dataset,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        batch_size=IMAGES_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        skip_broken=skip_broken,
    )
    was_training = module.training
    module.eval()
    try:
        for views in filter(None, loader):
            for view, results in zip(views, label([v.image for v in views]), strict=True):
                results = [found.to("cpu") for found in results]
                for found in results:
                    found.boxes = map_boxes(found.boxes, torch.linalg.inv(view.matrix))
                yield dataset[view.index], results
    finally:
        module.train(was_training)


def find(
    detector: RegionDetector,
    dataset: DetectionDataset,
    cfg: CfgNode,
    device: torch.device,
    skip_broken: bool = False,
    rescore: Rescore | None = None,
) -> Iterator[tuple[ImageRecord, Detections]]:
    """
    Run a detector on `device`, in eval mode, over a data set; its own mode is restored at the end.

    With `skip_broken` images that cannot be decoded are left out; `rescore` as in `predict`.

    Returns:
        An iterator over each image's record and detections in its original pixels, on the CPU;
        without class probabilities and embeddings.
    """
    floors = (detector.score_floor,)
    found = _find_at_floors(detector, dataset, cfg, device, floors, skip_broken, rescore)
    return ((record, detections) for record, (detections,) in found)


def _find_at_floors(
    detector: RegionDetector,
    dataset: DetectionDataset,
    cfg: CfgNode,
    device: torch.device,
    floors: Sequence[float],
    skip_broken: bool = False,
    rescore: Rescore | None = None,
) -> Iterator[tuple[ImageRecord, list[Detections]]]:
    """Find as `find` does at each of some score floors, with one pass of the network."""

    @torch.no_grad()
    def label(images: list[Tensor]) -> Iterable[Sequence[Detections]]:
        batch = detector.preprocess([image.to(device) for image in images])
        candidates = detector.candidates(detector.features(batch), batch, rescore)
        found = []
        for floor in floors:
            with detector.at_score_floor(floor):
                found.append([_slim(d) for d in detector.suppress(candidates, batch)])
        return zip(*found, strict=True)

    return _over_images(detector, label, dataset, cfg, skip_broken)


def _slim(found: Detections) -> Detections:
    """Leave out what would fill the memory for thousands of images."""
    return replace(found, class_probs=found.class_probs[:, :0], embeddings=found.embeddings[:, :0])


def detect(
    detector: RegionDetector,
    dataset: DetectionDataset,
    cfg: CfgNode,
    device: torch.device,
    floors: Sequence[float],
) -> list[list[dict]]:
    """
    Detect objects in a data set as `find` does, at each of some score floors.

    The network runs once. Suppression runs for each floor: it offsets boxes by the largest
    coordinate among them to tell classes apart, so that, to the last bit, its result depends on
    boxes of low scores too. Dropping those afterwards would not always give the same boxes.

    Returns:
        For each floor COCO results: dictionaries of `image_id`, `category_id`, XYWH `bbox` and
        `score`, which is above the floor.
    """
    results: list[list[dict]] = [[] for _ in floors]
    for record, at_floors in _find_at_floors(detector, dataset, cfg, device, floors):
        for entries, found in zip(results, at_floors, strict=True):
            entries += detections_to_coco(
                record.image_id, found.boxes, found.scores, found.classes, dataset.category_ids
            )
    return results


def label_images(
    model: TeacherStudent, dataset: DetectionDataset, cfg: CfgNode, device: torch.device
) -> list[tuple[ImageRecord, PseudoLabels]]:
    """
    Pseudo-label a data set with the teacher and the filter, leaving the filter's state alone.

    Returns:
        Each image's record and pseudo-labels in its original pixels.
    """

    def label(images: list[Tensor]) -> Iterable[Sequence[PseudoLabels]]:
        return zip(model.pseudo_labels([image.to(device) for image in images]), strict=True)

    return [(record, found) for record, (found,) in _over_images(model, label, dataset, cfg)]
