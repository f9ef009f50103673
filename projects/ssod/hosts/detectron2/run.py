"""One run on Detectron2: its data, model, trainer, hooks and checkpoints under `OUTPUT_DIR`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from detectron2.utils import comm
from torch import nn

from ssod.core.distributed import get_rank, get_world_size
from ssod.data.build import RunData, build_train_loader
from ssod.errors import InputError
from ssod.files import replacing
from ssod.hosts import optimizer
from ssod.hosts.checkpoint import read_checkpoint
from ssod.hosts.detectron2.catalog import load_run_data
from ssod.hosts.detectron2.defaults import check_config
from ssod.hosts.detectron2.evaluators import evaluate, test_dataset_names
from ssod.hosts.detectron2.hooks import (
    BEST_CHECKPOINT,
    EvalAfterStepHook,
    KeepingPeriodicCheckpointer,
    ResumedBestCheckpointer,
)
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from ssod.hosts.detectron2.trainer import TeacherStudentTrainer
from ssod.hosts.detectron2.weights import load_weights, local_path
from ssod.hosts.metric_log import LOG_NAME, read_metrics, truncate_metrics
from ssod.hosts.run import BaseRun
from ssod.hosts.step import TrainingStep

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


def _check_same_world(cfg: CfgNode, saved: str, checkpoint: str | Path) -> None:
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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build `SSOD.OPTIMIZER` over what is trainable, in Detectron2's parameter groups."""
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return optimizer.build_optimizer(cfg, groups, nesterov=solver.NESTEROV)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """`TrainerBase.train` logs a traceback of whatever ends it; not of input errors here."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], InputError))

    host_logger = logging.getLogger("detectron2.engine.train_loop")
    host_logger.addFilter(is_wanted)
    try:
        yield
    finally:
        host_logger.removeFilter(is_wanted)


def _main_metric(names: Sequence[str]) -> str:
    """Name of the metric that decides which checkpoint is the best."""
    is_voc = MetadataCatalog.get(names[0]).get("evaluator_type") == "pascal_voc"
    metric = "voc/AP50" if is_voc else "bbox/AP"
    return metric if len(names) == 1 else f"{names[0]}/{metric}"


class Run(BaseRun):
    """
    Data, model, trainer, hooks and checkpoints; see `BaseRun`.

    Not a `DefaultTrainer`: that builds loaders of dictionaries, an optimizer of its own clipping,
    and hooks whose evaluation is logged at an iteration that does not exist.

    Attributes:
        trainer: for Detectron2's hooks; only of a run that trains.
    """

    def __init__(self, cfg: CfgNode, checkpoint: str | Path = "", for_training: bool = True):
        check_config(cfg)
        self._results: dict[str, Any] = {}
        super().__init__(cfg, checkpoint and local_path(str(checkpoint)), for_training)

    def _load_data(self) -> RunData:
        return load_run_data(self.cfg)

    def _build_model(self) -> TeacherStudentRCNN:
        return _synchronize_norms(build_checked(build_model, self.cfg))

    def _build_step(self) -> TrainingStep:
        cfg, is_cuda = self.cfg, self.device.type == "cuda"
        model = create_ddp_model(
            self.model,
            broadcast_buffers=False,
            device_ids=[comm.get_local_rank()] if is_cuda else None,
        )
        step = TrainingStep(cfg, model, build_optimizer(cfg, self.model), self.data)
        # Not Detectron2's mappers and loader: theirs draw from generators whose state no checkpoint
        # has, so a resumed run would see other images and other augmentations.
        place = {"rank": get_rank(), "world_size": get_world_size(), "pin_memory": is_cuda}
        loader = build_train_loader(cfg, self.data, self.model.iteration, **place)
        self.trainer = TeacherStudentTrainer(model, loader, step)
        return step

    def _load_weights(self, path: str) -> None:
        load_weights(self.model.student, path)

    def _read_checkpoint(self, path: str | Path) -> dict[str, Any]:
        state = read_checkpoint(path)
        if not {"model", "trainer", "config"} <= state.keys():
            raise InputError(f"{path}: not a checkpoint of a run; it cannot be continued")
        if self.data is not None:
            _check_same_world(self.cfg, state["config"], path)
            if any(name.startswith("low_resolution.") for name in state["model"]):
                raise InputError(
                    f"{path}: of a version that left LSM's classifier out of the optimizer; such "
                    "a run cannot be continued, repeat it (CHANGELOG.md, Silent regressions)"
                )
        return state

    def _measure(self) -> dict[str, Any]:
        return evaluate(self.model, self.cfg, self.cfg.OUTPUT_DIR)

    def train(self, extra_hooks: Sequence[hooks.HookBase] = ()) -> dict[str, Any]:
        """
        Train up to `SOLVER.MAX_ITER`, evaluating and saving on the way; extra hooks come last.

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
        if start_iter >= max_iter:
            return self._evaluate_again()
        self.trainer.register_hooks([*self._build_hooks(), *extra_hooks])
        with _errors_in_one_line():
            self.trainer.train(start_iter, max_iter)
        return self._results

    def _evaluate_again(self) -> dict[str, Any]:
        """Evaluate a finished run, which may have been stopped before its last evaluation."""
        results = self.evaluate()
        last = self.model.iteration - 1
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
            as `BaseRun`, nested as Detectron2 does: `bbox`, `AP` and so on of the model of
            `SSOD.EVAL_MODEL`, and the same under `student` and `teacher`.
        """
        self._results = super().evaluate()
        return self._results

    def _build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks, in its order: save, then evaluate, then write."""
        cfg, trainer = self.cfg, self.trainer
        names = test_dataset_names(cfg)
        saved = {"config": cfg.dump(), "categories": self.data.labeled.categories}
        checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=trainer, constants=saved)
        scheduler = build_checked(build_lr_scheduler, cfg, trainer.optimizer)
        # A function of the iteration alone, so the config's may be changed during a run.
        scheduler.last_epoch = self.model.iteration
        for group, lr in zip(trainer.optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = lr
        prepare = hooks.CallbackHook(before_step=lambda _: trainer.step.prepare())
        found = [prepare, hooks.IterationTimer(), hooks.LRScheduler(scheduler=scheduler)]
        if comm.is_main_process():
            period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SSOD.CHECKPOINTS_TO_KEEP
            found.append(KeepingPeriodicCheckpointer(checkpointer, period, max_to_keep=keep))
        if names:
            found.append(EvalAfterStepHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            if names:
                found.append(ResumedBestCheckpointer(checkpointer, _main_metric(names)))
            writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
            found.append(hooks.PeriodicWriter(writers, cfg.SSOD.LOG_PERIOD))
        return found
