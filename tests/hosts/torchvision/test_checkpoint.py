import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from contract import torchvision_case
from ssod.config import merge_config
from ssod.errors import InputError
from ssod.hosts.checkpoint import load_matching, read_checkpoint
from ssod.hosts.torchvision.build import build_detector, build_model
from ssod.hosts.torchvision.defaults import get_config
from ssod.hosts.torchvision.run import CHECKPOINT_NAME, Run
from ssod.hosts.torchvision.weights import load_weights
from tiny_run import MAX_ITER, differences, read_state, resume, tiny_config, train


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.fixture
def saved(first_run, tmp_path):
    """Path of a run's checkpoint."""
    return Path(shutil.copy(first_run / CHECKPOINT_NAME, tmp_path))


def test_what_a_run_is_at_its_end_is_saved(shapes, tmp_path):
    run = Run(tiny_config(shapes, tmp_path, "SOLVER.MAX_ITER", 1, "SSOD.DATA.VAL_JSON", ""))
    run.train()
    state = read_checkpoint(tmp_path / CHECKPOINT_NAME)
    assert differences(state["model"], dict(run.model.state_dict())) == []
    assert differences(state["optimizer"], run.step.optimizer.state_dict()) == []
    assert state["config"] == run.cfg.dump()
    assert [c["name"] for c in state["categories"]] == run.data.labeled.class_names
    assert not list(tmp_path.glob("*.partial"))


def test_a_failure_while_saving_leaves_the_old_file(saved, shapes, monkeypatch):
    before, save = saved.read_bytes(), torch.save

    def cut_off(state, path):
        save({name: state[name] for name in ("config",)}, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(shapes, saved.parent, "SOLVER.MAX_ITER", MAX_ITER + 1), resumed=True)
    assert saved.read_bytes() == before


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="nowhere.pth: checkpoint not found"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="checkpoint not found"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_truncated_file(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"checkpoint.pth: not a checkpoint that can be read \("):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    "content", [b"SEED: 3\n", b"\x89PNG\r\n\x1a\n", pickle.dumps([1], protocol=2)]
)
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(InputError, match="other: not a checkpoint that can be read"):
        read_checkpoint(tmp_path / "other")


