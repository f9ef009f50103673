"""One run of the torchvision host: one process, one device."""

from __future__ import annotations

import argparse
import json
import logging
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import RunData, build_train_loader, load_run_data, read_labeled, read_val
from ssod.data.coco import to_coco
from ssod.data.datasets import DetectionDataset
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import LOW_FLOOR_AP, LOW_SCORE_FLOOR, coco_metrics
from ssod.files import replacing
from ssod.hosts.checkpoint import read_checkpoint
from ssod.hosts.inference import detect
from ssod.hosts.protocol import CONFIG_NAME
from ssod.hosts.run import BaseRun, choose_checkpoint, detectors_of
from ssod.hosts.step import TrainingStep
from ssod.hosts.torchvision.build import build_model, build_optimizer
from ssod.hosts.torchvision.metric_writer import MetricLog, read_evaluation
from ssod.hosts.torchvision.schedule import learning_rate
from ssod.hosts.torchvision.weights import load_weights
from ssod.progress import progress_bar

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pth"
NO_IMAGES = DetectionDataset([], [], [])


def find_checkpoint(output_dir: str | Path) -> str:
    """Return the checkpoint that a run has saved, "" if none."""
    path = Path(output_dir) / CHECKPOINT_NAME
    return str(path) if path.exists() else ""


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """
    Train or evaluate as a command line says, and return the results.

    Raises:
        InputError: as `Run` and `choose_checkpoint`, and if there is nothing to evaluate on.
    """
    checkpoint = choose_checkpoint(cfg, find_checkpoint(cfg.OUTPUT_DIR), args)
    run = Run(cfg, checkpoint, for_training=not args.eval_only)
    if not args.eval_only:
        return run.train()
    if run.val is None:
        raise InputError("--eval-only needs a validation set; set SSOD.DATA.VAL_JSON or VAL_VOC")
    return run.evaluate()


