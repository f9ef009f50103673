"""Keys reach the filter and the methods, and every key reaches something."""

import inspect
from contextlib import nullcontext

import pytest
import torch

from core.fake_detector import NUM_CLASSES, FakeDetector
from ssod.config import merge_config
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY
from ssod.core.method import METHOD_REGISTRY
from ssod.core.running_stats import RunningAverage
from ssod.core.teacher_student import TeacherStudent
from ssod.errors import InputError
from ssod.hosts.build import build_filter, build_methods, teacher_student_arguments
from ssod.hosts.torchvision.defaults import get_config
from ssod.plugins import GIVEN

# Tests of plugins register others.
OWN = [cls for _, cls in PSEUDO_LABEL_FILTER_REGISTRY if cls.__module__.startswith("ssod.")]
FILTERS = {cls.__name__: cls for cls in OWN}
METHODS = {cls.group: cls for _, cls in METHOD_REGISTRY if cls.__module__.startswith("ssod.")}
# Read by the builder itself, or by hosts.
NO_ARGUMENTS = {"FILTER": {"NAME"}} | dict.fromkeys(METHODS, {"ENABLED"})
# Published values that no recipe changes.
NO_KEYS = {
    "AdaptiveClassThreshold": {"min_score"},
    "GaussianMixtureThreshold": {"num_scores"},
    "SoftMatchWeighting": {"n_sigma"},
    "LABEL_MATCH": {"min_score", "min_iou", "temperature"},
    "SOFT_TEACHER": {"max_spread", "copies", "offset"},
    "PSECO": {"min_iou", "num_ious"},
}
# Another value of each key, and where it ends up.
VALUES = {
    "FixedThreshold": {
        "SCORE_THRESH": (0.75, lambda f: f.score_thresh),
        "UNDECIDED_THRESH": (0.25, lambda f: f.undecided_thresh),
    },
    "AdaptiveClassThreshold": {
        "SOURCE": ("sweep", lambda f: f.source),
        "REFRESH_PERIOD": (7, lambda f: f.refresh_period),
        "QUEUE_IMAGES": (11, lambda f: f.queue.rows.shape[0]),
        "SWEEP_IMAGES": (13, lambda f: f.sweep_images),
        "RELIABLE_FRACTION": (0.5, lambda f: f.reliable_fraction),
    },
    "SoftMatchWeighting": {
        "EMA_DECAY": (0.5, lambda f: f.moments.decay),
        "SCOPE": ("per_class", lambda f: f.scope),
        "START": ("paper", lambda f: f.start),
        "ALIGNMENT": ("none", lambda f: f.alignment),
        "POOL_FLOOR": (0.25, lambda f: f.pool_floor),
    },
    "GaussianMixtureThreshold": {
        "SCORE_THRESH": (0.75, lambda f: f.score_thresh),
    },
    "LSM": {
        "WEIGHT": (0.25, lambda m: m.weight),
        "LEVELS": ((2, 4), lambda m: m.levels),
        "HEAD": ("main", lambda m: "main" if m.classifier is None else "aux"),
        "RPN_LOSS": (True, lambda m: bool(m.rpn_losses)),
        "DISTILL_WEIGHT": (0.5, lambda m: m.distill_weight),
    },
    "LABEL_MATCH": {
        "WEIGHT": (0.25, lambda m: m.weight),
        "NORMALIZER": ("matched", lambda m: m.normalizer),
        "MINING": ("teacher", lambda m: m.mining),
    },
    "CONTRASTIVE": {
        "WEIGHT": (0.25, lambda m: m.weight),
        "RAMP_ITERS": (7, lambda m: m.ramp_iters),
        "PUSH_THRESH": (0.25, lambda m: m.push_thresh),
        "VIEWS": ("student", lambda m: m.views),
    },
    "DASO": {
        "WEIGHT": (0.25, lambda m: m.weight),
        "T_DIST": (1.5, lambda m: m.t_dist),
        "T_PROTO": (0.1, lambda m: m.t_proto),
        "MAX_BLEND": (0.5, lambda m: m.max_blend),
        "QUEUE_LENGTH": (7, lambda m: m.queue.sums.shape[1]),
        "DELAY": (11, lambda m: m.delay),
        "WINDOW": (13, lambda m: m.window),
        "POOL_FLOOR": (0.25, lambda m: m.pool_floor),
    },
    "MIXPL": {
        "MIXUP": (False, lambda m: m.mixup),
        "MOSAIC_WEIGHT": (0.25, lambda m: m.mosaic_weight),
    },
    "SOFT_TEACHER": {
        "BACKGROUND": (False, lambda m: m.background),
        "JITTER": (False, lambda m: m.jitter),
    },
    "PSECO": {
        "ASSIGNMENT": (False, lambda m: m.assignment),
        "VOTING": (False, lambda m: m.voting),
    },
}


