"""Detectron2 host; importing it registers its classes with Detectron2."""
