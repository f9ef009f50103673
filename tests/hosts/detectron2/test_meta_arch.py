import pprint
import zlib

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer

from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, PseudoLabelFilter
from ssod.core.structures import PseudoLabels, Targets, TwoStreamBatch, Views
from ssod.errors import InputError
from ssod.hosts.detectron2.meta_arch import TeacherStudentRCNN
from tiny_detectron2 import tiny_config

NUM_CLASSES = 6
LOSS_NAMES = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
TWO_BOXES = [[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 54.0]]
ONE_BOX = [[8.0, 8.0, 50.0, 44.0]]
NO_BOX: list = []

# Every anchor, region and true box is learned, so that nothing depends on which were drawn.
ALL_SAMPLES = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
)
# Of one step in the burn-in and one after it.
GOLDEN_LOSSES = {
    "1 loss_box_reg": 1.00531,
    "1 loss_cls": 2.93978,
    "1 loss_rpn_cls": 0.852885,
    "1 loss_rpn_loc": 0.000960935,
    "2 loss_box_reg": 0.457783,
    "2 loss_box_reg_unsup": 1.08691,
    "2 loss_cls": 3.00822,
    "2 loss_cls_unsup": 10.1457,
    "2 loss_rpn_cls": 0.830635,
    "2 loss_rpn_cls_unsup": 3.12701,
    "2 loss_rpn_loc": 0.000673227,
    "2 loss_rpn_loc_unsup": 0.0358502,
}


@PSEUDO_LABEL_FILTER_REGISTRY.register()
class GivenTargets(PseudoLabelFilter):
    """Answers with `targets`, which a test sets, whatever was detected."""

    targets: list[Targets]

    def forward(self, detections):
        ones = [torch.ones(len(t)) for t in self.targets]
        return [
            PseudoLabels(t.boxes, t.classes, one, one, one, t.probs, one > 0)
            for t, one in zip(self.targets, ones, strict=True)
        ]


def _fill(detector, seed=0):
    """Set all weights by name, from a stream that no version of torch or NumPy changes."""
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
            drawn = torch.from_numpy(random.standard_normal(parameter.shape)).float()
            if parameter.dim() > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(name.endswith("norm.weight") + 0.1 * drawn)


@pytest.fixture
def config(tmp_path):
    """Make the tiny config with overrides; there is no data."""
    return lambda *overrides: tiny_config(tmp_path, tmp_path / "run", *overrides)


@pytest.fixture
def build(config):
    """Build the tiny model with overrides; its student's weights depend on nothing else."""

    def build(*overrides):
        model = build_model(config(*overrides))
        _fill(model.student)
        return model

    return build


def _images(*sizes, seed=0):
    random = np.random.RandomState(seed)
    return [torch.from_numpy(random.randint(0, 256, (3, *s)).astype(np.uint8)) for s in sizes]


def _targets(*rows):
    targets = []
    for boxes in rows:
        boxes = torch.tensor(boxes).reshape(-1, 4)
        classes = torch.arange(len(boxes)) + 1
        targets.append(Targets.from_ground_truth(boxes, classes, NUM_CLASSES))
    return targets


def _batch(*rows):
    """Two labeled images with these boxes, and two unlabeled ones; no two views are equal."""
    views = [_images((64, 64), (56, 62), seed=seed) for seed in range(4)]
    labeled = Views(views[0], views[1], _targets(*rows), [1, 2])
    return TwoStreamBatch(labeled, Views(views[2], views[3], None, [3, 4]), [])


def _inputs(*sizes):
    """Images as Detectron2's models take them, to be answered in twice their pixels."""
    return [
        {"image": image.float(), "height": 2 * image.shape[1], "width": 2 * image.shape[2]}
        for image in _images(*sizes, seed=9)
    ]


def _assert_same_instances(actual, expected):
    assert actual.image_size == expected.image_size
    assert len(actual) == len(expected) > 0
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


def _with_other_teacher(model):
    """Return the model in eval mode, with a teacher that has started and other weights."""
    model.set_extra_state(torch.tensor([7, 1]))
    _fill(model.teacher, seed=1)
    return model.eval()


