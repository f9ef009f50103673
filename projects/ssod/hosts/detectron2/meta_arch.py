"""Student and teacher as a meta-architecture of Detectron2."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ssod.core.method import Method, Step
from ssod.core.structures import TwoStreamBatch
from ssod.core.teacher_student import TeacherStudent
from ssod.hosts.build import teacher_student_arguments
from ssod.hosts.detectron2.adapter import Detectron2RCNN


@META_ARCH_REGISTRY.register()
class TeacherStudentRCNN(TeacherStudent):
    """
    `TeacherStudent` around `GeneralizedRCNN`, for `build_model(cfg)`.

    In train mode it is called with a `TwoStreamBatch`, once an iteration, and returns the weighted
    losses. In eval mode it is the detector of `eval_model`: it takes and returns what
    `GeneralizedRCNN` does, so predictors, evaluators and visualizers need to know nothing of it.

    Args:
        eval_model: "teacher" or "student". Until the teacher has started it is the student.
        **kwargs: of `TeacherStudent`.
    """

    @configurable
    def __init__(self, *, eval_model: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.eval_model = eval_model

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the student of the config's keys, and read `SSOD.*`."""
        student = Detectron2RCNN(cfg)
        arguments = teacher_student_arguments(cfg, student)
        return arguments | {"student": student, "eval_model": cfg.SSOD.EVAL_MODEL}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.student.device

    @property
    def detector(self) -> Detectron2RCNN:
        """The detector that eval mode delegates to."""
        use_teacher = self.eval_model == "teacher" and self.teacher_started
        return self.teacher if use_teacher else self.student

    def forward(
        self, batch: TwoStreamBatch | list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return the losses of a `TwoStreamBatch`, or in eval mode the detections of images."""
        if not self.training:
            return self.detector(batch)
        return super().forward(batch.to(self.device, non_blocking=True))

    def unsupervised_losses(self, step: Step) -> dict[str, Tensor]:
        """Log what Detectron2's parts count under `unsup/`, apart from the labeled images."""
        with get_event_storage().name_scope("unsup"):
            return super().unsupervised_losses(step)

    def method_losses(self, name: str, method: Method, step: Step) -> dict[str, Tensor]:
        """Log what they count in a method under `unsup_NAME/`, apart from the main branch's."""
        with get_event_storage().name_scope(f"unsup_{name.lower()}"):
            return super().method_losses(name, method, step)
