"""The training loop of the torchvision host: one process, one device."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from functools import cached_property
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ssod.core.distributed import mean_over_ranks, seed_step
from ssod.core.structures import TwoStreamBatch
from ssod.data.build import RunData, load_run_data
from ssod.data.datasets import DetectionDataset
from ssod.data.images import is_readable
from ssod.data.loader import FailedImages, build_two_stream_loader
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import coco_metrics
from ssod.evaluation.pseudo_labels import pseudo_label_quality
from ssod.hosts.torchvision.build import build_model, select_device
from ssod.hosts.torchvision.checkpoint import (
    CHECKPOINT_NAME,
    load_matching,
    read_checkpoint,
    save_checkpoint,
)
from ssod.hosts.torchvision.inference import detect, label_images
from ssod.hosts.torchvision.metric_log import MetricLog, read_evaluation
from ssod.hosts.torchvision.solver import build_optimizer, learning_rate

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
LOG_PERIOD = 20  # iterations between two lines of metrics, each of which waits for the device
MONITORED_IMAGES = 100  # unlabeled images whose pseudo-labels are compared with hidden truth


def _flips(cfg: CfgNode) -> bool:
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise InputError(
            f'INPUT.RANDOM_FLIP must be "horizontal" or "none", got {cfg.INPUT.RANDOM_FLIP!r}'
        )
    return cfg.INPUT.RANDOM_FLIP == "horizontal"


class Trainer:
    """
    One run: data, model, optimizer, logs and checkpoint under `OUTPUT_DIR`.

    Args:
        cfg: from `ssod.hosts.torchvision.config.get_config`, merged and final.
        resume: continue from `OUTPUT_DIR/checkpoint.pth` if it exists.

    Raises:
        InputError: for anything in the config, the data or the checkpoint that cannot be used,
            before training starts.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False):
        self.cfg = cfg
        self.device = select_device(cfg)
        self.output = Path(cfg.OUTPUT_DIR)
        self.checkpoint = self.output / CHECKPOINT_NAME
        self.data: RunData = load_run_data(cfg)
        self.model = build_model(cfg).to(self.device).train()
        self.optimizer = build_optimizer(cfg, self.model)
        if self.checkpoint.exists():
            if not resume:
                raise InputError(
                    f"{self.checkpoint} is of an earlier run; continue it with --resume, or choose "
                    "another OUTPUT_DIR"
                )
            self._load_checkpoint()
        self.failed = FailedImages(cfg.SSOD.DATA.MAX_FAILED_SHARE)

    def _load_checkpoint(self) -> None:
        state = read_checkpoint(self.checkpoint)
        if "model" not in state or "optimizer" not in state:
            raise InputError(f"{self.checkpoint}: not a checkpoint of a run; it cannot be resumed")
        load_matching(self.model, state["model"], self.checkpoint)
        try:
            # Loading another optimizer's state succeeds; its first step would fail.
            name = state.get("optimizer_name")
            if name != type(self.optimizer).__name__:
                raise ValueError(f"it is of {name}")
            groups = [dict(group, params=None) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            # The momentum and decay of this config, not of the one that was saved.
            for loaded, group in zip(self.optimizer.param_groups, groups, strict=True):
                loaded.update({k: v for k, v in group.items() if k != "params"})
        except ValueError as error:
            raise InputError(
                f"{self.checkpoint}: its optimizer does not fit SSOD.OPTIMIZER "
                f"{self.cfg.SSOD.OPTIMIZER!r}: {error}"
            ) from error
        logger.info("resumed %s at iteration %d", self.checkpoint, self.model.iteration)

    def train(self, title: str = "training") -> dict[str, float]:
        """
        Train up to `SOLVER.MAX_ITER`, evaluating and saving on the way and at the end.

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
        logged = self.model.iteration
        with self._progress_bar(title) as progress:
            previous = time.perf_counter()
            for batch in self._loader(self.model.iteration):
                fetched = time.perf_counter()
                losses = self._step(batch)
                # Reading waits for the device, so it comes before the clock is read.
                values = self._read_metrics(losses) if self._is_due(LOG_PERIOD) else {}
                now = time.perf_counter()
                seconds["time/data"] += fetched - previous
                seconds["time/step"] += now - previous
                progress.update()
                if values:
                    count = self.model.iteration - logged
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

    def _progress_bar(self, title: str) -> tqdm:
        return tqdm(
            total=self.cfg.SOLVER.MAX_ITER,
            initial=self.model.iteration,
            desc=title,
            unit="it",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def _is_due(self, period: int) -> bool:
        done = self.model.iteration
        at_end = done >= self.cfg.SOLVER.MAX_ITER
        return at_end or (done > 0 and period > 0 and done % period == 0)

    def _loader(self, start_iter: int) -> torch.utils.data.DataLoader:
        cfg = self.cfg
        return build_two_stream_loader(
            self.data.labeled,
            self.data.unlabeled if cfg.SSOD.UNSUP_LOSS_WEIGHT > 0 else None,
            labeled_batch=cfg.SOLVER.IMS_PER_BATCH,
            unlabeled_batch=cfg.SSOD.DATA.UNLABELED_PER_BATCH,
            burn_in_iters=cfg.SSOD.BURN_IN_ITERS,
            seed=cfg.SEED,
            start_iter=start_iter,
            max_iter=cfg.SOLVER.MAX_ITER,
            min_sizes=cfg.INPUT.MIN_SIZE_TRAIN,
            max_size=cfg.INPUT.MAX_SIZE_TRAIN,
            flip=_flips(cfg),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            pin_memory=self.device.type == "cuda",
            labeled_strong=cfg.SSOD.LABELED_VIEWS != "weak",
        )

    def _step(self, batch: TwoStreamBatch) -> dict[str, Tensor]:
        """One optimizer step; returns detached losses."""
        self.failed.update(batch)
        cfg, model = self.cfg, self.model
        seed_step(cfg.SEED, model.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, model.iteration)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            losses = model(batch.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            clip_grad_norm_(model.student.parameters(), cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
        self.optimizer.step()
        model.after_step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _read_metrics(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Copy losses and metrics to the host; waits for the device."""
        values = mean_over_ranks(losses | self.model.metrics)
        values["total_loss"] = sum(values[name] for name in losses)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(values["total_loss"]):
            raise InputError(self._diverged(f"the loss is not finite: {values}"))
        return values

    def _diverged(self, what: str) -> str:
        return (
            f"iteration {self.model.iteration}: {what}; the last checkpoint is kept. "
            "Lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.student.parameters()):
            raise InputError(self._diverged("the weights are not finite"))
        save_checkpoint(self.checkpoint, self.model, self.optimizer, self.cfg.dump())

    def evaluate(self) -> dict[str, float]:
        """
        Measure the student and, once it has started, the teacher.

        Returns:
            `student/AP`, `teacher/AP` and so on in percent, and `pseudo/precision`,
            `pseudo/recall` and boxes per image where hidden truth is named; empty without a
            validation set. The predictions are written to `OUTPUT_DIR/inference`.
        """
        metrics: dict[str, float] = {}
        if self.data.val is None:
            return metrics
        detectors = {"student": self.model.student}
        if self.model.teacher_started:
            detectors["teacher"] = self.model.teacher
        (self.output / "inference").mkdir(parents=True, exist_ok=True)
        for name, detector in detectors.items():
            results = detect(detector, self.data.val, self.cfg, self.device)
            path = self.output / "inference" / f"coco_instances_results_{name}.json"
            path.write_text(json.dumps(results))
            values = coco_metrics(self.cfg.SSOD.DATA.VAL_JSON, results)
            metrics |= {f"{name}/{key}": value for key, value in values.items()}
        return metrics | self._monitor_pseudo_labels()

    @cached_property
    def _monitored(self) -> DetectionDataset | None:
        """Some unlabeled images with hidden truth; like training, it tolerates broken ones."""
        truth = self.data.hidden_truth
        if truth is None:
            return None
        first = (truth[i] for i in range(min(MONITORED_IMAGES, len(truth))))
        return truth.select([record.image_id for record in first if is_readable(record.file_name)])

    def _monitor_pseudo_labels(self) -> dict[str, float]:
        """Compare pseudo-labels with the hidden truth of some unlabeled images."""
        images = self._monitored
        if not images or not self.model.teacher_started:
            return {}
        labeled = label_images(self.model, images, self.cfg, self.device)
        quality = pseudo_label_quality(
            [found.boxes for _, found in labeled],
            [found.scores for _, found in labeled],
            [found.classes for _, found in labeled],
            [torch.from_numpy(record.boxes) for record, _ in labeled],
            [torch.from_numpy(record.classes) for record, _ in labeled],
            images.num_classes,
        )
        return {
            "pseudo/precision": quality.precision,
            "pseudo/recall": quality.recall,
            "pseudo/boxes_per_image": quality.num_per_image,
            "pseudo/true_boxes_per_image": quality.true_per_image,
        }