def test_config_gives_the_registered_model_with_a_frozen_teacher(config):
    cfg = config()
    assert META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE) is TeacherStudentRCNN
    model = build_model(cfg)
    assert type(model) is TeacherStudentRCNN
    for change_mode, training in [
        (lambda: None, True),
        (model.eval, False),
        (model.train, True),
        (lambda: model.train(False), False),
    ]:
        change_mode()
        assert model.training == training
        assert all(module.training == training for module in model.student.modules())
        assert not any(module.training for module in model.teacher.modules())
        assert all(parameter.requires_grad for parameter in model.student.parameters())
        assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_head_that_is_not_supported_is_refused_in_one_line(config):
    key = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    with pytest.raises(InputError, match="Cascade.* not supported; .* StandardROIHeads") as error:
        build_model(config("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", key, True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("eval_model", "started", "answering"),
    [
        ("teacher", False, "student"),
        ("teacher", True, "teacher"),
        ("student", False, "student"),
        ("student", True, "student"),
    ],
)
def test_eval_mode_is_the_detector_of_the_config(build, eval_model, started, answering):
    model = _with_other_teacher(build("SSOD.EVAL_MODEL", eval_model))
    model.teacher_started = started
    inputs = _inputs((64, 64), (50, 70))
    answers = {name: getattr(model, name)(inputs) for name in ("student", "teacher")}
    scores = [answers[name][0]["instances"].scores for name in answers]
    assert not torch.equal(*scores)
    found = model(inputs)
    assert [list(item) for item in found] == [["instances"]] * 2
    for item, expected in zip(found, answers[answering], strict=True):
        _assert_same_instances(item["instances"], expected["instances"])


def test_the_teacher_answers_from_the_end_of_the_burn_in_on(build):
    model = build("SSOD.BURN_IN_ITERS", 1, "SSOD.EMA_DECAY", 0.5).eval()
    _fill(model.teacher, seed=1)
    inputs = _inputs((64, 64))
    before, first = model(inputs), model.student(inputs)
    model.after_step()
    assert model.start_teacher_if_due()  # as a copy of the student
    _fill(model.student, seed=2)
    for found in (before, model(inputs)):
        _assert_same_instances(found[0]["instances"], first[0]["instances"])


@pytest.fixture
def predicted(config, build, tmp_path):
    """The picture, `DefaultPredictor` with a checkpoint's weights, and the checkpoint's model."""
    model = _with_other_teacher(build())
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    picture = np.random.RandomState(3).randint(0, 256, (64, 80, 3)).astype(np.uint8)
    return picture, DefaultPredictor(config("MODEL.WEIGHTS", path)), model


def test_default_predictor_gives_the_teachers_detections(predicted):
    picture, predictor, model = predicted
    assert predictor.model.teacher_started
    assert predictor.model.iteration == 7
    # 64 pixels is the size of the config's test images: the predictor changes no pixel.
    image = torch.from_numpy(picture.astype("f4").transpose(2, 0, 1))
    with torch.no_grad():
        expected = model.teacher([{"image": image}])[0]["instances"]
    found = predictor(picture)["instances"]
    _assert_same_instances(found, expected)
    assert found.image_size == picture.shape[:2]


def test_visualizer_draws_the_detections(predicted):
    picture, predictor, _ = predicted
    found = predictor(picture)["instances"]
    visualizer = Visualizer(picture[:, :, ::-1])
    drawn = visualizer.draw_instance_predictions(found)
    assert drawn.get_image().shape == picture.shape
    boxes = found.pred_boxes.tensor.numpy()
    expected = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    rectangles = [
        (*p.get_xy(), p.get_width(), p.get_height()) for p in visualizer.output.ax.patches
    ]
    assert sorted(map(tuple, expected)) == sorted(rectangles)


def test_what_detectron2_counts_is_kept_apart_for_unlabeled_images(build):
    """The labeled forward comes first, so its counts are those of the burn-in's same step."""
    latest = {}
    for burn_in_iters in (1, 0):
        model = build("SSOD.BURN_IN_ITERS", burn_in_iters, "SSOD.FILTER.SCORE_THRESH", 1.0)
        model.start_teacher_if_due()
        with EventStorage() as storage:
            torch.manual_seed(0)
            model(_batch(TWO_BOXES, ONE_BOX))
        latest[burn_in_iters] = storage.latest()
    assert latest[1].keys() == {
        *("rpn/num_pos_anchors", "rpn/num_neg_anchors"),
        *("roi_head/num_fg_samples", "roi_head/num_bg_samples"),
    }
    assert latest[0].keys() == latest[1].keys() | {f"unsup/{name}" for name in latest[1]}
    for name, value in latest[1].items():
        assert latest[0][name] == value
    # The labeled images have boxes, the unlabeled ones have none.
    for name in ("rpn/num_pos_anchors", "roi_head/num_fg_samples"):
        assert latest[0][name][0] > 0
        assert latest[0][f"unsup/{name}"][0] == 0


@pytest.mark.parametrize("unsup_box_losses", [False, True])
@pytest.mark.parametrize(
    ("burn_in_iters", "score_thresh", "rows"),
    [
        (1, 0.1, (TWO_BOXES, ONE_BOX)),
        (0, 0.1, (TWO_BOXES, ONE_BOX)),
        (0, 1.0, (TWO_BOXES, ONE_BOX)),
        (0, 1.0, (NO_BOX, NO_BOX)),
    ],
    ids=["burn-in", "pseudo-boxes", "no pseudo-box", "no box at all"],
)
def test_every_parameter_gets_a_gradient(
    build, burn_in_iters, score_thresh, rows, unsup_box_losses
):
    """`DistributedDataParallel` without `find_unused_parameters` needs it in every iteration."""
    model = build(
        *("SSOD.BURN_IN_ITERS", burn_in_iters, "SSOD.FILTER.SCORE_THRESH", score_thresh),
        *("SSOD.UNSUP_BOX_LOSSES", unsup_box_losses),
    )
    model.start_teacher_if_due()
    with EventStorage():
        losses = model(_batch(*rows))
    assert any("unsup" in name for name in losses) == (burn_in_iters == 0)
    if burn_in_iters == 0:
        assert (model.metrics["pseudo/num_per_image"] > 0) == (score_thresh < 1)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in gradients} == {"student"}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def _losses_with_truth_as_pseudo_labels(model):
    """Losses of images that are labeled and unlabeled, weak and strong, all at once."""
    images, truth = _images((64, 64), (56, 62)), _targets(TWO_BOXES, ONE_BOX)
    model.pseudo_label_filter.targets = truth

    def seed(module, inputs):  # the student's two forwards draw the same anchors and regions
        torch.manual_seed(5)

    model.start_teacher_if_due()
    model.student.backbone.register_forward_pre_hook(seed)
    with EventStorage():
        return model(
            TwoStreamBatch(
                Views(images, images, truth, [1, 2]), Views(images, images, None, [1, 2]), []
            )
        )


