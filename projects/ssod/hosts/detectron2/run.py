"""One run on Detectron2: its data, model, trainer, hooks and checkpoints under `OUTPUT_DIR`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_writers, hooks
from detectron2.evaluation import verify_results
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from torch import nn

from ssod.core.distributed import get_rank, get_world_size
from ssod.data.build import RunData, build_train_loader
from ssod.data.datasets import DetectionDataset
from ssod.data.loader import FailedImages
from ssod.errors import InputError
from ssod.hosts.checkpoint import load_matching, read_checkpoint
from ssod.hosts.detectron2.config import check_config
from ssod.hosts.detectron2.data import load_run_data
from ssod.hosts.detectron2.evaluation import evaluate, test_dataset_names
from ssod.hosts.detectron2.hooks import BestCheckpointer, PeriodicCheckpointer
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.detectron2.solver import build_clipper, build_optimizer
from ssod.hosts.detectron2.trainer import TeacherStudentTrainer
from ssod.hosts.detectron2.weights import load_weights
from ssod.hosts.metric_log import truncate_metrics
from ssod.hosts.monitor import choose_monitored, monitor_pseudo_labels

logger = logging.getLogger(__name__)


BEST_CHECKPOINT = "model_best"


class Checkpointer(DetectionCheckpointer):
    """Replaces a file only once the new one is complete; the best one is not the one to resume."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth with the model, what else there is to checkpoint, and `kwargs`."""
        if not self.save_to_disk:
            return
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        partial = path.with_suffix(".partial")
        torch.save({"model": self.model.state_dict()} | states | kwargs, partial)
        os.replace(partial, path)
        if name != BEST_CHECKPOINT:
            self.tag_last_checkpoint(path.name)
        logger.info("saved %s", path)


def find_checkpoint(output_dir: str) -> str:
    """Return the last checkpoint that a run has saved, "" if none."""
    return Checkpointer(nn.Module(), output_dir).get_checkpoint_file()


def is_run_checkpoint(path: str) -> bool:
    """Whether a file holds student and teacher, rather than the weights of one detector."""
    return path.endswith(".pth") and "_extra_state" in read_checkpoint(path).get("model", {})


def _check_accumulation(cfg: CfgNode) -> None:
    for key, batch in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("SSOD.DATA.UNLABELED_PER_BATCH", cfg.SSOD.DATA.UNLABELED_PER_BATCH),
    ):
        parts = cfg.SSOD.ACCUMULATE_STEPS * get_world_size()
        if batch % parts:
            raise InputError(
                f"{key} must be a multiple of the number of processes times "
                f"SSOD.ACCUMULATE_STEPS, {get_world_size()} x {cfg.SSOD.ACCUMULATE_STEPS}, "
                f"got {batch}"
            )


