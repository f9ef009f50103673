import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage

from ssod.data.build import build_train_loader, load_run_data
from ssod.data.loader import FailedImages
from ssod.errors import InputError
from ssod.hosts.detectron2.solver import build_clipper, build_optimizer
from ssod.hosts.detectron2.trainer import TeacherStudentTrainer, split_batch
from tiny_detectron2 import tiny_config

# Every anchor and region is learned, so that nothing depends on which were drawn.
ALL_SAMPLES = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
)


@pytest.fixture
def make_trainer(shapes, tmp_path):
    """Build a trainer of the tiny run with overrides; `trainer.cfg` is its config."""

    def make(*overrides, **arguments):
        cfg = tiny_config(shapes, tmp_path / "run", *overrides)
        torch.manual_seed(0)
        model = build_model(cfg)
        trainer = TeacherStudentTrainer(
            model,
            build_train_loader(cfg, load_run_data(cfg), 0),
            build_optimizer(cfg, model.student),
            seed=0,
            log_period=cfg.SSOD.LOG_PERIOD,
            max_skipped_steps=cfg.SSOD.MAX_SKIPPED_STEPS,
            failed=FailedImages(1.0),
            clipper=build_clipper(cfg),
            accumulate_steps=cfg.SSOD.ACCUMULATE_STEPS,
            **arguments,
        )
        trainer.cfg = cfg
        return trainer

    return make


def _state(trainer):
    return copy.deepcopy([trainer.teacher_student.student.state_dict(), trainer.optimizer.state])


def _train(trainer, start=0, stop=5):
    """Train without hooks; returns the latest value of each metric."""
    trainer.train(start, stop)
    return {name: value for name, (value, _) in trainer.storage.latest().items()}


def _break_gradients(trainer, *iterations):
    """Make gradients infinite in some iterations."""
    parameter = next(iter(trainer.teacher_student.student.roi_heads.parameters()))
    parameter.register_hook(lambda g: g * (torch.inf if trainer.iter in iterations else 1))


def _set_scale(trainer, scale):
    trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": scale})


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_is_not_finite_changes_no_weight(make_trainer, optimizer, broken):
    trainer = make_trainer("SSOD.OPTIMIZER", optimizer, "SSOD.LOG_PERIOD", 1)
    _break_gradients(trainer, broken)
    states = []
    trainer.after_step = lambda: states.append(_state(trainer))
    states.append(_state(trainer))
    metrics = _train(trainer, stop=3)
    model, momentum = states[broken + 1]
    for name, value in states[broken][0].items():
        assert torch.equal(model[name], value), name
    if optimizer == "SGD":
        buffers = zip(momentum.values(), states[broken][1].values(), strict=True)
        assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in buffers)
    assert any(not torch.equal(states[-1][0][name], model[name]) for name in model)
    assert all(value.isfinite().all() for value in states[-1][0].values())
    assert metrics["skipped_steps"] == 1
    assert trainer.teacher_student.iteration == 3


def test_too_many_skipped_steps_in_a_row_stop_with_the_files(make_trainer):
    trainer = make_trainer("SSOD.MAX_SKIPPED_STEPS", 2, "SSOD.LOG_PERIOD", 4, "SOLVER.MAX_ITER", 6)
    _break_gradients(trainer, 1, 3, 4)  # the row of two is cut by the end of a log period
    with pytest.raises(InputError, match=r"iteration 4: .* 2 steps in a row .*labeled_00000\d"):
        _train(trainer, stop=6)


def test_skipped_steps_that_are_not_in_a_row_do_not_stop(make_trainer):
    trainer = make_trainer("SSOD.MAX_SKIPPED_STEPS", 2, "SSOD.LOG_PERIOD", 2)
    _break_gradients(trainer, 0, 2, 4)
    assert _train(trainer)["skipped_steps"] == 3