def test_pseudo_labels_equal_to_the_truth_give_the_supervised_losses(build):
    options = (
        *("SSOD.FILTER.NAME", "GivenTargets", "SSOD.BURN_IN_ITERS", 0),
        *("SSOD.UNSUP_BOX_LOSSES", True, "SSOD.FOCAL_GAMMA", 0.0),
    )
    model = build(*options, "SSOD.UNSUP_LOSS_WEIGHT", 1.0)
    losses = _losses_with_truth_as_pseudo_labels(model)
    assert losses.keys() == {*LOSS_NAMES, *(f"{name}_unsup" for name in LOSS_NAMES)}
    instances = [
        Instances(size, gt_boxes=Boxes(t.boxes), gt_classes=t.classes, gt_weights=t.weights)
        for size, t in zip([(64, 64), (56, 62)], _targets(TWO_BOXES, ONE_BOX), strict=True)
    ]
    images = [image.flip(0) for image in _images((64, 64), (56, 62))]  # BGR
    with EventStorage():  # Detectron2's own training forward
        expected = model.student(
            [{"image": i, "instances": t} for i, t in zip(images, instances, strict=True)]
        )
    weighted = _losses_with_truth_as_pseudo_labels(build(*options, "SSOD.UNSUP_LOSS_WEIGHT", 3.0))
    for name in LOSS_NAMES:
        assert losses[name] > 0
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(losses[f"{name}_unsup"], losses[name], rtol=1e-6, atol=1e-6)
        assert weighted[name] == losses[name]
        assert weighted[f"{name}_unsup"] == 3 * losses[f"{name}_unsup"]


def test_losses_of_two_steps_are_those_of_before(build):
    """Weights and threshold are such that noise of 1e-6 in the weights flips no decision."""
    model = build(
        *ALL_SAMPLES,
        *("SSOD.BURN_IN_ITERS", 1, "SSOD.LABELED_VIEWS", "both", "SSOD.UNSUP_BOX_LOSSES", True),
        *("SSOD.FILTER.SCORE_THRESH", 0.77, "SSOD.UNSUP_LOSS_WEIGHT", 4.0),
    )
    batch = _batch(TWO_BOXES, ONE_BOX)
    with EventStorage(), torch.no_grad():
        losses = {f"1 {name}": loss for name, loss in model(batch).items()}
        model.after_step()
        model.start_teacher_if_due()
        # Instead of an optimizer's step, which would enlarge what versions of torch round apart.
        _fill(model.student, seed=1)
        losses |= {f"2 {name}": loss for name, loss in model(batch).items()}
    actual = {name: float(f"{loss.item():.6g}") for name, loss in losses.items()}
    new = f"if the change is meant, paste\nGOLDEN_LOSSES = {pprint.pformat(actual)}"
    assert actual == pytest.approx(GOLDEN_LOSSES, rel=1e-4), new
