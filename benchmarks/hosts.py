"""What the benchmarks need of a host, on the synthetic Shapes set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssod.config import merge_config, read_host
from ssod.core.structures import TwoStreamBatch, Views
from ssod.core.teacher_student import TeacherStudent
from ssod.data.build import build_train_loader
from ssod.data.shapes import ShapesSpec, ensure_shapes
from ssod.errors import InputError
from ssod.hosts.step import TrainingStep
from ssod.hosts.torchvision.schedule import learning_rate

PreparePlain = Callable[[Views], Callable[[], None]]

_CATALOG = ["DATASETS.TRAIN", "[]", "DATASETS.TEST", "[]", "SSOD.DATA.UNLABELED", "[]"]


@dataclass
class Host:
    """
    A run, past its burn-in.

    Attributes:
        name: of the host.
        cfg: of the run.
        step: the training step.
        loader: of batches on the CPU.
        device: of the model.
        build_plain: makes the host's own detector and trainer, where they can be compared. What it
            returns makes, from labeled images, a whole step of them.
        context: in which all of it must run.
    """

    name: str
    cfg: Any
    step: TrainingStep
    loader: Iterable[TwoStreamBatch]
    device: torch.device
    build_plain: Callable[[], PreparePlain] | None = None
    context: AbstractContextManager = field(default_factory=nullcontext)

    @property
    def model(self) -> TeacherStudent:
        return self.step.model

    def train(self, batch: TwoStreamBatch) -> None:
        """Train on a batch as the hosts' loops do."""
        self.step.prepare()
        for group in self.step.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.model.iteration)
        self.step(batch)


def build_host(config: str, root: Path, max_iter: int, opts: list[str]) -> Host:
    """Make a Shapes set under `root`, and a run of a config on it."""
    # As in the quickstart, 24 images are too few to be batched by shape: they are padded more.
    ensure_shapes(root / "shapes", ShapesSpec(num_labeled=24, num_unlabeled=64, num_val=1))
    keys = []
    for group in ("LABELED", "UNLABELED"):
        keys += [f"SSOD.DATA.{group}_JSON", f"{root}/shapes/annotations/{group.lower()}.json"]
        keys += [f"SSOD.DATA.{group}_IMAGES", f"{root}/shapes/images"]
    keys += ["SSOD.DATA.VAL_JSON", "", "SSOD.DATA.UNLABELED_TRUTH_JSON", ""]
    keys += ["SSOD.DATA.PERCENT", "0", "MODEL.ROI_HEADS.NUM_CLASSES", "6"]
    keys += ["SSOD.BURN_IN_ITERS", "0", "OUTPUT_DIR", f"{root}/run", *opts]
    keys += ["SOLVER.MAX_ITER", str(max_iter)]
    is_detectron2 = read_host(config, opts) == "detectron2"
    host = _detectron2(config, _CATALOG + keys) if is_detectron2 else _torchvision(config, keys)
    if not host.model.uses_unlabeled:
        raise InputError("there is no semi-supervised step with SSOD.UNSUP_LOSS_WEIGHT 0")
    return host


def _torchvision(config: str, keys: list[str]) -> Host:
    from ssod.hosts.torchvision.defaults import get_config
    from ssod.hosts.torchvision.run import Run

    cfg = merge_config(get_config(), config, keys)
    run = Run(cfg)
    loader = build_train_loader(cfg, run.data, 0, pin_memory=run.device.type == "cuda")
    return Host("torchvision", cfg, run.step, loader, run.device)


def _detectron2(config: str, keys: list[str]) -> Host:
    try:
        from detectron2.utils.events import EventStorage

        from ssod.hosts.detectron2.defaults import get_config
        from ssod.hosts.detectron2.run import Run
    except ModuleNotFoundError as error:
        raise InputError(f"SSOD.HOST detectron2 needs the module {error.name}") from error

    cfg = merge_config(get_config(), config, keys)
    run = Run(cfg)
    # Detectron2's AMP needs CUDA.
    has_plain = run.device.type == "cuda" or not cfg.SOLVER.AMP.ENABLED
    return Host(
        "detectron2",
        cfg,
        run.trainer.step,
        run.trainer.data_loader,
        run.device,
        build_plain=partial(_build_plain_detectron2, cfg, run.model) if has_plain else None,
        context=EventStorage(),
    )


def _build_plain_detectron2(cfg: Any, model: TeacherStudent) -> PreparePlain:
    """Detectron2's own trainer and meta-architecture, with the student's weights and optimizer."""
    from detectron2.engine import AMPTrainer, SimpleTrainer
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from ssod.hosts.detectron2.run import build_optimizer

    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "GeneralizedRCNN", "RPN"
    plain = build_model(cfg)
    optimizer = build_optimizer(cfg, plain)
    if cfg.SOLVER.AMP.ENABLED:
        dtype = getattr(torch, cfg.SSOD.AMP_DTYPE)
        trainer = AMPTrainer(plain, [], optimizer, precision=dtype)
    else:
        trainer = SimpleTrainer(plain, [], optimizer)
    storage = EventStorage()  # its own: the two trainers log the same names in different ways

    def step() -> None:
        with storage:
            trainer.run_step()

    def prepare(labeled: Views) -> Callable[[], None]:
        views = {"weak": labeled.weak, "strong": labeled.strong}
        images = views.get(model.labeled_views, labeled.strong + labeled.weak)
        targets = labeled.targets * (len(images) // len(labeled))
        inputs = []
        for image, target in zip(images, targets, strict=True):
            instances = Instances(
                tuple(image.shape[1:]), gt_boxes=Boxes(target.boxes), gt_classes=target.classes
            )
            pixels = image.flip(0) if cfg.INPUT.FORMAT == "BGR" else image
            inputs.append({"image": pixels, "instances": instances})
        plain.load_state_dict(model.student.state_dict())
        trainer._data_loader_iter_obj = iter([inputs])
        trainer.iter = storage.iter = model.iteration
        return step

    return prepare
