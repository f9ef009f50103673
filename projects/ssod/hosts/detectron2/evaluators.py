"""Test sets in Detectron2's catalog, and measuring student and teacher on them."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ssod.data import build
from ssod.data.datasets import DetectionDataset, read_coco
from ssod.data.loader import BatchLoader
from ssod.errors import InputError
from ssod.hosts.detectron2.low_floor import BothFloors, detect_at_both_floors
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.run import detectors_of

logger = logging.getLogger(__name__)

_EVALUATOR_TYPES = ("coco", "pascal_voc")
_VOC_YEARS = (2007, 2012)


def evaluate(model: TeacherStudentRCNN, cfg: CfgNode, output_dir: str | Path) -> dict[str, Any]:
    """
    Measure the student and, once it has started, the teacher; every rank must call it.

    Modes and the global random state stay as they were. Predictions are written to
    `output_dir/inference/student` and `teacher`, below that by the name of the set if there are
    several.

    Args:
        model: in any mode.
        cfg: `DATASETS.TEST`, `SSOD.DATA.VAL_JSON` or `VAL_VOC`, and how to read images.
        output_dir: of the run.

    Returns:
        `{"bbox": {"AP": ...}}` of what the model is in eval mode (for VOC "voc" and "coco" instead
        of "bbox"), and under "student" and "teacher" the same of each; with several sets one such
        dictionary for each name. `LOW_FLOOR_AP` is beside each AP. Empty without a test set, and on
        all ranks but the first.

    Raises:
        InputError: as `build_test_loader` and `build_evaluator`.
    """
    detectors = detectors_of(model)
    names = test_dataset_names(cfg)
    results: dict[str, dict[str, Any]] = {kind: {} for kind in detectors}
    for name in names:
        loader = build_test_loader(cfg, name)
        for kind, detector in detectors.items():
            folder = Path(output_dir, "inference", kind, name if len(names) > 1 else "")
            evaluator = build_evaluator(name, folder)
            was_training = detector.training
            try:
                detector.eval()
                results[kind][name] = inference_on_dataset(
                    partial(detect_at_both_floors, detector), loader, BothFloors(evaluator)
                )
            finally:
                detector.train(was_training)
            if comm.is_main_process():
                logger.info("results of the %s on %s:", kind, name)
                print_csv_format(results[kind][name])
    if not names or not comm.is_main_process():
        return {}
    if len(names) == 1:
        results = {kind: by_name[names[0]] for kind, by_name in results.items()}
    (evaluated,) = (kind for kind, detector in detectors.items() if detector is model.detector)
    return results[evaluated] | results


def build_evaluator(name: str, output_dir: str | Path) -> DatasetEvaluator:
    """
    Return the evaluator of a set's `evaluator_type`: "coco" or "pascal_voc".

    VOC sets are measured by both definitions of AP, which differ by several points: "voc" is
    Detectron2's (11 points for 2007, the area for 2012; difficult objects do not count), "coco"
    has 101 points, and difficult objects count like others.

    Args:
        name: in `DatasetCatalog`. Sets without a COCO file are converted to one each time.
        output_dir: for predictions and converted annotations.

    Raises:
        InputError: as `check_evaluable`.
    """
    check_evaluable(name)
    coco = _build_coco_evaluator(name, str(output_dir))
    if MetadataCatalog.get(name).evaluator_type == "coco":
        return coco
    return _VocAndCocoEvaluator([PascalVOCDetectionEvaluator(name), coco])


def _build_coco_evaluator(name: str, output_dir: str) -> COCOEvaluator:
    arguments = {"tasks": ("bbox",), "output_dir": output_dir}
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        return COCOEvaluator(name, **arguments)
    path = os.path.join(output_dir, "annotations.json")
    if comm.is_main_process():  # the others wait for its file
        # Anew, as the file of an earlier run may be of other data.
        convert_to_coco_json(name, path, allow_cached=False)
    comm.synchronize()
    metadata.json_file = path
    try:
        return COCOEvaluator(name, **arguments)
    finally:
        del metadata.json_file  # or the set would never be converted again


class _VocAndCocoEvaluator(DatasetEvaluators):
    """Two definitions of AP on the same predictions, which Detectron2's own class cannot join."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        # Both on every rank: they gather.
        results = [evaluator.evaluate() for evaluator in self._evaluators]
        return {
            kind: {metric: float(value) for metric, value in result["bbox"].items()}
            for kind, result in zip(("voc", "coco"), results, strict=True)
            if result
        }


