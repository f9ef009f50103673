"""One run on Detectron2: its data, model, trainer, hooks and checkpoints under `OUTPUT_DIR`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_writers, hooks
from detectron2.evaluation.testing import flatten_results_dict
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
from ssod.files import replacing
from ssod.hosts.checkpoint import load_teacher_student, read_checkpoint
from ssod.hosts.detectron2.catalog import load_run_data
from ssod.hosts.detectron2.defaults import check_config
from ssod.hosts.detectron2.evaluators import evaluate, test_dataset_names
from ssod.hosts.detectron2.hooks import (
    BEST_CHECKPOINT,
    BestCheckpointer,
    EvalHook,
    PeriodicCheckpointer,
)
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.detectron2.solver import build_clipper, build_optimizer
from ssod.hosts.detectron2.trainer import TeacherStudentTrainer
from ssod.hosts.detectron2.weights import load_weights, local_path
from ssod.hosts.metric_log import LOG_NAME, read_metrics, truncate_metrics
from ssod.hosts.monitor import choose_monitored, monitor_pseudo_labels
from ssod.hosts.sweep import sweep_if_due, tell_labels

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """
    Replaces a file only once the new one is complete; the best one is not the one to resume.

    Args:
        constants: saved with the states: the run's config as YAML and its categories.
    """

    def __init__(self, *args: Any, constants: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._constants = constants or {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth with the model, what else there is to checkpoint, and `kwargs`."""
        if not self.save_to_disk:
            return
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        content = {"model": self.model.state_dict()} | self._constants | states | kwargs
        with replacing(path) as partial:
            torch.save(content, partial)
        if name != BEST_CHECKPOINT:
            with replacing(path.with_name("last_checkpoint")) as partial:
                partial.write_text(path.name)
        logger.info("saved %s", path)


def find_checkpoint(output_dir: str) -> str:
    """Return the last checkpoint that a run has saved, "" if none."""
    return Checkpointer(nn.Module(), output_dir).get_checkpoint_file()


def is_run_checkpoint(path: str) -> bool:
    """Whether a file holds student and teacher, rather than the weights of one detector."""
    path = local_path(path)
    return path.endswith(".pth") and "_extra_state" in read_checkpoint(path).get("model", {})


def _check_same_world(cfg: CfgNode, saved: str, checkpoint: str) -> None:
    """Refuse to continue a schedule that was scaled to another number of processes."""
    before = yaml.safe_load(saved)["SOLVER"]["REFERENCE_WORLD_SIZE"]
    now = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if before and now and before != now:
        raise InputError(
            f"{checkpoint}: its schedule is for {before} processes, but there are {now}; continue "
            f"with {before}"
        )


