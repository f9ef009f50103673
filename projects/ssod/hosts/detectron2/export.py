"""A detector of a run as a model of Detectron2 alone."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from ssod.errors import InputError
from ssod.files import replacing
from ssod.hosts.checkpoint import Which, detector_state, load_matching, read_run

CANONICAL_BOX_SIZE = 224  # of Detectron2's pooler
WEIGHTS_NAME, CONFIG_NAME = "model.pth", "config.yaml"


def export_config(cfg: CfgNode, weights: str | Path) -> CfgNode:
    """
    Return the config of the run's detector for Detectron2 without this project.

    Only what describes the detector and its input is taken over. Solver, data sets and output
    folder are those of Detectron2's defaults: the run's would need its data, or write into it.

    Raises:
        InputError: for a canonical box size that Detectron2 alone cannot be told.
    """
    if cfg.SSOD.CANONICAL_BOX_SIZE != CANONICAL_BOX_SIZE:
        raise InputError(
            f"SSOD.CANONICAL_BOX_SIZE {cfg.SSOD.CANONICAL_BOX_SIZE} cannot be exported: Detectron2 "
            f"has no key for it, and its own is {CANONICAL_BOX_SIZE}"
        )
    plain = get_cfg()
    for group in ("MODEL", "INPUT", "TEST"):
        plain[group] = cfg[group].clone()
    plain.defrost()  # as a run's config is frozen
    plain.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    plain.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"  # `IgnoringRPN` differs from it in training alone
    # Detectron2 takes relative paths from the working directory, not from the config's folder.
    plain.MODEL.WEIGHTS = str(Path(weights).resolve())
    return plain


def export_detector(
    cfg: CfgNode,
    checkpoint_path: str | Path,
    output_dir: str | Path,
    which: Which = "teacher",
) -> None:
    """
    Write `model.pth` and `config.yaml`, which Detectron2 loads without this project.

    They are of a config and a checkpoint of a run; an earlier export in the folder is replaced.

    Raises:
        InputError: if the checkpoint is not one of this config, its teacher has not started, or
            the folder cannot be written or is that of a run.
    """
    output = Path(output_dir)
    weights, config = output / WEIGHTS_NAME, output / CONFIG_NAME
    if config.exists() and not weights.exists():
        raise InputError(f"{output}: has a {CONFIG_NAME} of something else; choose another folder")
    plain = export_config(cfg, weights)
    plain.MODEL.DEVICE = "cpu"  # to build it on
    detector = build_model(plain)
    load_matching(detector, _read_detector(checkpoint_path, which), checkpoint_path)
    plain.MODEL.DEVICE = cfg.MODEL.DEVICE
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(weights) as partial:
            torch.save({"model": detector.state_dict()}, partial)
        with replacing(config) as partial:
            partial.write_text(plain.dump())
    except (OSError, RuntimeError) as error:  # the latter of torch.save
        raise InputError(f"{output}: cannot be written ({error}); choose another folder") from error


def _read_detector(path: str | Path, which: Which) -> dict:
    state = read_run(path)["model"]
    iteration, teacher_started = state["_extra_state"].tolist()
    if which == "teacher" and not teacher_started:
        raise InputError(
            f"{path}: its teacher had not started at iteration {iteration}; "
            "export the student with --student"
        )
    return detector_state(state, which)