def test_file_of_torch_without_a_dictionary(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(InputError, match="expected a checkpoint dictionary, got Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(InputError, match="attack.pth: not a checkpoint that can be read"):
        read_checkpoint(tmp_path / "attack.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, r"\(1 mismatches\): 0.bias is missing"),
        ({"2.bias": torch.zeros(1)}, r"\(1 mismatches\): 2.bias is not part of this model"),
        (
            {"0.weight": torch.zeros(2, 5), "1.bias": torch.zeros(3)},
            r"\(2 mismatches\): 0.weight has shape \(2, 5\), this config builds \(2, 3\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_first_mismatch_is_named_and_nothing_is_loaded(model, change, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()} | change
    with pytest.raises(InputError, match=f"x.pth: checkpoint of another architecture {message}"):
        load_matching(model, {n: v for n, v in state.items() if v is not None}, "x.pth")
    assert differences(dict(model.state_dict()), before) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.FPN.OUT_CHANNELS", 8, r"fpn.inner_blocks.0.0.weight has shape \(16, 32, 1, 1\)"),
        ("MODEL.RESNETS.DEPTH", 34, "student.backbone.body.layer1.2.conv1.weight is missing"),
        ("MODEL.RESNETS.NORM", "GN", "student.backbone.body.bn1.running_mean is not part"),
    ],
)
def test_run_of_another_architecture_is_not_resumed(finished_run, shapes, key, value, message):
    with pytest.raises(
        InputError, match=f"checkpoint.pth: .* another architecture .*: .*{message}"
    ):
        resume(tiny_config(shapes, finished_run, key, value))


def test_state_dict_is_not_resumed(shapes, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(InputError, match="not a checkpoint of a run; it cannot be resumed"):
        resume(tiny_config(shapes, tmp_path))


def test_optimizer_over_other_parameters_is_not_resumed(finished_run, shapes, tmp_path):
    shutil.copy(finished_run / CHECKPOINT_NAME, tmp_path)
    state = torch.load(tmp_path / CHECKPOINT_NAME)
    del state["optimizer"]["param_groups"][0]["params"][0]
    torch.save(state, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(InputError, match="its optimizer does not fit: .*; set SSOD.OPTIMIZER and"):
        resume(tiny_config(shapes, tmp_path))


def test_weights_of_a_run_are_those_of_its_teacher(finished_run, shapes, tmp_path):
    path = finished_run / CHECKPOINT_NAME
    model = Run(tiny_config(shapes, tmp_path, "MODEL.WEIGHTS", path)).model
    saved = read_state(finished_run)["model"]
    for copy in (model.student, model.teacher):
        state = {f"teacher.{name}": value for name, value in copy.state_dict().items()}
        assert differences(state, {n: v for n, v in saved.items() if n in state}) == []
    assert model.iteration == 0 and not model.teacher_started
    students = {f"student.{name}": value for name, value in model.student.state_dict().items()}
    assert differences(students, {name: saved[name] for name in students}) != []


def test_run_of_another_optimizer_is_not_resumed(finished_run, shapes):
    message = "its optimizer does not fit: it is SGD, SSOD.OPTIMIZER asks for AdamW"
    with pytest.raises(InputError, match=message):
        resume(tiny_config(shapes, finished_run, "SSOD.OPTIMIZER", "AdamW"))


def test_weights_of_a_run_in_its_burn_in_are_those_of_its_student(shapes, tmp_path):
    model = build_model(tiny_config(shapes, tmp_path))
    with torch.no_grad():
        model.student.rpn.head.cls_logits.bias.add_(1)
    torch.save({"model": model.state_dict()}, tmp_path / "burn_in.pth")
    detector = build_model(tiny_config(shapes, tmp_path, "SEED", 1)).student
    load_weights(detector, tmp_path / "burn_in.pth")
    (tmp_path / "burn_in.pth").unlink()
    assert differences(dict(detector.state_dict()), dict(model.student.state_dict())) == []


def test_weights_of_torchvisions_own_model(tmp_path):
    torch.manual_seed(0)
    source = torchvision_case.host_model(torchvision_case.build())
    torch.save(source.state_dict(), tmp_path / "torchvision.pth")
    detector = torchvision_case.build()
    assert differences(dict(detector.state_dict()), dict(source.state_dict())) != []
    load_weights(detector, tmp_path / "torchvision.pth")
    assert differences(dict(detector.state_dict()), dict(source.state_dict())) == []


def test_weights_for_other_classes_fill_all_but_the_box_predictor(caplog, tmp_path):
    source, detector = torchvision_case.build(), torchvision_case.build()
    state = dict(source.state_dict())
    prefix = "roi_heads.box_predictor."
    for name in [n for n in state if n.startswith(prefix)]:
        state[name] = torch.cat([state[name]] * 2)
    initial = {n: v.clone() for n, v in detector.state_dict().items() if n.startswith(prefix)}
    torch.save(state, tmp_path / "classes.pth")
    with caplog.at_level("INFO"):
        load_weights(detector, tmp_path / "classes.pth")
    expected = dict(source.state_dict()) | initial
    assert differences(dict(detector.state_dict()), expected) == []
    assert "box predictor is for other classes" in caplog.text


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_weights_of_a_resnet_fill_the_body_of_the_backbone(norm, tmp_path):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    keys = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    cfg = merge_config(get_config(), "", [*keys, "MODEL.RESNETS.NORM", norm])
    detector = build_detector(cfg)
    load_weights(detector, tmp_path / "resnet.pth")
    for name, value in detector.backbone.body.state_dict().items():
        assert torch.equal(value, resnet.state_dict()[name]), name


def test_weights_of_another_resnet_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(InputError, match="another architecture .*layer1"):
        load_weights(torchvision_case.build(), tmp_path / "resnet.pth")