@contextmanager
def reading_catalog(name: str) -> Iterator[None]:
    """
    Turn what goes wrong with reading a set of `DatasetCatalog` into one line.

    Raises:
        InputError: for a name that is not registered, and files that are missing or damaged.
    """
    known = DatasetCatalog.list()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? If it is your own," if near else "first"
        raise InputError(
            f"{name}: not in DatasetCatalog; {hint} register it with register_coco_instances or "
            "DatasetCatalog.register of Detectron2"
        )
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise InputError(
            f"{name}: {error.filename or error} not found; Detectron2's own sets are below the "
            f"folder in the environment variable DETECTRON2_DATASETS, here {root!r}"
        ) from error
    # Damaged files; Detectron2 asserts what they must contain.
    except (OSError, ValueError, ParseError, AssertionError) as error:
        raise InputError(f"{name}: cannot be read; correct its files: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def test_dataset_names(cfg: CfgNode, val: DetectionDataset | None = None) -> tuple[str, ...]:
    """
    Return the sets that AP is measured on: names in `DatasetCatalog`, () for no evaluation.

    `SSOD.DATA.VAL_JSON` or `VAL_VOC` is registered under the paths of the file and its images, and
    measured as COCO measures. If `val` is given, it is what these files hold.

    Raises:
        InputError: if that file is not valid COCO; for VOC files as `read_labeled` and `read_val`
            of `ssod.data.build`, and if the labeled images are not named by their files.
    """
    files = cfg.SSOD.DATA
    if cfg.DATASETS.TEST or not (files.VAL_JSON or files.VAL_VOC):
        return tuple(cfg.DATASETS.TEST)
    path, images = map(os.path.abspath, (files.VAL_VOC or files.VAL_JSON, files.VAL_IMAGES))
    name = f"voc:{path}:{images}" if files.VAL_VOC else f"{path}:{images}"
    if name in DatasetCatalog.list():
        return (name,)
    if not files.VAL_VOC:
        if val is None:
            read_coco(path, images, skip_invalid_boxes=True)  # for its checks
        register_coco_instances(name, {}, path, images)
        return (name,)
    if cfg.DATASETS.TRAIN:
        raise InputError(
            "SSOD.DATA.VAL_VOC needs labeled images in SSOD.DATA, whose classes it has; with "
            "DATASETS.TRAIN set DATASETS.TEST instead"
        )
    if val is None:
        val = build.read_val(cfg, build.read_labeled(cfg))
    DatasetCatalog.register(name, partial(standard_format, val))
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        thing_classes=val.class_names,
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(val.category_ids)},
    )
    return (name,)


def standard_format(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """Return the images and boxes of a set as Detectron2's catalog has them."""
    return [
        {
            "file_name": record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
                for box, label in zip(record.boxes.tolist(), record.classes.tolist(), strict=True)
            ],
        }
        for record in dataset
    ]


def check_evaluable(name: str) -> None:
    """
    Make sure that a set can be evaluated.

    Raises:
        InputError: for an `evaluator_type` that is not supported, and a COCO file with annotations
            that Detectron2's evaluator fails on, or takes for never found (those with id 0).
    """
    metadata = MetadataCatalog.get(name)
    found, year = metadata.get("evaluator_type"), metadata.get("year")
    if found not in _EVALUATOR_TYPES:
        raise InputError(
            f"{name}: evaluator_type must be one of {list(_EVALUATOR_TYPES)}, got {found!r}; set "
            f"MetadataCatalog.get({name!r}).evaluator_type"
        )
    if found == "pascal_voc" and year not in _VOC_YEARS:
        raise InputError(f"{name}: year must be one of {list(_VOC_YEARS)}, got {year!r}")
    path = metadata.get("json_file")
    if not path:
        return
    with reading_catalog(name):
        annotations = json.loads(Path(path).read_bytes()).get("annotations", ())
    for index, annotation in enumerate(annotations):
        if not annotation.get("id") or not {"area", "iscrowd"} <= annotation.keys():
            raise InputError(
                f"{path}: annotations[{index}] has id {annotation.get('id')!r} and the keys "
                f"{sorted(annotation)}; to be evaluated it needs an id from 1 on, area and iscrowd"
            )


def build_test_loader(cfg: CfgNode, name: str) -> BatchLoader:
    """
    Return a loader of what Detectron2's loads of a test set, for `inference_on_dataset`.

    Raises:
        InputError: for a set that cannot be read or has other classes than the model. While
            iterating: if an image cannot be decoded or has not the size in its annotations.
    """
    with reading_catalog(name):
        loader = build_detection_test_loader(cfg, name, mapper=_TestMapper(cfg, is_train=False))
    found = len(MetadataCatalog.get(name).get("thing_classes", ()))
    expected = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if found != expected:
        number = f"MODEL.ROI_HEADS.NUM_CLASSES is {expected}"
        raise InputError(f"{name}: has {found} classes, but {number}; both must be the same")
    return BatchLoader(
        loader.dataset, list, batch_sampler=loader.batch_sampler, num_workers=loader.num_workers
    )


class _TestMapper(DatasetMapper):
    """Detectron2's mapper, except that an image that cannot be used is an `InputError`."""

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(entry)
        except Exception as error:  # decoders raise nearly any type on damaged files
            message = f"{entry['file_name']}: cannot be evaluated: {_line(error)}"
            raise InputError(message) from error