def test_metrics_are_means_since_the_last_line(make_trainer):
    each = make_trainer("SSOD.LOG_PERIOD", 1)
    _train(each, stop=4)
    together = make_trainer("SSOD.LOG_PERIOD", 4)
    metrics = _train(together, stop=4)
    history = each.storage.histories()
    assert len(history["total_loss"].values()) == 4
    for name in ("total_loss", "loss_cls", "loss_cls_unsup", "pseudo/num_per_image", "grad_norm"):
        values = [value for value, _ in history[name].values()]
        assert metrics[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
    total = sum(v for k, v in metrics.items() if k.startswith("loss_") and "unsup" not in k)
    # Unlabeled losses exist in the last two of the four iterations only.
    total += sum(v for k, v in metrics.items() if k.startswith("loss_") and "unsup" in k) / 2
    assert metrics["total_loss"] == pytest.approx(total, rel=1e-5)


def test_what_detectron2_counts_is_kept_apart_for_unlabeled_images(make_trainer):
    metrics = _train(make_trainer())
    assert metrics["unsup/roi_head/num_fg_samples"] != metrics["roi_head/num_fg_samples"]


def test_parts_of_a_batch_add_up_to_the_batch(make_trainer):
    gradients = {}
    for steps in (1, 2):
        trainer = make_trainer(
            *ALL_SAMPLES, "SSOD.ACCUMULATE_STEPS", steps, "INPUT.MIN_SIZE_TRAIN", [64]
        )
        model = trainer.teacher_student
        trainer.optimizer.step = lambda *a, **k: None
        _train(trainer, stop=1)
        gradients[steps] = {n: p.grad.clone() for n, p in model.student.named_parameters()}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[2][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_second_branch_changes_no_draw_of_the_next_part(make_trainer):
    keys = ("SSOD.ACCUMULATE_STEPS", 2, "SSOD.BURN_IN_ITERS", 0, "SSOD.LOG_PERIOD", 1)
    branch = ("SSOD.LSM.ENABLED", True, "SSOD.LSM.ALPHA", 0.05, "SSOD.LSM.WEIGHT", 0)
    expected = _train(make_trainer(*keys), stop=1)
    actual = _train(make_trainer(*keys, *branch, "SSOD.LSM.DISTILL_WEIGHT", 0), stop=1)
    names = [name for name in expected if name.startswith("loss_")]
    assert {name: actual[name] for name in names} == {name: expected[name] for name in names}


def test_split_batch_keeps_order_and_targets(make_trainer):
    trainer = make_trainer("SSOD.BURN_IN_ITERS", 0)
    batch = next(iter(trainer.data_loader))
    parts = split_batch(batch, 2)
    for stream in ("labeled", "unlabeled"):
        whole, views = getattr(batch, stream), [getattr(part, stream) for part in parts]
        assert [view.image_ids for view in views] == [[i] for i in whole.image_ids]
        for i, view in enumerate(views):
            assert torch.equal(view.weak[0], whole.weak[i])
            assert torch.equal(view.strong[0], whole.strong[i])
            assert (view.targets is None) == (stream == "unlabeled")
            assert view.targets is None or torch.equal(
                view.targets[0].boxes, whole.targets[i].boxes
            )
    with pytest.raises(ValueError, match="2 images cannot be divided into 3"):
        split_batch(batch, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_close_to_fp32(make_trainer, dtype):
    trainer = make_trainer(amp_dtype=dtype)
    if dtype == torch.float16:
        _set_scale(trainer, 256.0)  # the initial one makes the first gradients overflow
    metrics, exact = _train(trainer, stop=1), _train(make_trainer(), stop=1)
    assert metrics["loss_rpn_cls"] == pytest.approx(exact["loss_rpn_cls"], rel=0.05)
    assert metrics["loss_rpn_cls"] != exact["loss_rpn_cls"]
    assert metrics["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.2)


def test_fp16_starts_with_skipped_steps_until_the_scale_fits(make_trainer):
    options = ("SSOD.LOG_PERIOD", 1, "SOLVER.MAX_ITER", 12, "SSOD.UNSUP_LOSS_WEIGHT", 0)
    trainer = make_trainer(*options, amp_dtype=torch.float16)
    before = _state(trainer)[0]
    metrics = _train(trainer, stop=12)
    assert metrics["grad_scale"] == 65536 / 2 ** metrics["skipped_steps"]
    assert 0 < metrics["skipped_steps"] < 12
    after = trainer.teacher_student.student.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_loss_scale_is_saved_and_restored(make_trainer):
    trainer = make_trainer(amp_dtype=torch.float16)
    _train(trainer, stop=1)
    _set_scale(trainer, 128.0)
    other = make_trainer(amp_dtype=torch.float16)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 128
    in_fp32 = make_trainer()
    in_fp32.load_state_dict(trainer.state_dict())
    assert in_fp32.grad_scaler.get_scale() == 1


def test_state_of_another_optimizer_is_refused(make_trainer):
    state = make_trainer().state_dict()
    with pytest.raises(InputError, match="optimizer is SGD, but SSOD.OPTIMIZER asks for AdamW"):
        make_trainer("SSOD.OPTIMIZER", "AdamW").load_state_dict(state)


@pytest.mark.parametrize(
    ("clip_type", "norm"),
    [
        ("value", lambda p: max(g.abs().max() for g in p)),
        ("norm", lambda p: max(g.norm() for g in p)),
        ("full_model", lambda p: torch.stack([g.norm() for g in p]).norm()),
    ],
)
def test_gradients_are_clipped(make_trainer, clip_type, norm):
    options = ("ENABLED", True, "CLIP_TYPE", clip_type, "CLIP_VALUE", 1e-3)
    keys = [f"SOLVER.CLIP_GRADIENTS.{o}" if i % 2 == 0 else o for i, o in enumerate(options)]
    trainer = make_trainer(*keys)
    _train(trainer, stop=1)
    gradients = [p.grad for p in trainer.teacher_student.student.parameters()]
    assert norm(gradients).item() == pytest.approx(1e-3, rel=1e-2)


def test_unknown_clipping_and_optimizer_are_refused(shapes, tmp_path):
    clip = "SOLVER.CLIP_GRADIENTS"
    cfg = tiny_config(shapes, tmp_path, f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", "all")
    with pytest.raises(InputError, match="CLIP_TYPE must be .*\"full_model\", got 'all'"):
        build_clipper(cfg)
    cfg = tiny_config(shapes, tmp_path, "SSOD.OPTIMIZER", "Lion")
    with pytest.raises(InputError, match='must be "SGD" or "AdamW", got \'Lion\''):
        build_optimizer(cfg, torch.nn.Linear(1, 1))


def test_fused_optimizer_steps_as_detectron2s(make_trainer):
    """Same groups, and the same weights after two steps, as Detectron2's own optimizer."""
    from detectron2.solver import build_optimizer as host_optimizer

    weights = []
    for build in (build_optimizer, host_optimizer):
        trainer = make_trainer("SOLVER.WEIGHT_DECAY_NORM", 0.5)
        student = trainer.teacher_student.student
        optimizer = build(trainer.cfg, student)
        scheduler = build_lr_scheduler(trainer.cfg, optimizer)
        with EventStorage():
            for batch, _ in zip(trainer.data_loader, range(2), strict=False):
                torch.manual_seed(0)
                optimizer.zero_grad()
                sum(trainer.model(batch).values()).backward()
                optimizer.step()
                scheduler.step()
        weights.append(student.state_dict())
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-5, atol=1e-7)
