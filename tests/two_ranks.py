"""Training on given batches, in one process or as one of several; imported by spawned processes."""

import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm

from ssod.core.distributed import get_rank
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, PseudoLabelFilter
from ssod.core.structures import PseudoLabels, Targets, TwoStreamBatch, Views
from ssod.data.build import load_run_data
from ssod.data.loader import FailedImages
from ssod.hosts.detectron2.launch import leave_process_group
from ssod.hosts.detectron2.solver import build_clipper, build_optimizer
from ssod.hosts.detectron2.trainer import TeacherStudentTrainer
from ssod.hosts.sweep import sweep_if_due, tell_labels
from tiny_detectron2 import tiny_config

NUM_CLASSES, SIZE, STEPS = 6, 64, 3
OPTIONS = (
    # Every anchor and region is learned, and each image has as many: means over ranks are means
    # over images then.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048, "MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.2]"),
    *("SSOD.FILTER.NAME", "FixedBoxes", "SSOD.BURN_IN_ITERS", 1, "SSOD.LOG_PERIOD", 1),
    *("SSOD.LABELED_VIEWS", "both", "SSOD.LSM.ENABLED", True),
)


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class FixedBoxes(PseudoLabelFilter):
    """
    Two boxes in the first image over all ranks, `num_second` in the second.

    Their weights are below 1, so that the second branch distils their regions.
    """

    num_second = 2

    @classmethod
    def from_config(cls, cfg, num_classes):
        return cls()

    def forward(self, detections):
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 20, 60, 50]])
        classes = torch.tensor([1, 4])
        counts = [2 if get_rank() + i == 0 else self.num_second for i in range(len(detections))]
        weights = torch.full((2,), 0.625)
        probs = torch.full((2, NUM_CLASSES + 1), 0.1)
        labels = PseudoLabels(boxes, classes, weights, weights, weights, probs, weights > 0)
        return [labels[:count] for count in counts]


def make_batches(num_boxes):
    """Return batches of two labeled images, with so many boxes each, and two unlabeled ones."""
    generator = torch.Generator().manual_seed(0)

    def images():
        shape = (2, 3, SIZE, SIZE)
        return list(torch.randint(256, shape, generator=generator, dtype=torch.uint8))

    def targets(count):
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=generator)], 1)
        classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
        return Targets.from_ground_truth(boxes, classes, NUM_CLASSES)

    return [
        TwoStreamBatch(
            Views(images(), images(), [targets(count) for count in num_boxes], [0, 1]),
            Views(images(), images(), None, [2, 3]),
            [],
        )
        for _ in range(STEPS)
    ]


def _of_rank(batch, rank):
    def part(views):
        targets = views.targets and [views.targets[rank]]
        return Views([views.weak[rank]], [views.strong[rank]], targets, [rank])

    return TwoStreamBatch(part(batch.labeled), part(batch.unlabeled), [])


def train_cases(shapes, output, cases):
    """Train once for each case, in processes that are started once."""
    torch.set_num_threads(1)
    for num_boxes in cases:
        train(shapes, output / f"{comm.get_world_size()}_{num_boxes}.pth", num_boxes)
    sweep(shapes, output / f"{comm.get_world_size()}_sweep.pth")
    leave_process_group()


def sweep(shapes, output):
    """Compute class thresholds from a sweep over all unlabeled images; rank 0 writes them."""
    keys = ("NAME", "AdaptiveClassThreshold", "SOURCE", "sweep", "RELIABLE_FRACTION", 0.5)
    overrides = [f"SSOD.FILTER.{k}" if i % 2 == 0 else k for i, k in enumerate(keys)]
    cfg = tiny_config(shapes, output, *overrides)
    torch.manual_seed(0)
    model, data = build_model(cfg), load_run_data(cfg)
    tell_labels(model, data)
    model.iteration = cfg.SSOD.BURN_IN_ITERS
    sweep_if_due(model, data, cfg, model.device)
    if comm.is_main_process():
        torch.save(dict(model.pseudo_label_filter.named_buffers()), output)


def train(shapes, output, num_boxes):
    """Train on this rank's part of the batches; rank 0 writes losses and weights to `output`."""
    torch.manual_seed(0)
    FixedBoxes.num_second = num_boxes[1]
    world_size = comm.get_world_size()
    cfg = tiny_config(shapes, output, *OPTIONS)
    model = build_model(cfg)
    batches = make_batches(num_boxes)
    if world_size > 1:
        batches = [_of_rank(batch, comm.get_rank()) for batch in batches]
    trainer = TeacherStudentTrainer(
        create_ddp_model(model, broadcast_buffers=False, device_ids=None),
        batches,
        build_optimizer(cfg, model),
        seed=0,
        log_period=1,
        max_skipped_steps=1,
        failed=FailedImages(0.0),
        clipper=build_clipper(cfg),
    )
    trainer.train(0, STEPS)
    if comm.is_main_process():
        history = trainer.storage.histories()
        losses = {k: [v for v, _ in h.values()] for k, h in history.items() if "loss" in k}
        torch.save({"losses": losses, "model": model.state_dict()}, output)