def _config(*overrides):
    return merge_config(get_config(), "", [str(item) for item in overrides])


def _filter(name, *overrides):
    return build_filter(_config("SSOD.FILTER.NAME", name, *overrides), NUM_CLASSES)


def _arguments(cls):
    return inspect.signature(cls).parameters


@pytest.mark.parametrize(
    ("group", "classes"),
    [("FILTER", FILTERS.values()), *((group, [cls]) for group, cls in METHODS.items())],
    ids=["FILTER", *METHODS],
)
def test_no_key_is_dead(group, classes):
    arguments = {name.upper() for cls in classes for name in _arguments(cls)}
    assert get_config().SSOD[group].keys() - arguments == NO_ARGUMENTS[group]


@pytest.mark.parametrize(
    ("name", "cls", "group"),
    [(n, c, "FILTER") for n, c in FILTERS.items()] + [(g, c, g) for g, c in METHODS.items()],
    ids=[*FILTERS, *METHODS],
)
def test_every_argument_is_a_key_or_given(name, cls, group):
    keys = {key.lower() for key in get_config().SSOD[group]}
    assert _arguments(cls).keys() - keys - set(GIVEN) == NO_KEYS.get(name, set())


def test_the_table_of_values_has_every_key():
    cfg = get_config().SSOD
    assert {key for name in FILTERS for key in VALUES[name]} == cfg.FILTER.keys() - {"NAME"}
    for group in METHODS:
        assert VALUES[group].keys() == cfg[group].keys() - {"ENABLED"}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in VALUES for key in VALUES[name]], ids=str
)
def test_a_key_changes_what_it_names(name, key):
    value, read = VALUES[name][key]

    def build(*overrides):
        if name in FILTERS:
            return _filter(name, "SSOD.LSM.ENABLED", True, *overrides)
        cfg = _config(f"SSOD.{name}.ENABLED", True, "SSOD.UNSUP_BOX_LOSSES", True, *overrides)
        return build_methods(cfg, FakeDetector())[name]

    group = "FILTER" if name in FILTERS else name
    assert read(build()) != value
    assert read(build(f"SSOD.{group}.{key}", value)) == value


def test_what_is_given_comes_from_the_rest_of_the_config():
    labels = _filter("AdaptiveClassThreshold", "TEST.DETECTIONS_PER_IMAGE", 5)
    assert labels.queue.rows.shape == (12800, 5, 2)
    assert labels.reliable_thresh.shape == (NUM_CLASSES,)
    mixture = _filter("GaussianMixtureThreshold", "TEST.DETECTIONS_PER_IMAGE", 5)
    assert (mixture.max_detections, mixture.scores.shape) == (5, (NUM_CLASSES, 100))
    start = _filter("SoftMatchWeighting", "SSOD.FILTER.START", "paper").moments
    assert isinstance(start, RunningAverage)
    cfg = _config("SSOD.LSM.ENABLED", True, "SSOD.LSM.RPN_LOSS", True, "SSOD.LSM.HEAD", "main")
    assert not build_methods(cfg, FakeDetector())["LSM"].learns_boxes
    cfg.SSOD.UNSUP_BOX_LOSSES = True
    branch = build_methods(cfg, FakeDetector())["LSM"]
    assert branch.learns_boxes and branch.rpn_losses == ("loss_rpn_cls", "loss_rpn_loc")


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_about_coordinates_alone_is_done_only_if_they_are_learned(learned):
    cfg = _config("SSOD.SOFT_TEACHER.ENABLED", True, "SSOD.PSECO.ENABLED", True)
    cfg.SSOD.UNSUP_BOX_LOSSES = learned
    methods = build_methods(cfg, FakeDetector())
    assert (methods["SOFT_TEACHER"].jitter, methods["PSECO"].voting) == (learned, learned)


@pytest.mark.parametrize("passes", [1, 2, 8])
def test_statistics_are_of_iterations_however_many_passes_these_have(passes):
    overrides = ("SSOD.ACCUMULATE_STEPS", passes, "SSOD.FILTER.EMA_DECAY", 0.9)
    soft = _filter("SoftMatchWeighting", *overrides)
    assert soft.moments.decay**passes == pytest.approx(0.9)
    adaptive = _filter("AdaptiveClassThreshold", *overrides, "SSOD.FILTER.REFRESH_PERIOD", 7)
    assert (adaptive.refresh_period, adaptive.passes) == (7, passes)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.0])
