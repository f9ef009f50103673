"""The training loop of the torchvision host: one process, one device."""

from __future__ import annotations

import json
import logging
import math
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
from ssod.data.build import RunData, build_train_loader, load_run_data
from ssod.data.coco import to_coco
from ssod.data.datasets import DetectionDataset
from ssod.data.loader import FailedImages
from ssod.errors import InputError
from ssod.evaluation.coco_metrics import coco_metrics
from ssod.hosts.checkpoint import load_teacher_student, read_checkpoint
from ssod.hosts.inference import detect
from ssod.hosts.monitor import (
    WeightAlarm,
    choose_monitored,
    divide_sums,
    monitor_pseudo_labels,
)
from ssod.hosts.protocol import CONFIG_NAME
from ssod.hosts.sweep import sweep_if_due, tell_labels
from ssod.hosts.torchvision.build import build_model, select_device
from ssod.hosts.torchvision.metric_writer import MetricLog, read_evaluation
from ssod.hosts.torchvision.solver import build_optimizer, learning_rate
from ssod.hosts.torchvision.weights import CHECKPOINT_NAME, save_checkpoint
from ssod.progress import progress_bar

logger = logging.getLogger(__name__)


class Trainer:
    """
    One run: data, model, optimizer, logs and checkpoint under `OUTPUT_DIR`.

    Args:
        cfg: from `ssod.hosts.torchvision.defaults.get_config`, merged and final.
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
        tell_labels(self.model, self.data)
        self.failed = FailedImages(cfg.SSOD.DATA.MAX_FAILED_SHARE)
        self.alarm = WeightAlarm(self.model.pseudo_label_filter.is_soft)

    def _load_checkpoint(self) -> None:
        state = read_checkpoint(self.checkpoint)
        if "model" not in state or "optimizer" not in state:
            raise InputError(f"{self.checkpoint}: not a checkpoint of a run; it cannot be resumed")
        load_teacher_student(self.model, state["model"], self.checkpoint)
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
                f"{self.cfg.SSOD.OPTIMIZER!r}: {error}; "
                "set it, and SSOD.LSM.ENABLED and HEAD, as they were"
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
        pin_memory = self.device.type == "cuda"
        loader = build_train_loader(self.cfg, self.data, logged, pin_memory=pin_memory)
        with self._progress_bar(title) as progress:
            previous = time.perf_counter()
            for batch in loader:
                fetched = time.perf_counter()
                sweep_if_due(self.model, self.data, self.cfg, self.device)
                started = time.perf_counter()
                losses = self._step(batch)
                # Reading waits for the device, so it comes before the clock is read.
                values = (
                    self._read_metrics(losses) if self._is_due(self.cfg.SSOD.LOG_PERIOD) else {}
                )
                now = time.perf_counter()
                seconds["time/data"] += fetched - previous
                seconds["time/step"] += now - started + fetched - previous
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
        return progress_bar(
            total=self.cfg.SOLVER.MAX_ITER,
            initial=self.model.iteration,
            desc=title,
            unit="it",
        )

    def _is_due(self, period: int) -> bool:
        done = self.model.iteration
        at_end = done >= self.cfg.SOLVER.MAX_ITER
        return at_end or (done > 0 and period > 0 and done % period == 0)

    def _step(self, batch: TwoStreamBatch) -> dict[str, Tensor]:
        """One optimizer step; returns detached losses."""
        self.failed.update(batch)
        cfg, model = self.cfg, self.model
        seed_step(cfg.SEED, model.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, model.iteration)
        had_teacher = model.teacher_started
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            losses = model(batch.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            parameters = [p for p in model.parameters() if p.requires_grad]
            clip_grad_norm_(parameters, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
        self.optimizer.step()
        model.after_step()
        if model.teacher_started and not had_teacher:
            model.reset_branch_state(self.optimizer)
        return {name: loss.detach() for name, loss in losses.items()}

    def _read_metrics(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Copy losses and metrics to the host; waits for the device."""
        self.failed.check()
        values = divide_sums(mean_over_ranks(losses | self.model.metrics))
        values["total_loss"] = sum(values[name] for name in losses)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(values["total_loss"]):
            raise InputError(self._diverged(f"the loss is not finite: {values}"))
        self.alarm.update(self.model.iteration, values)
        return values

    def _diverged(self, what: str) -> str:
        return (
            f"iteration {self.model.iteration}: {what}; the last checkpoint is kept. "
            "Lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise InputError(self._diverged("the weights are not finite"))
        categories = self.data.labeled.categories
        config = self.cfg.dump()
        save_checkpoint(self.checkpoint, self.model, self.optimizer, config, categories)

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
        truth = self.cfg.SSOD.DATA.VAL_JSON or to_coco(self.data.val)
        for name, detector in detectors.items():
            results = detect(detector, self.data.val, self.cfg, self.device)
            path = self.output / "inference" / f"coco_instances_results_{name}.json"
            path.write_text(json.dumps(results))
            values = coco_metrics(truth, results)
            metrics |= {f"{name}/{key}": value for key, value in values.items()}
        quality = monitor_pseudo_labels(self.model, self._monitored, self.cfg, self.device)
        return metrics | quality

    @cached_property
    def _monitored(self) -> DetectionDataset | None:
        return choose_monitored(self.data.hidden_truth)
