"""
The Detectron2 host. Importing it registers `TeacherStudentRCNN` and `IgnoringRPN`.

The one package that imports Detectron2.
"""

import warnings

# Of Detectron2, at each start; it would come before every error that is told in one line.
warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)

from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN  # noqa: E402

__all__ = ["TeacherStudentRCNN"]
