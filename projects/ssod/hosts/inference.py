"""Running detectors over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    label: Callable[[list[Tensor]], list[Found]],
    dataset: DetectionDataset,
    cfg: CfgNode,
    skip_broken: bool = False,
) -> Iterator[tuple[ImageRecord, Found]]:
    """
    Yield what `label` finds in each image, on the CPU and in the image's original pixels.

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
            for view, found in zip(views, label([v.image for v in views]), strict=True):
                found = found.to("cpu")
                found.boxes = map_boxes(found.boxes, torch.linalg.inv(view.matrix))
                yield dataset[view.index], found
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

    @torch.no_grad()
    def label(images: list[Tensor]) -> list[Detections]:
        batch = detector.preprocess([image.to(device) for image in images])
        found = detector.predict(detector.features(batch), batch, rescore)
        # Of thousands of images they would fill the memory.
        return [
            replace(d, class_probs=d.class_probs[:, :0], embeddings=d.embeddings[:, :0])
            for d in found
        ]

    return _over_images(detector, label, dataset, cfg, skip_broken)


def detect(
    detector: RegionDetector, dataset: DetectionDataset, cfg: CfgNode, device: torch.device
) -> list[dict]:
    """
    Detect objects in a data set as `find` does.

    Returns:
        COCO results: dictionaries of `image_id`, `category_id`, XYWH `bbox` and `score`.
    """
    results = []
    for record, found in find(detector, dataset, cfg, device):
        results += detections_to_coco(
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

    def label(images: list[Tensor]) -> list[PseudoLabels]:
        return model.pseudo_labels([image.to(device) for image in images])

    return list(_over_images(model, label, dataset, cfg))
