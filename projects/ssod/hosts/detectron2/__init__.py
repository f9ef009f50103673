"""
The Detectron2 host. Importing it registers `TeacherStudentRCNN` and `IgnoringRPN`.

The one package that imports Detectron2.
"""

from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN

__all__ = ["TeacherStudentRCNN"]