def build_checked(function: Callable[..., Any], cfg: CfgNode, *args: Any) -> Any:
    """Turn what Detectron2 says of a config that does not fit into one line."""
    try:
        return function(cfg, *args)
    except InputError:
        raise
    except (KeyError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the config does not fit Detectron2: {reason}") from error


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
        cfg: from `ssod.hosts.detectron2.defaults.get_config`, merged, scaled to the number of
            processes and final.
        checkpoint: file of a run to continue or evaluate; "" to start from `MODEL.WEIGHTS`.
        for_training: False for evaluation alone, which needs no training images.

    Raises:
        InputError: for anything in the config, the data or the checkpoint that cannot be used,
            before training starts.
    """

    def __init__(self, cfg: CfgNode, checkpoint: str = "", for_training: bool = True):
        check_config(cfg)
        if for_training:
            _check_accumulation(cfg)
        self.cfg = cfg
        self.output = Path(cfg.OUTPUT_DIR)
        self.data: RunData | None = load_run_data(cfg) if for_training else None
        torch.manual_seed(cfg.SEED)
        self.model: TeacherStudentRCNN = _synchronize_norms(build_checked(build_model, cfg))
        self.device = self.model.device
        self._results: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        if checkpoint:
            checkpoint = local_path(checkpoint)
            self._state = read_checkpoint(checkpoint)
            if not {"model", "trainer", "config"} <= self._state.keys():
                raise InputError(f"{checkpoint}: not a checkpoint of a run; it cannot be continued")
            if for_training:
                _check_same_world(cfg, self._state["config"], checkpoint)
            load_teacher_student(self.model, self._state["model"], checkpoint)
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
        start_iter, max_iter = self.model.iteration, self.cfg.SOLVER.MAX_ITER
        if len(set(comm.all_gather(start_iter))) > 1:
            raise InputError(
                f"{self.output}: the processes found different checkpoints in it; OUTPUT_DIR must "
                "be one folder that all machines see"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        if comm.is_main_process():  # before the writers open the file
            # Detectron2 logs the iteration that has just begun, counted from 0.
            truncate_metrics(self.output, start_iter - 1)
        tell_labels(self.model, self.data)
        trainer = self._build_trainer()
        trainer.register_hooks([*self._build_hooks(trainer), *extra_hooks])
        if self._state:
            trainer.load_state_dict(self._state["trainer"])
            self._state = {}
        if start_iter >= max_iter:
            return self._evaluate_again()
        trainer.train(start_iter, max_iter)
        return self._results

    def _evaluate_again(self) -> dict[str, Any]:
        """Evaluate a finished run, which may have been stopped before its last evaluation."""
        results = self.evaluate()
        last = self.cfg.SOLVER.MAX_ITER - 1
        lines = [line for line in read_metrics(self.output) if line["iteration"] == last]
        flat = flatten_results_dict(results)
        if flat and not any(line.keys() >= flat.keys() for line in lines):
            with (self.output / LOG_NAME).open("a") as file:
                file.write(json.dumps({"iteration": last} | flat) + "\n")
        return results

    def evaluate(self) -> dict[str, Any]:
        """
        Measure the student and, once it has started, the teacher; every rank must call it.

        Returns:
            `bbox/AP` and so on of the model of `SSOD.EVAL_MODEL`, nested as Detectron2 does, the
            same of `student` and `teacher`, and in a training `pseudo/precision` and so on where
            hidden truth is known.
        """
        results = evaluate(self.model, self.cfg, self.cfg.OUTPUT_DIR)
        if self.data is not None and comm.is_main_process():
            results |= monitor_pseudo_labels(self.model, self._monitored, self.cfg, self.device)
        self._results = results
        return results

    @cached_property
    def _monitored(self) -> DetectionDataset | None:
        return choose_monitored(self.data.hidden_truth)

    def _build_trainer(self) -> TeacherStudentTrainer:
        cfg, is_cuda = self.cfg, self.device.type == "cuda"
        optimizer = build_optimizer(cfg, self.model)
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
        saved = {"config": cfg.dump(), "categories": self.data.labeled.categories}
        checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=trainer, constants=saved)
        scheduler = build_checked(build_lr_scheduler, cfg, trainer.optimizer)
        # A function of the iteration alone, so the config's may be changed during a run.
        scheduler.last_epoch = self.model.iteration
        for group, lr in zip(trainer.optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = lr
        sweep = hooks.CallbackHook(
            before_step=lambda _: sweep_if_due(self.model, self.data, cfg, self.device)
        )
        found = [sweep, hooks.IterationTimer(), hooks.LRScheduler(scheduler=scheduler)]
        if comm.is_main_process():
            period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SSOD.CHECKPOINTS_TO_KEEP
            found.append(PeriodicCheckpointer(checkpointer, period, max_to_keep=keep))
        if names:
            found.append(EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            if names:
                found.append(BestCheckpointer(checkpointer, _main_metric(names)))
            writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
            found.append(hooks.PeriodicWriter(writers, cfg.SSOD.LOG_PERIOD))
        return found