def _synchronize_norms(model: TeacherStudentRCNN) -> TeacherStudentRCNN:
    """Let trainable BN see all ranks: their buffers are not broadcast, so teachers would differ."""
    own = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if isinstance(m, own)]
    if get_world_size() == 1 or all(isinstance(m, NaiveSyncBatchNorm) for m in norms):
        return model
    if model.device.type != "cuda":
        raise InputError(
            "NORM BN does not synchronize several processes without GPUs; set "
            'MODEL.RESNETS.NORM (and FPN.NORM) to "GN", "FrozenBN" or "naiveSyncBN"'
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _main_metric(names: Sequence[str]) -> str:
    """Name of the metric that decides which checkpoint is the best."""
    is_voc = MetadataCatalog.get(names[0]).get("evaluator_type") == "pascal_voc"
    metric = "voc/AP50" if is_voc else "bbox/AP"
    return metric if len(names) == 1 else f"{names[0]}/{metric}"


class Run:
    """
    One run; every rank makes its own.

    Args:
        cfg: from `ssod.hosts.detectron2.config.get_config`, merged, scaled to the number of
            processes and final.
        checkpoint: file of a run to continue or evaluate; "" to start from `MODEL.WEIGHTS`.

    Raises:
        InputError: for anything in the config, the data or the checkpoint that cannot be used,
            before training starts.
    """

    def __init__(self, cfg: CfgNode, checkpoint: str = ""):
        check_config(cfg)
        _check_accumulation(cfg)
        self.cfg = cfg
        self.output = Path(cfg.OUTPUT_DIR)
        self.data: RunData = load_run_data(cfg)
        torch.manual_seed(cfg.SEED)
        self.model: TeacherStudentRCNN = _synchronize_norms(build_model(cfg))
        self.device = self.model.device
        self._results: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        if checkpoint:
            self._state = read_checkpoint(checkpoint)
            if "model" not in self._state or "trainer" not in self._state:
                raise InputError(f"{checkpoint}: not a checkpoint of a run; it cannot be continued")
            load_matching(self.model, self._state["model"], checkpoint)
            logger.info("%s is at iteration %d", checkpoint, self.model.iteration)
        elif cfg.MODEL.WEIGHTS:
            load_weights(self.model, cfg.MODEL.WEIGHTS)

    def train(self, extra_hooks: Sequence[hooks.HookBase] = ()) -> dict[str, Any]:
        """
        Train up to `SOLVER.MAX_ITER`, evaluating and saving on the way and at the end.

        Args:
            extra_hooks: run after those of the config.

        Returns:
            The last evaluation's results on the main rank, as `evaluate`.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        start_iter = self.model.iteration
        if comm.is_main_process():  # before the writers open the file
            # Detectron2 logs the iteration that has just begun, counted from 0.
            truncate_metrics(self.output, start_iter - 1)
        trainer = self._build_trainer()
        trainer.register_hooks([*self._build_hooks(trainer), *extra_hooks])
        if self._state:
            trainer.load_state_dict(self._state["trainer"])
            self._state = {}
        trainer.train(start_iter, self.cfg.SOLVER.MAX_ITER)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._results)
        return self._results

    def evaluate(self) -> dict[str, Any]:
        """
        Measure the student and, once it has started, the teacher; every rank must call it.

        Returns:
            `bbox/AP` and so on of the model of `SSOD.EVAL_MODEL`, nested as Detectron2 does, the
            same of `student` and `teacher`, and `pseudo` where hidden truth is known.
        """
        results = evaluate(self.model, self.cfg, self.cfg.OUTPUT_DIR)
        if comm.is_main_process() and self._monitored:
            results |= monitor_pseudo_labels(self.model, self._monitored, self.cfg, self.device)
        self._results = results
        return results

    @cached_property
    def _monitored(self) -> DetectionDataset | None:
        return choose_monitored(self.data.hidden_truth)

    def _build_trainer(self) -> TeacherStudentTrainer:
        cfg, is_cuda = self.cfg, self.device.type == "cuda"
        optimizer = build_optimizer(cfg, self.model.student)
        loader = build_train_loader(
            cfg,
            self.data,
            self.model.iteration,
            rank=get_rank(),
            world_size=get_world_size(),
            pin_memory=is_cuda,
        )
        return TeacherStudentTrainer(
            create_ddp_model(
                self.model,
                broadcast_buffers=False,
                device_ids=[comm.get_local_rank()] if is_cuda else None,
            ),
            loader,
            optimizer,
            seed=cfg.SEED,
            log_period=cfg.SSOD.LOG_PERIOD,
            max_skipped_steps=cfg.SSOD.MAX_SKIPPED_STEPS,
            failed=FailedImages(cfg.SSOD.DATA.MAX_FAILED_SHARE),
            amp_dtype=getattr(torch, cfg.SSOD.AMP_DTYPE) if cfg.SOLVER.AMP.ENABLED else None,
            accumulate_steps=cfg.SSOD.ACCUMULATE_STEPS,
            clipper=build_clipper(cfg),
        )

    def _build_hooks(self, trainer: TeacherStudentTrainer) -> list[hooks.HookBase]:
        """Detectron2's hooks, in its order: save, then evaluate, then write."""
        cfg = self.cfg
        names = test_dataset_names(cfg)
        checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=trainer)
        found = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=build_lr_scheduler(cfg, trainer.optimizer)),
        ]
        if comm.is_main_process():
            keep = cfg.SSOD.CHECKPOINTS_TO_KEEP
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            found.append(PeriodicCheckpointer(checkpointer, period, max_to_keep=keep))
        if names:
            found.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            if names:
                metric = _main_metric(names)
                found.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, checkpointer, metric))
            writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
            found.append(hooks.PeriodicWriter(writers, cfg.SSOD.LOG_PERIOD))
        return found
