"""The training step in runs of every host: guard, precision, accumulation, clipping, metrics."""

import copy
import json

import pytest
import torch

from contract.hosts import HOSTS, Host, read_lines
from ssod.errors import InputError
from tiny_run import BURN_IN_ITERS, MAX_ITER, differences

EACH = ("SSOD.LOG_PERIOD", 1)
SUPERVISED = ("SSOD.UNSUP_LOSS_WEIGHT", 0)
FLOAT16 = ("SOLVER.AMP.ENABLED", True, "SSOD.AMP_DTYPE", "float16")
# Every anchor and region is learned, so that nothing depends on which were drawn.
ALL_SAMPLES = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("INPUT.MIN_SIZE_TRAIN", [64], "INPUT.RANDOM_FLIP", "none", "MODEL.RESNETS.NORM", "GN"),
)


@pytest.fixture(params=HOSTS)
def host(request, shapes):
    return Host(request.param, shapes, "SSOD.DATA.VAL_JSON", "", "SOLVER.STEPS", [])


def _until(iterations):
    return ("SOLVER.MAX_ITER", iterations)


def _before_each(run, function):
    prepare = run.step.prepare

    def before():
        function()
        prepare()

    run.step.prepare = before


def _break_gradients(run, *iterations):
    """Make gradients infinite in some iterations."""
    parameter = next(iter(run.model.student.roi_heads.parameters()))
    parameter.register_hook(lambda g: g * (torch.inf if run.model.iteration in iterations else 1))


def _last(output):
    """The latest value of each metric."""
    return {name: value for line in read_lines(output) for name, value in line.items()}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_is_not_finite_changes_no_weight(host, tmp_path, optimizer, broken):
    run = host.open(tmp_path, "SSOD.OPTIMIZER", optimizer, *EACH, *_until(3))
    states = []

    def look():
        student = {n: p.detach().clone() for n, p in run.model.student.named_parameters()}
        states.append((student, copy.deepcopy(run.step.optimizer.state_dict()["state"])))

    _before_each(run, look)
    _break_gradients(run, broken)
    run.train()
    look()
    (before, kept), (after, state) = states[broken : broken + 2]
    assert differences(after, before) == []
    if optimizer == "SGD":
        assert differences(state, kept) == []
    assert differences(states[-1][0], after) != []
    assert all(value.isfinite().all() for value in states[-1][0].values())
    assert _last(tmp_path)["skipped_steps"] == 1
    assert run.model.iteration == 3


