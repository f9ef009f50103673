"""Every filter and method of the product, with the keys of a tiny run in which it acts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """
    A row of the table.

    Attributes:
        filter: name of the pseudo-label filter.
        keys: `KEY, VALUE, ...` of the run.
        methods: the groups of the methods that are added.
        losses: of the methods, which are above 0 when there is something to learn.
        off: keys with which the methods run, but add nothing.
        trains: whether the methods have parameters.
        is_local: whether what is learned of an image depends on the others of its pass and process.
            Processes stand in for passes then, not for a larger batch.
    """

    filter: str = "FixedThreshold"
    keys: tuple = ()
    methods: tuple = ()
    losses: tuple = ()
    off: tuple = ()
    trains: bool = False
    is_local: bool = False

    @property
    def overrides(self):
        enabled = [item for name in self.methods for item in (f"SSOD.{name}.ENABLED", True)]
        return ("SSOD.FILTER.NAME", self.filter, *enabled, *self.keys)

    @property
    def without_methods(self):
        return Case(self.filter, self.keys)


LSM = {
    "methods": ("LSM",),
    "losses": ("loss_cls_low_res_unsup", "loss_box_reg_low_res_unsup"),
    "off": ("SSOD.LSM.WEIGHT", 0, "SSOD.LSM.DISTILL_WEIGHT", 0),
    "trains": True,
}
SOFT = ("SSOD.FILTER.POOL_FLOOR", 0.0)
# An untrained detector is hardly ever sure, so that the branch alone has boxes, and distils.
UNDECIDED = ("SSOD.FILTER.SCORE_THRESH", 0.9, "SSOD.FILTER.UNDECIDED_THRESH", 0.05)
DISTILS = LSM | {"losses": (*LSM["losses"], "loss_distill_unsup")}
LABEL_MATCH = {
    "methods": ("LABEL_MATCH",),
    "losses": ("loss_self_assign_unsup",),
    "off": ("SSOD.LABEL_MATCH.WEIGHT", 0, "SSOD.LABEL_MATCH.MINING", "none"),
}
# More images than the other rows, or none of ACT's boxes is between the thresholds.
ACT = ("SSOD.FILTER.QUEUE_IMAGES", 64, "SSOD.DATA.UNLABELED_PER_BATCH", 4)
# An untrained detector's scores are near one in seven.
CONTRASTIVE = {
    "methods": ("CONTRASTIVE",),
    "losses": ("loss_contrast_unsup",),
    "off": ("SSOD.CONTRASTIVE.WEIGHT", 0),
    "trains": True,
    "is_local": True,
}
PAIRS = ("SSOD.CONTRASTIVE.PUSH_THRESH", 0.1, "SSOD.CONTRASTIVE.RAMP_ITERS", 2)
DASO = {
    "methods": ("DASO",),
    "losses": ("loss_align_unsup",),
    "off": ("SSOD.DASO.WEIGHT", 0, "SSOD.DASO.MAX_BLEND", 0),
}
# An iteration of an untrained detector has the 60 boxes that a window needs: it closes, and one is
# open at each stop of a run.
COUNTS = (
    *("SSOD.DASO.DELAY", 0, "SSOD.DASO.WINDOW", 1, "SSOD.DASO.POOL_FLOOR", 0.0),
    *("SSOD.DASO.T_DIST", 1.5, "SSOD.DASO.T_PROTO", 0.5, "SSOD.DASO.MAX_BLEND", 0.5),
    *("TEST.DETECTIONS_PER_IMAGE", 100, "SSOD.DATA.UNLABELED_PER_BATCH", 4),
    # Enough labeled boxes that the most frequent class has a prototype.
    *("SOLVER.IMS_PER_BATCH", 4),
)
OWN_GEOMETRY = ("SSOD.VIEWS.INDEPENDENT", True, "SSOD.VIEWS.WARP", True)
# Passes of four images, the fewest that a mosaic takes; an iteration of a run has two.
MIXPL = {
    "methods": ("MIXPL",),
    "losses": tuple(f"loss_{n}_mosaic_unsup" for n in ("cls", "box_reg", "rpn_cls", "rpn_loc")),
    "off": ("SSOD.MIXPL.MIXUP", False, "SSOD.MIXPL.MOSAIC_WEIGHT", 0),
    "is_local": True,
}
FOURS = ("SSOD.DATA.UNLABELED_PER_BATCH", 8)
NONE_UNDECIDED = ("SSOD.FILTER.SCORE_THRESH", 0.9, "SSOD.FILTER.UNDECIDED_THRESH", 0.9)
# Weights are divided by their sum over a pass.
SOFT_TEACHER = {
    "methods": ("SOFT_TEACHER",),
    "off": (
        *("SSOD.SOFT_TEACHER.BACKGROUND", False, "SSOD.SOFT_TEACHER.JITTER", False),
        # The main branch calls undecided boxes background without it, so none.
        *("SSOD.FILTER.SCORE_THRESH", 0.1, "SSOD.FILTER.UNDECIDED_THRESH", 0.1),
    ),
    "is_local": True,
}
PSECO = {
    "methods": ("PSECO",),
    "off": ("SSOD.PSECO.ASSIGNMENT", False, "SSOD.PSECO.VOTING", False),
    "is_local": True,
}
CASES = {
    "fixed": Case(),
    "fixed, views of their own geometry": Case(keys=OWN_GEOMETRY),
    "LSM, views of their own geometry": Case(keys=(*UNDECIDED, *OWN_GEOMETRY), **DISTILS),
    "ACT": Case("AdaptiveClassThreshold", ("SSOD.FILTER.QUEUE_IMAGES", 64)),
    "ACT, sweep": Case(
        "AdaptiveClassThreshold",
        ("SSOD.FILTER.SOURCE", "sweep", "SSOD.FILTER.REFRESH_PERIOD", 2),
    ),
    "SoftMatch": Case("SoftMatchWeighting", SOFT),
    "GMM": Case("GaussianMixtureThreshold"),
    "LSM": Case(keys=UNDECIDED, **DISTILS),
    "LSM, SoftMatch": Case("SoftMatchWeighting", SOFT, **DISTILS),
    "MLC": Case(
        keys=(
            *("SSOD.FILTER.UNDECIDED_THRESH", 0.05, "SSOD.FILTER.SCORE_THRESH", 0.05),
            *("SSOD.LSM.HEAD", "main"),
            *("SSOD.LSM.RPN_LOSS", True, "SSOD.LSM.WEIGHT", 1.0, "SSOD.LSM.DISTILL_WEIGHT", 0),
        ),
        methods=("LSM",),
        losses=(*LSM["losses"], "loss_rpn_cls_low_res_unsup", "loss_rpn_loc_low_res_unsup"),
        off=LSM["off"],
    ),
    "LabelMatch": Case(
        "AdaptiveClassThreshold", (*ACT, "SSOD.RPN_IGNORE_WEIGHT", 0), **LABEL_MATCH
    ),
    "LabelMatch, teacher's proposals": Case(
        "SoftMatchWeighting",
        # With a variance of 1 no weight is 0: an untrained detector's scores hardly spread.
        (*SOFT, "SSOD.FILTER.START", "paper", "SSOD.LABEL_MATCH.MINING", "teacher"),
        **LABEL_MATCH,
    ),
    "LabelMatch, LSM": Case(
        keys=UNDECIDED,
        methods=("LABEL_MATCH", "LSM"),
        losses=(*LABEL_MATCH["losses"], *DISTILS["losses"]),
        # The main branch calls undecided boxes background without LabelMatch, so none.
        off=(*LABEL_MATCH["off"], *LSM["off"], "SSOD.FILTER.UNDECIDED_THRESH", 0.9),
        trains=True,
    ),
    "CCSSL": Case(keys=(*UNDECIDED, *PAIRS), **CONTRASTIVE),
    "CCSSL, second strong view": Case(
        "SoftMatchWeighting", (*SOFT, *PAIRS, "SSOD.CONTRASTIVE.VIEWS", "student"), **CONTRASTIVE
    ),
    "CCSSL, LabelMatch, LSM": Case(
        "AdaptiveClassThreshold",
        (*ACT, *PAIRS),
        methods=("CONTRASTIVE", "LABEL_MATCH", "LSM"),
        losses=(*CONTRASTIVE["losses"], *LABEL_MATCH["losses"], *LSM["losses"]),
        off=(*CONTRASTIVE["off"], *LABEL_MATCH["off"], *LSM["off"]),
        trains=True,
        is_local=True,
    ),
    "DASO, CCSSL": Case(
        keys=(
            "SSOD.FILTER.SCORE_THRESH",
            0.0,
            "SSOD.FILTER.UNDECIDED_THRESH",
            0.0,
            *PAIRS,
            *COUNTS,
        ),
        methods=("CONTRASTIVE", "DASO"),
        losses=(*CONTRASTIVE["losses"], *DASO["losses"]),
        off=(*CONTRASTIVE["off"], *DASO["off"]),
        trains=True,
        is_local=True,
    ),
    "DASO": Case(keys=("SSOD.FILTER.SCORE_THRESH", 0.0, *COUNTS), **DASO),
    "DASO, SoftMatch": Case("SoftMatchWeighting", (*SOFT, *COUNTS), **DASO),
    "DASO, LabelMatch, LSM": Case(
        keys=("SSOD.FILTER.SCORE_THRESH", 0.9, "SSOD.FILTER.UNDECIDED_THRESH", 0.0, *COUNTS),
        methods=("DASO", "LABEL_MATCH", "LSM"),
        losses=(*DASO["losses"], *LABEL_MATCH["losses"], *DISTILS["losses"]),
        off=(*DASO["off"], *LABEL_MATCH["off"], *LSM["off"], "SSOD.FILTER.UNDECIDED_THRESH", 0.9),
        trains=True,
    ),
    "MixPL": Case(keys=FOURS, **MIXPL),
    "MixPL, LSM": Case(
        "SoftMatchWeighting",
        (*SOFT, *FOURS),
        methods=("LSM", "MIXPL"),
        losses=(*DISTILS["losses"], *MIXPL["losses"]),
        off=(*LSM["off"], *MIXPL["off"]),
        trains=True,
        is_local=True,
    ),
    # Boxes are undecided, found in two layers and moved by a geometry of their own.
    "MixPL, LabelMatch, PseCo, Soft Teacher": Case(
        "SoftMatchWeighting",
        (*SOFT, *FOURS, *OWN_GEOMETRY, "SSOD.EMPTY_IMAGES", "left_out"),
        methods=("LABEL_MATCH", "MIXPL", "PSECO", "SOFT_TEACHER"),
        losses=(*LABEL_MATCH["losses"], *MIXPL["losses"]),
        off=(*LABEL_MATCH["off"], *MIXPL["off"], *PSECO["off"], *SOFT_TEACHER["off"][:4]),
        is_local=True,
    ),
    "Soft Teacher": Case(
        keys=("SSOD.FILTER.SCORE_THRESH", 0.1, "SSOD.FILTER.UNDECIDED_THRESH", 0.05),
        **SOFT_TEACHER,
    ),
    "Soft Teacher, LSM": Case(
        keys=UNDECIDED,
        methods=("LSM", "SOFT_TEACHER"),
        losses=DISTILS["losses"],
        off=(*SOFT_TEACHER["off"], *LSM["off"], *NONE_UNDECIDED),
        trains=True,
        is_local=True,
    ),
    "PseCo": Case(**PSECO),
    "PseCo, LSM": Case(
        keys=(
            *("SSOD.FILTER.UNDECIDED_THRESH", 0.1, "SSOD.LSM.HEAD", "main"),
            *("SSOD.LSM.RPN_LOSS", True, "SSOD.LSM.WEIGHT", 1.0, "SSOD.LSM.DISTILL_WEIGHT", 0),
        ),
        methods=("LSM", "PSECO"),
        losses=LSM["losses"],
        off=(*PSECO["off"], *LSM["off"]),
        is_local=True,
    ),
}
