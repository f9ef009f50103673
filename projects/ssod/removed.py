"""Keys of earlier versions."""

RENAMED = {"SSOD.LSM.ALPHA": "SSOD.FILTER.UNDECIDED_THRESH"}  # both are understood

# Their value that is still done, and what to do instead of others.
REMOVED = {
    "SSOD.FILTER.MIN_SCORE": (0.05, "thresholds are at least 0.05"),
    "SSOD.FILTER.N_SIGMA": (2.0, "weights fall off with n_sigma 2, as published"),
    "SSOD.LSM.IGNORE_LOW_SCORES": (False, "use SSOD.FILTER.NAME AdaptiveClassThreshold"),
    "SSOD.LSM.RAMP_ITERS": (0, "set SSOD.LSM.WEIGHT and DISTILL_WEIGHT"),
    "SSOD.LSM.INTERPOLATION": ("bilinear", "the small image is made by bilinear interpolation"),
    "SSOD.LSM.PROPOSALS": ("rpn", "regions are drawn anew from the proposals"),
    "SSOD.LSM.DROP_UNALIGNED": (False, "leave levels out with SSOD.LSM.LEVELS"),
    "SSOD.LSM.HEAD_INIT": ("main", "the classifier starts as a copy of the main one"),
    "SSOD.LSM.BOX_LOSS": (
        "all",
        "SSOD.LSM.HEAD main follows SSOD.UNSUP_BOX_LOSSES, HEAD aux learns all boxes",
    ),
    "SSOD.LSM.DISTILL_TARGET": ("aux", "the target is the auxiliary classifier, as published"),
    "SSOD.LSM.DISTILL_DETACH": (False, "both classifiers learn, as published"),
    "SSOD.LSM.DISTILL_REGIONS": ("pseudo", "regions are chosen by their pseudo-box"),
    "SSOD.LSM.DISTILL_NORM": ("sampled", "the sum is divided by all sampled regions"),
}
