"""AP at a lower score floor beside that of the config, from one pass of the network."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from typing import Any

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN

from ssod.evaluation.coco_metrics import LOW_FLOOR_AP, LOW_SCORE_FLOOR
from ssod.hosts.detectron2.adapter import Detectron2RCNN

_LOW = "instances_at_low_floor"
_silent = logging.getLogger(f"{__name__}.silent")
_silent.setLevel(logging.CRITICAL)


def detect_at_both_floors(
    detector: Detectron2RCNN, inputs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """
    Detect as `GeneralizedRCNN` does, and add what it would find at `LOW_SCORE_FLOOR`.

    The network runs once. Suppression runs at each floor: to the last bit, its result depends on
    boxes of low scores too, so that dropping those afterwards would not always give the same.

    Args:
        detector: in eval mode.
        inputs: of N images, as the detector takes them.

    Returns:
        N dictionaries of `instances` and, for `BothFloors`, those at the lower floor.
    """
    predictor, calls = detector.roi_heads.box_predictor, []
    suppress = predictor.inference

    def remember(*scored: Any) -> Any:
        calls.append(scored)
        return suppress(*scored)

    predictor.inference = remember
    try:
        outputs = detector(inputs)
    finally:
        del predictor.inference  # the class's own is there again
    ((predictions, proposals),) = calls
    with detector.at_score_floor(LOW_SCORE_FLOOR):
        found, _ = suppress(predictions, proposals)
    sizes = [proposal.image_size for proposal in proposals]
    at_low_floor = GeneralizedRCNN._postprocess(found, inputs, sizes)
    return [
        output | {_LOW: low["instances"]} for output, low in zip(outputs, at_low_floor, strict=True)
    ]


class BothFloors(DatasetEvaluator):
    """
    An evaluator's results, and `LOW_FLOOR_AP` beside each AP; for `detect_at_both_floors`.

    Only those of the config's floor are printed and written.

    Args:
        evaluator: of `build_evaluator`.
    """

    def __init__(self, evaluator: DatasetEvaluator):
        self._evaluator = evaluator
        self._low = _silent_copy(evaluator)

    def reset(self) -> None:
        """Forget all images."""
        self._evaluator.reset()
        self._low.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in N images and what `detect_at_both_floors` found in them."""
        self._evaluator.process(inputs, outputs)
        self._low.process(inputs, [{"instances": output[_LOW]} for output in outputs])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the results; every rank must call it, and all but the first get none."""
        results = self._evaluator.evaluate() or {}
        with contextlib.redirect_stdout(io.StringIO()):
            at_low_floor = self._low.evaluate() or {}
        for kind, metrics in results.items():
            metrics[LOW_FLOOR_AP] = at_low_floor[kind]["AP"]
        return results


def _silent_copy(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """A copy that shares the truth, but neither predictions nor output."""
    twin = copy.copy(evaluator)
    if isinstance(evaluator, DatasetEvaluators):
        twin._evaluators = [_silent_copy(part) for part in evaluator._evaluators]
    else:
        twin._output_dir, twin._logger = None, _silent
    return twin