def test_a_decay_out_of_range_is_refused_as_it_was_set(decay):
    overrides = ("SSOD.ACCUMULATE_STEPS", 2, "SSOD.FILTER.EMA_DECAY", decay)
    with pytest.raises(InputError, match=rf"SSOD.FILTER.EMA_DECAY must be .*, got {decay}"):
        _filter("SoftMatchWeighting", *overrides)


@pytest.mark.parametrize("group", [None, "LSM", "LABEL_MATCH", "CONTRASTIVE", "SOFT_TEACHER"])
def test_boxes_are_undecided_only_for_methods_that_learn_them(group):
    overrides = ("SSOD.FILTER.UNDECIDED_THRESH", 0.25)
    labels = _filter(
        "FixedThreshold", *((f"SSOD.{group}.ENABLED", True) if group else ()), *overrides
    )
    assert labels.undecided_thresh == (0.25 if group else 0.7)
    assert labels.drops_undecided == bool(group)


def test_the_former_name_of_the_lower_threshold_is_understood():
    cfg = _config("SSOD.LSM.ENABLED", True, "SSOD.LSM.ALPHA", 0.25)
    assert build_filter(cfg, NUM_CLASSES).undecided_thresh == 0.25


@pytest.mark.parametrize("low", [-0.1, 0.71, ".nan"])
@pytest.mark.parametrize("name", FILTERS)
def test_a_lower_threshold_out_of_range_is_refused_where_it_is_used(name, low):
    overrides = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", low)
    key = "SSOD.FILTER.UNDECIDED_THRESH"
    message = rf"^{key} must be in \[0, SSOD.FILTER.SCORE_THRESH 0.7\], got .*$"
    is_used = name == "FixedThreshold"
    with pytest.raises(InputError, match=message) if is_used else nullcontext():
        _filter(name, *overrides)


def test_an_unknown_filter_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match="AdaptiveClass.*Fixed.*Gaussian.*SoftMatch.*got 'NoSuchFilter'"
    ):
        _filter("NoSuchFilter")


def test_methods_are_those_that_are_enabled():
    assert build_methods(_config(), FakeDetector()) == {}
    methods = build_methods(_config("SSOD.LSM.ENABLED", True), FakeDetector())
    assert [(name, type(m)) for name, m in methods.items()] == [("LSM", METHODS["LSM"])]
    both = build_methods(
        _config("SSOD.LSM.ENABLED", True, "SSOD.LABEL_MATCH.ENABLED", True), FakeDetector()
    )
    # What is mined is known to the second branch.
    assert list(both) == ["LABEL_MATCH", "LSM"]


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("LABEL_MATCH", "WEIGHT", -1.0, "must be at least 0, got -1.0"),
        ("LABEL_MATCH", "NORMALIZER", "all", r"must be one of \('sampled', 'matched'\), got 'all'"),
        (
            "LABEL_MATCH",
            "MINING",
            "on",
            r"must be one of \('student', 'teacher', 'none'\), got 'on'",
        ),
        ("CONTRASTIVE", "WEIGHT", -1.0, "must be at least 0, got -1.0"),
        ("CONTRASTIVE", "RAMP_ITERS", -1, "must be at least 0, got -1"),
        ("CONTRASTIVE", "PUSH_THRESH", 1.5, r"must be in \[0, 1\], got 1.5"),
        ("CONTRASTIVE", "VIEWS", "weak", r"must be one of \('teacher', 'student'\), got 'weak'"),
        ("DASO", "WEIGHT", -1.0, "must be at least 0, got -1.0"),
        ("DASO", "T_DIST", 0.0, "must be above 0, got 0.0"),
        ("DASO", "T_PROTO", -0.5, "must be above 0, got -0.5"),
        ("DASO", "MAX_BLEND", 1.5, r"must be in \[0, 1\], got 1.5"),
        ("DASO", "QUEUE_LENGTH", 0, "must be at least 1, got 0"),
        ("DASO", "DELAY", -1, "must be at least 0, got -1"),
        ("DASO", "WINDOW", 0, "must be at least 1, got 0"),
        ("MIXPL", "MOSAIC_WEIGHT", -0.5, "must be at least 0, got -0.5"),
        ("DASO", "POOL_FLOOR", ".nan", r"must be in \[0, 1\], got nan"),
    ],
)
def test_bad_values_of_methods_are_one_line(group, key, value, message):
    cfg = _config(f"SSOD.{group}.ENABLED", True, f"SSOD.{group}.{key}", value)
    with pytest.raises(InputError, match=f"^SSOD.{group}.{key} {message}$"):
        build_methods(cfg, FakeDetector())


