"""
The keys of the group `SSOD` with their defaults; a recipe, a table or a user needs each of them.

Where a default is published its source is named.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode


def add_ssod_config(cfg: CfgNode) -> None:
    """Add the group `SSOD` to a host's config, with every key's default."""
    ssod = cfg.SSOD = type(cfg)()
    # "torchvision" (everything from PyPI, one process) or "detectron2" (many GPUs).
    ssod.HOST = "torchvision"
    # Python file with filters and methods of your own, which is run. "": none.
    ssod.PLUGIN = ""
    # Iterations on labeled images alone before the teacher starts (Unbiased Teacher, COCO 1-10 %).
    ssod.BURN_IN_ITERS = 2000
    # Share of the teacher kept at each update, in [0, 1) (Unbiased Teacher).
    ssod.EMA_DECAY = 0.9996
    # Above 0 the share is at most t / (EMA_GAMMA + t), t iterations after the burn-in: a young
    # teacher follows faster (MixPL, without a burn-in: 4, at every third iteration). 0: constant.
    ssod.EMA_GAMMA = 0.0
    # Factor on every `*_unsup` loss (Unbiased Teacher: 4 on COCO 1-10 %, otherwise 2). 0: unlabeled
    # images are not used, the EMA is kept; the control every comparison needs.
    ssod.UNSUP_LOSS_WEIGHT = 4.0
    # Learn box coordinates from pseudo-boxes as well. Unbiased Teacher leaves these losses out.
    ssod.UNSUP_BOX_LOSSES = False
    # Unlabeled images in which the main branch has no box to learn or to ignore: all of them is
    # "background" (Unbiased Teacher); they are "left_out"; or losses of unlabeled images are
    # multiplied by the "share" of the others, of each pass and process (MixPL's code: 0 if any has
    # no box).
    ssod.EMPTY_IMAGES = "background"
    # Views of a labeled image that are learned: "both" (Unbiased Teacher), "strong" or "weak".
    ssod.LABELED_VIEWS = "both"
    # The RPN ignores anchors of targets with a smaller weight, in [0, 1].
    ssod.RPN_IGNORE_WEIGHT = 0.5
    # Exponent of the softmax focal loss of the box head (Unbiased Teacher: 1.5); 0: cross entropy.
    ssod.FOCAL_GAMMA = 1.5
    # Square root of the area of boxes that are pooled from level 4, in pixels (FPN). A smaller one
    # spreads the boxes of small images over all levels; Detectron2 alone has no key for it.
    ssod.CANONICAL_BOX_SIZE = 224
    # "SGD" (published recipes) or "AdamW" (short schedules from scratch).
    ssod.OPTIMIZER = "SGD"
    # Precision with SOLVER.AMP.ENABLED: "float16" (Detectron2's) or "bfloat16".
    ssod.AMP_DTYPE = "float16"
    # Forward and backward passes that an iteration's batch is divided into, to save memory.
    ssod.ACCUMULATE_STEPS = 1
    # Training stops after so many iterations in a row without finite gradients. Those of fp16
    # begin with some, until the loss scale fits.
    ssod.MAX_SKIPPED_STEPS = 20
    # Iterations between two lines of metrics, each of which waits for the device.
    ssod.LOG_PERIOD = 20

    groups = {
        "VIEWS": _add_views,
        "FILTER": _add_filter,
        "LSM": _add_low_resolution,
        "LABEL_MATCH": _add_label_match,
        "CONTRASTIVE": _add_contrastive,
        "DASO": _add_daso,
        "MIXPL": _add_mixing,
        "SOFT_TEACHER": _add_soft_teacher,
        "PSECO": _add_pseco,
        "DATA": _add_data,
    }
    for name, add in groups.items():
        ssod[name] = type(cfg)()
        add(ssod[name])


def _add_views(group: CfgNode) -> None:
    # Weak and strong view of an image are resized and flipped each by draws of its own (Soft
    # Teacher, MixPL). False: they share them (Unbiased Teacher).
    group.INDEPENDENT = False
    # The strong view is also rotated or sheared by at most 30 degrees, or moved by at most 10 % of
    # its sides: one of the three (Soft Teacher, MixPL).
    group.WARP = False


def _add_filter(group: CfgNode) -> None:
    # A class of `PSEUDO_LABEL_FILTER_REGISTRY`.
    group.NAME = "FixedThreshold"
    # FixedThreshold: probability above which a detection is learned (Unbiased Teacher).
    # GaussianMixtureThreshold, which has no other key: that of classes with less than 4 scores.
    group.SCORE_THRESH = 0.7
    # FixedThreshold: probability above which a detection is undecided, at most SCORE_THRESH, for
    # methods that learn such boxes: LSM (its alpha), LABEL_MATCH, CONTRASTIVE and SOFT_TEACHER.
    # Without them it is not used.
    # ACT and SoftMatch have bounds of their own, lower thresholds and POOL_FLOOR.
    group.UNDECIDED_THRESH = 0.5
    _add_adaptive_threshold(group)
    _add_soft_match(group)


def _add_data(group: CfgNode) -> None:
    # COCO JSON of the labeled images and the folder its file names are relative to. Or Pascal VOC
    # files: a folder of XML, or a list in ImageSets/Main, and the folder with the images.
    group.LABELED_JSON = ""
    group.LABELED_VOC = ""
    group.LABELED_IMAGES = ""
    # Percent of the labeled images to keep labels of, in (0, 100); the rest joins the unlabeled
    # images. 0: no split, all of it is labeled.
    group.PERCENT = 0.0
    # Seed of that split.
    group.SPLIT_SEED = 0
    # Folder of unlabeled images; with a JSON only the images it lists. "": none besides the split.
    group.UNLABELED_JSON = ""
    group.UNLABELED_IMAGES = ""
    # What `ssod index` has written, instead of a JSON: opens a million images in seconds. They are
    # in UNLABELED_IMAGES, or if that is "" where they were then.
    group.UNLABELED_INDEX = ""
    # COCO JSON with the true boxes of unlabeled images, never trained on: pseudo-labels are
    # measured against it. With PERCENT the split's own. "": not measured.
    group.UNLABELED_TRUTH_JSON = ""
    # COCO JSON, or Pascal VOC as above, and folder of the images that AP is measured on. "": no
    # evaluation.
    group.VAL_JSON = ""
    group.VAL_VOC = ""
    group.VAL_IMAGES = ""
    # Unlabeled images per iteration over all processes; SOLVER.IMS_PER_BATCH counts labeled ones.
    group.UNLABELED_PER_BATCH = 32
    # Leave boxes without area out instead of stopping (COCO train2017 has such boxes).
    group.SKIP_INVALID_BOXES = False
    # Share of the images drawn that may fail to decode before training stops, in [0, 1].
    group.MAX_FAILED_SHARE = 0.01


def _add_adaptive_threshold(group: CfgNode) -> None:
    # AdaptiveClassThreshold: detections that thresholds are computed from. "queue": of the last
    # unlabeled images of the training; "sweep": of a sample, found by the teacher for it (paper).
    group.SOURCE = "queue"
    # Iterations between two computations of the thresholds (LabelMatch's configs).
    group.REFRESH_PERIOD = 1000
    # Images in the queue, over all processes (LabelMatch's online variant).
    group.QUEUE_IMAGES = 12800
    # Unlabeled images of a sweep (LabelMatch's configs).
    group.SWEEP_IMAGES = 10000
    # Share of the expected boxes that is reliable, in [0, 1] (LabelMatch's code).
    group.RELIABLE_FRACTION = 0.2


def _add_soft_match(group: CfgNode) -> None:
    # SoftMatchWeighting: share of the statistics kept at each iteration, in (0, 1) (SoftMatch).
    # Training after the burn-in must be much longer than 1 / (1 - EMA_DECAY) iterations.
    group.EMA_DECAY = 0.999
    # Statistics of all scores, "global" (SoftMatch), or of each class, "per_class".
    group.SCOPE = "global"
    # How they start: "paper" (mean 1 / classes, variance 1), or from the first boxes alone,
    # "bias_corrected". The former weighs every box by 1 for thousands of iterations.
    group.START = "bias_corrected"
    # Frequency of classes that predictions are aligned to: of "labeled" boxes, "uniform"
    # (SoftMatch) or "none". Boxes are long-tailed, so "uniform" prefers rare classes.
    group.ALIGNMENT = "labeled"
    # Probability from which a detection is learned at all (ours: it decides the precision).
    group.POOL_FLOOR = 0.5


def _add_low_resolution(group: CfgNode) -> None:
    # Low-confidence samples mining: a second branch on the strong view at half the size.
    group.ENABLED = False
    # Factor on the losses of the branch, within UNSUP_LOSS_WEIGHT (ours: LSM says "decreased").
    group.WEIGHT = 0.5
    # Levels of the small image that count; regions go to the level below that of the full one.
    group.LEVELS = (2, 3, 4)
    # Classifier of the branch: "aux", its own, or "main" (as in multi-scale label consistency; box
    # coordinates are learned only with UNSUP_BOX_LOSSES then).
    group.HEAD = "aux"
    # Train the RPN on the small image too, a second pass of it, proposals included (PseCo).
    group.RPN_LOSS = False
    # Factor on the self-distillation, within UNSUP_LOSS_WEIGHT; 0: none.
    group.DISTILL_WEIGHT = 1.0


def _add_label_match(group: CfgNode) -> None:
    # Proposal self-assignment of undecided boxes, and mining of the reliable among them. Published
    # with ACT, RPN_IGNORE_WEIGHT 0, UNSUP_BOX_LOSSES True and FOCAL_GAMMA 0.
    group.ENABLED = False
    # Factor on the self-assignment, within UNSUP_LOSS_WEIGHT.
    group.WEIGHT = 1.0
    # What its sum is divided by: all regions that were "sampled" (LabelMatch's code), or those that
    # are "matched" to undecided boxes (paper), which is many times as strong.
    group.NORMALIZER = "sampled"
    # Regions of which the teacher decides that an undecided box is learned like a reliable one: the
    # "student"'s, sampled for the losses (LabelMatch's code), or its own proposals, "teacher"
    # (paper). "none": of no box.
    group.MINING = "student"


def _add_contrastive(group: CfgNode) -> None:
    # Class-aware contrastive learning of pseudo-boxes (CCSSL).
    group.ENABLED = False
    # Factor on the loss, within UNSUP_LOSS_WEIGHT (ours; CCSSL: 1 or 2 on images, of which it
    # compares several hundred where there are some tens of boxes).
    group.WEIGHT = 0.5
    # Iterations after the burn-in over which the weight rises linearly (ours); 0: none.
    group.RAMP_ITERS = 2000
    # Score that both boxes of a pair of one class need to be pulled together, in [0, 1] (CCSSL on
    # Semi-iNat, whose labels are as noisy). Others are told from everything but themselves.
    group.PUSH_THRESH = 0.9
    # Second view of a box: the "teacher"'s, of the weak view, or the "student"'s of a second strong
    # one (CCSSL), which costs another forward pass.
    group.VIEWS = "teacher"


def _add_daso(group: CfgNode) -> None:
    # Classes of the teacher's boxes blended with their similarity to prototypes of the classes.
    group.ENABLED = False
    # Factor on the semantic alignment, within UNSUP_LOSS_WEIGHT (DASO).
    group.WEIGHT = 1.0
    # Coefficients of the classes are (count / largest count) ** (1 / T_DIST): a smaller one spares
    # all but the most frequent (DASO: 0.3 for unknown distributions, 1.5 for the labels').
    group.T_DIST = 0.3
    # Temperature of the similarity (DASO).
    group.T_PROTO = 0.05
    # Largest coefficient, in [0, 1] (DASO: 1, where similarity alone decides of the most frequent
    # class). 0: nothing is blended.
    group.MAX_BLEND = 1.0
    # Labeled boxes of a class that its prototype is the mean of (DASO). Memory: classes x this x
    # 4 kB with a box head of 1024 channels, 84 MB for COCO.
    group.QUEUE_LENGTH = 256
    # Iterations since the burn-in before it acts (DASO: 2 % of the training).
    group.DELAY = 1000
    # Iterations over which pseudo-labels are counted (DASO); more if they have less than 10 boxes a
    # class.
    group.WINDOW = 100
    # Probability from which a detection counts and is aligned (ours: the paper has none).
    group.POOL_FLOOR = 0.5


def _add_mixing(group: CfgNode) -> None:
    # Strong views mixed with others of the same pass and process, which needs at least 4 unlabeled
    # images there (2 without the mosaic). Published with UNSUP_BOX_LOSSES True.
    group.ENABLED = False
    # Replace each strong view by the mean of it and another, with the pseudo-boxes of both (MixPL).
    group.MIXUP = True
    # Factor on the losses of one more image a pass, of four strong views in a smaller size, within
    # UNSUP_LOSS_WEIGHT (MixPL); 0: none.
    group.MOSAIC_WEIGHT = 0.5


def _add_soft_teacher(group: CfgNode) -> None:
    # Background weighted by the teacher, and coordinates of boxes that it is sure of. Published
    # with SCORE_THRESH 0.9, UNDECIDED_THRESH 0.5, UNSUP_BOX_LOSSES True and FOCAL_GAMMA 0.
    group.ENABLED = False
    # Background regions weigh the teacher's probability of it, and the classification loss is
    # divided by the sum of the weights.
    group.BACKGROUND = True
    # Coordinates are learned from boxes that the teacher finds again from jittered copies, also
    # undecided ones; only with UNSUP_BOX_LOSSES.
    group.JITTER = True


def _add_pseco(group: CfgNode) -> None:
    # Regions that learn a box chosen by the teacher's word, and its coordinates weighed by the
    # student's. Published with SCORE_THRESH 0.5, UNSUP_BOX_LOSSES True and LSM's HEAD "main".
    group.ENABLED = False
    # Prediction-guided assignment of sampled regions.
    group.ASSIGNMENT = True
    # Positive-proposal consistency voting, only with UNSUP_BOX_LOSSES.
    group.VOTING = True


def add_detectron2_config(cfg: CfgNode) -> None:
    """Add the keys of `SSOD` that only the Detectron2 host has; needs `add_ssod_config`."""
    ssod = cfg.SSOD
    # What the model is in eval mode: "teacher" (once it has started) or "student".
    ssod.EVAL_MODEL = "teacher"
    # Checkpoints to keep besides the best and the final one.
    ssod.CHECKPOINTS_TO_KEEP = 3
    # Names in `DatasetCatalog` of unlabeled images; DATASETS.TRAIN names the labeled ones.
    ssod.DATA.UNLABELED = ()
