"""The tiny run of `tiny_run` on the Detectron2 host."""

from pathlib import Path

from detectron2.config import CfgNode

from ssod.config import merge_config
from ssod.hosts.detectron2.defaults import get_config
from tiny_run import OPTIONS, data_options

CHANGES = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,  # Detectron2 insists on it for R-18
    "MODEL.RESNETS.NORM": "GN",
    "SSOD.AMP_DTYPE": "bfloat16",
}


def tiny_config(shapes: Path, output: Path, *overrides: object) -> CfgNode:
    """Return the run's config with `KEY, VALUE, ...` overrides."""
    pairs = OPTIONS | CHANGES | data_options(shapes) | {"OUTPUT_DIR": output}
    options = [item for pair in pairs.items() for item in pair]
    cfg = merge_config(get_config(), "", [str(item) for item in [*options, *overrides]])
    cfg.freeze()
    return cfg