@pytest.mark.parametrize("group", ["DASO", "CONTRASTIVE"])
def test_methods_that_compare_classes_refuse_one_class(group):
    student = FakeDetector()
    student.num_classes = 1
    with pytest.raises(InputError, match=f"^SSOD.{group} needs at least 2 classes .*, got 1$"):
        build_methods(_config(f"SSOD.{group}.ENABLED", True), student)


@pytest.mark.parametrize(
    ("images", "passes", "keys", "needed"),
    [
        (8, 4, (), 4),
        (3, 1, ("SSOD.MIXPL.MIXUP", False), 4),
        (4, 4, ("SSOD.MIXPL.MOSAIC_WEIGHT", 0), 2),
        (8, 2, (), None),
        (8, 4, ("SSOD.MIXPL.MOSAIC_WEIGHT", 0), None),
        (1, 1, ("SSOD.MIXPL.MOSAIC_WEIGHT", 0, "SSOD.MIXPL.MIXUP", False), None),
        (1, 1, ("SSOD.UNSUP_LOSS_WEIGHT", 0), None),  # a control uses none of them
    ],
)
def test_too_few_images_to_mix_are_one_line(images, passes, keys, needed):
    batch = ("SSOD.DATA.UNLABELED_PER_BATCH", images, "SSOD.ACCUMULATE_STEPS", passes)
    cfg = _config("SSOD.MIXPL.ENABLED", True, *batch, *keys)
    message = rf"^SSOD.MIXPL .* needs {needed} unlabeled .*, got {images // passes}; .*$"
    with pytest.raises(InputError, match=message) if needed else nullcontext():
        build_methods(cfg, FakeDetector())


def test_mixing_counts_the_images_of_one_process(monkeypatch):
    monkeypatch.setattr("ssod.hosts.build.get_world_size", lambda: 4)
    cfg = _config("SSOD.MIXPL.ENABLED", True, "SSOD.DATA.UNLABELED_PER_BATCH", 8)
    with pytest.raises(InputError, match="needs 4 unlabeled ones there, got 2"):
        build_methods(cfg, FakeDetector())


def test_another_way_with_empty_images_is_refused():
    student = FakeDetector()
    cfg = _config("SSOD.EMPTY_IMAGES", "none")
    message = (
        r"^SSOD.EMPTY_IMAGES must be one of \('background', 'left_out', 'share'\), got 'none'$"
    )
    with pytest.raises(InputError, match=message):
        TeacherStudent(student, **teacher_student_arguments(cfg, student))


def test_keys_of_the_mean_teacher_reach_it():
    values = {
        "BURN_IN_ITERS": 7,
        "EMA_DECAY": 0.5,
        "EMA_GAMMA": 4.0,
        "UNSUP_LOSS_WEIGHT": 0.25,
        "UNSUP_BOX_LOSSES": True,
        "LABELED_VIEWS": "weak",
        "EMPTY_IMAGES": "share",
    }
    overrides = [item for key, value in values.items() for item in (f"SSOD.{key}", value)]
    student = FakeDetector()
    model = TeacherStudent(student, **teacher_student_arguments(_config(*overrides), student))
    assert {key: getattr(model, key.lower()) for key in values} == values
    default = TeacherStudent(student, **teacher_student_arguments(_config(), student))
    assert not any(getattr(default, key.lower()) == value for key, value in values.items())


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_works_as_the_default_config_builds_it(name):
    student = FakeDetector().eval()
    labels = _filter(name)
    assert type(labels) is FILTERS[name]
    labels.set_label_distribution(torch.tensor([3, 2]), num_labeled=2)
    batch = student.preprocess([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2)
    with torch.no_grad():
        found = student.predict(student.features(batch), batch)
    for images in (found, [found[0], found[1][:0]], [found[0][:0]]):
        kept = labels(images)
        assert all(len(k) <= len(i) for k, i in zip(kept, images, strict=True))
    values = labels.metrics().items()
    assert all(n.startswith("pseudo/") and v.shape == () and v.isfinite() for n, v in values)
