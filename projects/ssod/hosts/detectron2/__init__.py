"""Detectron2 host."""