class Run(BaseRun):
    """Data, model, optimizer, logs and checkpoint; see `BaseRun`."""

    def _load_data(self) -> RunData:
        return load_run_data(self.cfg)

    def _build_model(self) -> TeacherStudent:
        return build_model(self.cfg).to(self.device).train()

    def _build_step(self) -> TrainingStep:
        return TrainingStep(self.cfg, self.model, build_optimizer(self.cfg, self.model), self.data)

    def _load_weights(self, path: str) -> None:
        load_weights(self.model.student, path)

    def _read_checkpoint(self, path: str | Path) -> dict[str, Any]:
        state = read_checkpoint(path)
        if "model" not in state or "optimizer" not in state:
            raise InputError(f"{path}: not a checkpoint of a run; it cannot be resumed")
        return state

    @cached_property
    def val(self) -> DetectionDataset | None:
        """The images that AP is measured on, None if the config names none."""
        if self.data is not None:
            return self.data.val
        # Only Pascal VOC files take their classes from the labeled ones.
        is_voc, num_classes = self.cfg.SSOD.DATA.VAL_VOC, self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        val = read_val(self.cfg, read_labeled(self.cfg) if is_voc else NO_IMAGES)
        if val is not None and val.num_classes != num_classes:
            raise InputError(
                f"the validation set has {val.num_classes} categories, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; both must be the same"
            )
        return val

    def train(self, title: str = "training") -> dict[str, float]:
        """
        Train up to `SOLVER.MAX_ITER` under a bar with a title, evaluating and saving on the way.

        Returns:
            The last evaluation's metrics, empty without a validation set.
        """
        # A run may have been stopped between a checkpoint and its evaluation.
        results = read_evaluation(self.output, self.model.iteration)
        if self.model.iteration >= self.cfg.SOLVER.MAX_ITER and (results or not self.data.val):
            logger.info("nothing left to train in %s", self.output)
            return results
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise InputError(f"OUTPUT_DIR {self.output} cannot be made: {reason}") from error
        (self.output / CONFIG_NAME).write_text(self.cfg.dump())
        with MetricLog(self.output, self.model.iteration) as log:
            results = results or self._evaluate_if_due(log)
            return self._train(log, title) or results

    def _train(self, log: MetricLog, title: str) -> dict[str, float]:
        results: dict[str, float] = {}
        seconds = {"time/data": 0.0, "time/step": 0.0}
        logged, total = self.model.iteration, self.cfg.SOLVER.MAX_ITER
        pin_memory = self.device.type == "cuda"
        loader = build_train_loader(self.cfg, self.data, logged, pin_memory=pin_memory)
        with progress_bar(total=total, initial=logged, desc=title, unit="it") as progress:
            previous = time.perf_counter()
            for batch in loader:
                fetched = time.perf_counter()
                self.step.prepare()
                started = time.perf_counter()
                for group in self.step.optimizer.param_groups:
                    group["lr"] = learning_rate(self.cfg, self.model.iteration)
                self.step(batch)
                # Reading waits for the device, so it comes before the clock is read.
                values = self.step.read_metrics() if self.step.is_log_due else {}
                now = time.perf_counter()
                seconds["time/data"] += fetched - previous
                seconds["time/step"] += now - started + fetched - previous
                progress.update()
                if values:
                    count = self.model.iteration - logged
                    values["lr"] = self.step.optimizer.param_groups[0]["lr"]
                    values |= {name: value / count for name, value in seconds.items()}
                    log.write(self.model.iteration, values)
                    progress.set_postfix(loss=f"{values['total_loss']:.2f}")
                    seconds, logged = dict.fromkeys(seconds, 0.0), self.model.iteration
                # Saved before it is evaluated: a broken validation image must cost no training.
                if self._is_due(self.cfg.SOLVER.CHECKPOINT_PERIOD) or self._evaluation_is_due():
                    self._save()
                results = self._evaluate_if_due(log) or results
                previous = time.perf_counter()
        return results

    def _evaluate_if_due(self, log: MetricLog) -> dict[str, float]:
        if not self._evaluation_is_due():
            return {}
        results = self.evaluate()
        log.write(self.model.iteration, results)
        return results

    def _evaluation_is_due(self) -> bool:
        return self.data.val is not None and self._is_due(self.cfg.TEST.EVAL_PERIOD)

    def _is_due(self, period: int) -> bool:
        done = self.model.iteration
        at_end = done >= self.cfg.SOLVER.MAX_ITER
        return at_end or (done > 0 and period > 0 and done % period == 0)

    def _save(self) -> None:
        """Replace the checkpoint, once the new one is complete."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise InputError(
                f"iteration {self.model.iteration}: the weights are not finite; the last "
                "checkpoint is kept. Start from other MODEL.WEIGHTS or lower SOLVER.BASE_LR"
            )
        content = {
            "model": self.model.state_dict(),
            **self.step.state_dict(),
            "config": self.cfg.dump(),
            "categories": self.data.labeled.categories,
        }
        with replacing(self.output / CHECKPOINT_NAME) as partial:
            torch.save(content, partial)

    def _measure(self) -> dict[str, float]:
        val, metrics = self.val, {}
        if val is None:
            return metrics
        folder = self.output / "inference"
        folder.mkdir(parents=True, exist_ok=True)
        truth = self.cfg.SSOD.DATA.VAL_JSON or to_coco(val)
        for name, detector in detectors_of(self.model).items():
            floors = (detector.score_floor, LOW_SCORE_FLOOR)
            results, at_low_floor = detect(detector, val, self.cfg, self.device, floors)
            (folder / f"coco_instances_results_{name}.json").write_text(json.dumps(results))
            values = coco_metrics(truth, results)
            values[LOW_FLOOR_AP] = coco_metrics(truth, at_low_floor)["AP"]
            metrics |= {f"{name}/{key}": value for key, value in values.items()}
        return metrics