def test_too_many_skipped_steps_in_a_row_stop_with_the_files(host, tmp_path):
    keys = ("SSOD.MAX_SKIPPED_STEPS", 2, "SSOD.LOG_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 100)
    run = host.open(tmp_path, *keys, *_until(6))
    _break_gradients(run, 1, 3, 4)  # the row of two is cut by the end of a log period
    with pytest.raises(InputError, match=r"iteration 4: .* 2 steps in a row .*labeled_00000\d"):
        run.train()
    assert not list(tmp_path.glob("*.pth"))


def test_skipped_steps_that_are_not_in_a_row_do_not_stop(host, tmp_path):
    run = host.open(tmp_path, "SSOD.MAX_SKIPPED_STEPS", 2, "SSOD.LOG_PERIOD", 2)
    _break_gradients(run, 0, 2, 4)
    run.train()
    assert _last(tmp_path)["skipped_steps"] == 3


def test_metrics_are_means_since_the_last_line(host, tmp_path):
    for name, period in (("each", 1), ("together", 4)):
        host.train(tmp_path / name, "SSOD.LOG_PERIOD", period, *_until(4))
    each, (together,) = read_lines(tmp_path / "each"), read_lines(tmp_path / "together")
    assert len(each) == 4
    for name in ("total_loss", "loss_cls", "loss_cls_unsup", "pseudo/num_per_image", "grad_norm"):
        values = [line[name] for line in each if name in line]
        assert together[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
    total = sum(v for k, v in together.items() if k.startswith("loss_") and "unsup" not in k)
    # Unlabeled losses exist in the last two of the four iterations only.
    total += sum(v for k, v in together.items() if k.startswith("loss_") and "unsup" in k) / 2
    assert together["total_loss"] == pytest.approx(total, rel=1e-5)


def test_a_run_that_is_stopped_between_two_lines_writes_the_same_line(host, tmp_path):
    keys = ("SSOD.LOG_PERIOD", MAX_ITER, "SOLVER.CHECKPOINT_PERIOD", 2)
    run = host.open(tmp_path / "stopped", *keys)

    def stop():
        if run.model.iteration == 3:
            raise KeyboardInterrupt

    _before_each(run, stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    host.train(tmp_path / "stopped", *keys)
    host.train(tmp_path / "whole", *keys)
    lines = [read_lines(tmp_path / name) for name in ("stopped", "whole")]
    assert differences(*lines) == []


def test_parts_of_a_batch_add_up_to_the_batch(host, shapes, tmp_path):
    # One image twice: the hosts' means are over samples, of which images have different numbers.
    content = json.loads((shapes / "annotations" / "labeled.json").read_text())
    content["images"] = [i for i in content["images"] if i["id"] == content["images"][0]["id"]]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "one.json").write_text(json.dumps(content))
    data = ("SSOD.DATA.LABELED_JSON", tmp_path / "one.json", "SSOD.LABELED_VIEWS", "weak")
    gradients = {}
    for steps in (1, 2):
        keys = ("SSOD.ACCUMULATE_STEPS", steps, *data, *ALL_SAMPLES, *SUPERVISED, *_until(1))
        run = host.train(tmp_path / str(steps), *keys)
        gradients[steps] = {n: p.grad for n, p in run.model.student.named_parameters()}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[2][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_filters_count_iterations_not_parts(host, tmp_path):
    keys = ("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.REFRESH_PERIOD", 3)
    run = host.open(tmp_path, *keys, "SSOD.ACCUMULATE_STEPS", 2)
    thresholds = run.model.pseudo_label_filter
    assert (thresholds.refresh_period, thresholds.passes) == (3, 2)
    keys = ("SSOD.FILTER.NAME", "SoftMatchWeighting", "SSOD.FILTER.EMA_DECAY", 0.81)
    run = host.open(tmp_path, *keys, "SSOD.ACCUMULATE_STEPS", 2)
    assert run.model.pseudo_label_filter.moments.decay == pytest.approx(0.9)


def test_batches_that_cannot_be_divided_are_refused(host, tmp_path):
    with pytest.raises(InputError, match=r"IMS_PER_BATCH must be a multiple of .* 1 x 4, got 2"):
        host.open(tmp_path, "SSOD.ACCUMULATE_STEPS", 4)


def test_fp16_starts_with_skipped_steps_until_the_scale_fits(host, tmp_path):
    run = host.open(tmp_path, *EACH, *FLOAT16, *SUPERVISED, *_until(12))
    before = {n: p.detach().clone() for n, p in run.model.student.named_parameters()}
    run.train()
    metrics = _last(tmp_path)
    assert metrics["grad_scale"] == 65536 / 2 ** metrics["skipped_steps"]
    assert metrics["skipped_steps"] < 12
    after = dict(run.model.student.named_parameters())
    assert [n for n, value in before.items() if torch.equal(after[n], value)] == []


def test_loss_scale_is_saved_and_restored(host, tmp_path):
    run = host.open(tmp_path, *FLOAT16, *_until(1))
    run.step.grad_scaler.load_state_dict(run.step.grad_scaler.state_dict() | {"scale": 128.0})
    run.train()
    assert host.open(tmp_path, *FLOAT16, *_until(2)).step.grad_scaler.get_scale() == 128
    assert host.open(tmp_path, *_until(2)).step.grad_scaler.get_scale() == 1


@pytest.mark.parametrize(
    ("clip_type", "norm"),
    [
        ("value", lambda p: max(g.abs().max() for g in p)),
        ("norm", lambda p: max(g.norm() for g in p)),
        ("full_model", lambda p: torch.stack([g.norm() for g in p]).norm()),
    ],
)
def test_gradients_are_clipped(host, tmp_path, clip_type, norm):
    options = {"ENABLED": True, "CLIP_TYPE": clip_type, "CLIP_VALUE": 1e-3}
    keys = [item for k, v in options.items() for item in (f"SOLVER.CLIP_GRADIENTS.{k}", v)]
    run = host.train(tmp_path, *keys, *_until(1))
    gradients = [p.grad for p in run.model.student.parameters() if p.grad is not None]
    assert norm(gradients).item() == pytest.approx(1e-3, rel=1e-2)


def test_unknown_clipping_optimizer_and_precision_are_refused(host, tmp_path):
    clip = "SOLVER.CLIP_GRADIENTS"
    with pytest.raises(InputError, match="CLIP_TYPE must be .*\"full_model\", got 'all'"):
        host.open(tmp_path, f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", "all")
    full = (f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", "full_model", f"{clip}.NORM_TYPE", 1.0)
    with pytest.raises(InputError, match="NORM_TYPE must be 2.0 with CLIP_TYPE full_model, got 1"):
        host.open(tmp_path, *full)
    with pytest.raises(InputError, match='must be "SGD" or "AdamW", got \'Lion\''):
        host.open(tmp_path, "SSOD.OPTIMIZER", "Lion")
    with pytest.raises(InputError, match="SSOD.AMP_DTYPE must be .*, got 'int8'"):
        host.open(tmp_path, "SSOD.AMP_DTYPE", "int8")


def test_state_of_another_optimizer_is_refused(host, tmp_path):
    host.train(tmp_path, *_until(1))
    with pytest.raises(InputError, match=r"\.pth: its optimizer does not fit: it is SGD, SSOD.OPT"):
        host.open(tmp_path, "SSOD.OPTIMIZER", "AdamW")


@pytest.mark.parametrize("changed", [("ENABLED", False), ("HEAD", "main")])
def test_methods_of_a_run_are_not_exchanged(host, tmp_path, changed):
    lsm = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05)
    host.train(tmp_path, *lsm, *_until(1))
    with pytest.raises(InputError, match="its optimizer does not fit: .* and the methods as they"):
        host.open(tmp_path, *lsm, f"SSOD.LSM.{changed[0]}", changed[1])


@pytest.mark.parametrize("sweeps", [False, True])
def test_state_of_a_methods_parameters_starts_with_the_teacher(host, tmp_path, sweeps):
    """Where a burn-in was shortened before a run was resumed, also if the teacher sweeps then."""
    keys = (
        "SSOD.LSM.ENABLED",
        True,
        "SSOD.FILTER.UNDECIDED_THRESH",
        0.05,
        "SSOD.OPTIMIZER",
        "AdamW",
    )
    if sweeps:
        keys += ("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.SOURCE", "sweep")
    host.train(tmp_path, *keys, *_until(3), "SSOD.BURN_IN_ITERS", 100)
    run = host.train(tmp_path, *keys, *_until(4), "SSOD.BURN_IN_ITERS", BURN_IN_ITERS)
    state = run.step.optimizer.state
    assert {int(state[p]["step"]) for p in run.model.methods.parameters()} == {1}
    assert {int(state[p]["step"]) for p in run.model.student.parameters() if p in state} == {4}


def test_steps_that_earlier_versions_counted_in_a_burn_in_are_forgotten(host, tmp_path):
    keys = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05)
    keys += ("SSOD.OPTIMIZER", "AdamW", "SSOD.BURN_IN_ITERS", 100)
    host.train(tmp_path, *keys, *_until(1))
    step = host.open(tmp_path, *keys).step
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    methods = list(step.model.methods.parameters())
    state = step.state_dict()
    for index, parameter in enumerate(parameters):
        if any(parameter is other for other in methods):
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones_like(parameter))
            state["optimizer"]["state"][index] = moments | {"step": torch.tensor(5.0)}
    step.load_state_dict(state, "an old checkpoint")
    found = step.optimizer.state
    assert len(methods) == 2
    assert not any(value.any() for p in methods for value in found[p].values())
    assert all(found[p]["step"] == 1 for p in step.model.student.parameters() if p in found)


def test_first_momentum_is_kept_without_a_burn_in(host, tmp_path):
    lsm = ("SSOD.LSM.ENABLED", True, "SSOD.FILTER.UNDECIDED_THRESH", 0.05, "SSOD.BURN_IN_ITERS", 0)
    run = host.train(tmp_path, *lsm, "SOLVER.WEIGHT_DECAY", 0, *_until(1))
    for parameter in run.model.methods.parameters():
        buffer = run.step.optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(buffer, parameter.grad)
        assert buffer.any()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_burn_in_does_not_decay_what_methods_will_learn(host, tmp_path, optimizer):
    """A head of its own random weights, which no start replaces, also if a run is resumed."""
    keys = ("SSOD.CONTRASTIVE.ENABLED", True, "SSOD.OPTIMIZER", optimizer)
    keys += (
        "SOLVER.WEIGHT_DECAY",
        0.5,
        "SSOD.BURN_IN_ITERS",
        4,
        "SSOD.FILTER.UNDECIDED_THRESH",
        0.05,
    )
    run = host.open(tmp_path, *keys, *_until(2))
    before = {n: p.detach().clone() for n, p in run.model.methods.named_parameters()}
    weight = run.model.student.classifier.weight
    classifier = weight.detach().clone()
    run.train()
    assert not torch.equal(weight, classifier)
    run = host.train(tmp_path, *keys, *_until(4))
    assert run.model.teacher_started
    assert differences(dict(run.model.methods.named_parameters()), before) == []
    run = host.train(tmp_path, *keys, *_until(5))
    after = dict(run.model.methods.named_parameters())
    assert len(before) == len(differences(after, before)) == 4


def test_checkpoint_past_the_end_is_evaluated_not_trained(host, tmp_path):
    host.train(tmp_path, *_until(3))
    before = host.read(tmp_path)["model"]
    run = host.train(tmp_path, *_until(2))
    assert run.model.iteration == 3
    assert differences(host.read(tmp_path)["model"], before) == []
