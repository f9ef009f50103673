import os
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from ssod.errors import InputError
from ssod.hosts.detectron2.weights import load_weights
from tiny_detectron2 import tiny_config
from tiny_run import differences

BOTTOM_UP = "backbone.bottom_up."
PREDICTOR = "roi_heads.box_predictor."
# A ResNet-50 as narrow as GN allows.
NARROW_50 = (
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
)  # fmt: skip
CAFFE2_PARTS = (
    ("stem.conv1.norm", "res_conv1_bn"),
    ("stem.conv1", "conv1"),
    (".shortcut", "_branch1"),
    (".conv1", "_branch2a"),
    (".conv2", "_branch2b"),
    (".conv3", "_branch2c"),
    (".norm", "_bn"),
    ("_bn.weight", "_bn_gamma"),
    ("_bn.bias", "_bn_beta"),
    (".weight", "_w"),
    (".", "_"),
)


@pytest.fixture
def build(shapes, tmp_path):
    """Return a function that builds the tiny model with overrides of its config."""

    def build(*overrides, seed=0):
        torch.manual_seed(seed)
        return build_model(tiny_config(shapes, tmp_path / "run", *overrides))

    return build


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path."""

    def write(content, name):
        path = tmp_path / name
        if name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path)
        return str(path)

    return write


def _copy(state):
    return {name: value.clone() for name, value in state.items()}


def _arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def _random_state(module, seed=1):
    """State dict with the names and shapes of the module's, without counters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) + 0.5
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _caffe2_name(name):
    for ours, caffe2 in CAFFE2_PARTS:
        name = name.replace(ours, caffe2)
    return name


def _assert_loaded(model, expected):
    """The student holds `expected`, and nothing has started."""
    detector = model.student
    assert differences(dict(detector.state_dict()), dict(expected)) == []
    assert model.iteration == 0 and not model.teacher_started


def _assert_backbone_loaded(model, initial, expected):
    """The bottom-up part holds `expected`; the rest is as it was."""
    loaded = {BOTTOM_UP + name: value for name, value in expected.items()}
    assert loaded.keys() <= initial.keys()
    assert any(not torch.equal(value, initial[name]) for name, value in loaded.items())
    _assert_loaded(model, initial | loaded)


@pytest.mark.parametrize("started", [False, True])
def test_a_run_gives_its_teacher_or_before_that_its_student(build, write, started):
    source = build()
    source.teacher.load_state_dict(_random_state(source.teacher))
    source.iteration, source.teacher_started = 7, started
    path = write({"model": source.state_dict(), "iteration": 7, "trainer": {}}, "run.pth")
    model = build(seed=1)
    load_weights(model.student, path)
    _assert_loaded(model, (source.teacher if started else source.student).state_dict())


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("zoo.pkl", lambda state: {"model": _arrays(state), "__author__": "Detectron2 Model Zoo"}),
        ("trained.pth", lambda state: {"model": state, "iteration": 3}),
        ("bare.pth", lambda state: state),
    ],
)
def test_a_detector_fills_every_weight(build, write, name, wrap):
    model = build()
    state = _random_state(model.student)
    old = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    load_weights(model.student, write(wrap(state | old), name))
    _assert_loaded(model, state)


@pytest.mark.parametrize(("source", "target"), [("BN", "FrozenBN"), ("FrozenBN", "BN")])
def test_batch_counters_are_not_needed(build, write, source, target):
    state = build("MODEL.RESNETS.NORM", source, seed=1).student.state_dict()
    model = build("MODEL.RESNETS.NORM", target)
    load_weights(model.student, write({"model": state}, "norm.pth"))
    for name, value in model.student.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[name]), name


def test_files_of_before_pytorch_1_6_are_read(build, tmp_path):
    model = build()
    state = _random_state(model.student)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model.student, str(tmp_path / "old.pth"))
    _assert_loaded(model, state)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone.extra.weight": torch.zeros(2)},
        {"roi_heads.box_head.fc1.bias": None},
        {"backbone.fpn_output2.bias": torch.zeros(5)},
        {PREDICTOR + "bbox_pred.weight": torch.zeros(4, 32)},
    ],
    ids=["unknown", "missing", "shape", "class-agnostic"],
)
def test_a_detector_that_does_not_match_is_refused_and_changes_nothing(build, write, changes):
    model = build()
    initial = _copy(model.state_dict())
    state = _random_state(model.student) | changes
    path = write({n: v for n, v in state.items() if v is not None}, "other.pth")
    (name,) = map(re.escape, changes)
    message = rf"other.pth: .*another architecture \(1 mismatches\): {name} .* Use the config"
    with pytest.raises(InputError, match=message):
        load_weights(model.student, path)
    assert differences(dict(model.state_dict()), initial) == []


def test_a_detector_for_other_classes_fills_all_but_the_box_predictor(build, write, caplog):
    source, model = build("MODEL.ROI_HEADS.NUM_CLASSES", 80, seed=1), build()
    kept = {n: v for n, v in _copy(model.student.state_dict()).items() if n.startswith(PREDICTOR)}
    assert len(kept) == 4
    with caplog.at_level("INFO"):
        load_weights(model.student, write({"model": source.student.state_dict()}, "coco.pth"))
    _assert_loaded(model, dict(source.student.state_dict()) | kept)
    assert "coco.pth: box predictor is for other classes and starts anew" in caplog.text


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_backbone_with_names_of_caffe2(build, write, norm):
    """The names of MSRA/R-50.pkl, which has all four tensors of a norm."""
    model = build(*NARROW_50, "MODEL.RESNETS.NORM", norm)
    initial = _copy(model.student.state_dict())
    expected = _random_state(model.student.backbone.bottom_up)
    content = {_caffe2_name(name): value.numpy() for name, value in expected.items()}
    assert {
        "conv1_w",
        "res_conv1_bn_running_var",
        "res2_0_branch1_bn_gamma",
        "res5_2_branch2c_bn_beta",
    } <= content.keys()
    content |= {
        "conv1_b": np.zeros(32, "f4"),
        "fc1000_w": np.zeros((9, 2)),
        "fc1000_b": np.zeros(9),
    }
    load_weights(model.student, write(content, "R-50.pkl"))
    _assert_backbone_loaded(model, initial, expected)


def _folded(backbone):
    """Contents of a Caffe2 file whose norms are scale and shift, and what they are here."""
    expected = _random_state(backbone)
    expected = {name: v for name, v in expected.items() if ".running_" not in name}
    content = {_caffe2_name(name): value.numpy() for name, value in expected.items()}
    content = {
        name.replace("_bn_gamma", "_bn_s").replace("_bn_beta", "_bn_b"): value
        for name, value in content.items()
    }
    content |= {"res2_0_branch1_b": np.zeros(64, "f4"), "conv1_w_momentum": np.zeros(3, "f4")}
    content |= {"pred_w": np.zeros((9, 2), "f4"), "pred_b": np.zeros(9, "f4")}
    return content, expected


@pytest.mark.parametrize("wrap", [dict, lambda blobs: {"blobs": blobs, "cfg": "TRAIN: {}"}])
def test_a_backbone_of_caffe2_with_folded_norms(build, write, wrap):
    model = build(*NARROW_50, "MODEL.RESNETS.NORM", "FrozenBN")
    initial = _copy(model.student.state_dict())
    content, expected = _folded(model.student.backbone.bottom_up)
    load_weights(model.student, write(wrap(content), "X-50.pkl"))
    _assert_backbone_loaded(model, initial, expected)


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_folded_norms_need_frozen_ones(build, write, norm):
    model = build(*NARROW_50, "MODEL.RESNETS.NORM", norm)
    content, _ = _folded(model.student.backbone.bottom_up)
    with pytest.raises(InputError, match="X-50.pkl: its batch norms are folded .*FrozenBN"):
        load_weights(model.student, write(content, "X-50.pkl"))


def test_group_norms_of_caffe2_are_no_folded_batch_norms(build, write):
    model = build(*NARROW_50, "MODEL.RESNETS.NORM", "FrozenBN")
    content, _ = _folded(model.student.backbone.bottom_up)
    content = {name.replace("_bn_", "_gn_"): value for name, value in content.items()}
    with pytest.raises(InputError, match=r"R-50-GN.pkl: .*running_mean is missing.* MODEL.RESNETS"):
        load_weights(model.student, write(content, "R-50-GN.pkl"))


def _converted(resnet):
    """What Detectron2's tools/convert-torchvision-to-d2.py writes."""
    state = {}
    for name, value in resnet.state_dict().items():
        name = name if "layer" in name else f"stem.{name}"
        name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        state[name] = value.numpy()
    return {"model": state, "__author__": "torchvision", "matching_heuristics": True}


@pytest.fixture
def resnet():
    torch.manual_seed(3)
    return torchvision.models.resnet18(weights=None)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_backbone_converted_from_torchvision(build, write, resnet, norm):
    content = _converted(resnet)
    assert "stem.fc.weight" in content["model"]
    model = build("MODEL.RESNETS.NORM", norm)
    initial = _copy(model.student.state_dict())
    own = model.student.backbone.bottom_up.state_dict().keys()
    expected = {n: torch.tensor(v) for n, v in content["model"].items() if n in own}
    assert ("stem.conv1.norm.num_batches_tracked" in expected) == (norm == "BN")
    load_weights(model.student, write(content, "r18.pkl"))
    _assert_backbone_loaded(model, initial, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("res3.0.conv1.weight", r"\(1 mismatches\): res3.0.conv1.weight is missing.*RESNETS"),
        ("res3.0.conv9.weight", r"\(1 mismatches\): res3.0.conv9.weight is not part of.*RESNETS"),
        ("stem.fcn.weight", r"\(1 mismatches\): stem.fcn.weight is not part of"),
    ],
)
def test_a_backbone_that_does_not_match_is_refused(build, write, resnet, name, message):
    content = _converted(resnet)
    if name in content["model"]:
        del content["model"][name]
    else:
        content["model"][name] = np.zeros(2)
    model = build("MODEL.RESNETS.NORM", "FrozenBN")
    initial = _copy(model.state_dict())
    with pytest.raises(InputError, match=f"r18.pkl: .*{message}"):
        load_weights(model.student, write(content, "r18.pkl"))
    assert differences(dict(model.state_dict()), initial) == []


def test_a_backbone_of_another_depth_is_refused(build, write, resnet):
    model = build("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.DEPTH", 34)
    with pytest.raises(InputError, match="res2.2.conv1.weight is missing. .* MODEL.RESNETS"):
        load_weights(model.student, write(_converted(resnet), "r18.pkl"))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_pickle_protocol_are_read(build, resnet, tmp_path, protocol):
    model = build("MODEL.RESNETS.NORM", "BN")
    content = _converted(resnet)
    content["model"]["stem.conv1.norm.num_batches_tracked"] = np.int64(3)
    (tmp_path / "r18.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    load_weights(model.student, str(tmp_path / "r18.pkl"))
    stem = model.student.backbone.bottom_up.stem.conv1
    assert torch.equal(stem.weight, resnet.conv1.weight)
    assert stem.norm.num_batches_tracked == 3


def test_modules_of_numpy_1_are_known(build, resnet, tmp_path):
    text = pickle.dumps(_converted(resnet), protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "r18.pkl").write_bytes(text)
    model = build("MODEL.RESNETS.NORM", "FrozenBN")
    load_weights(model.student, str(tmp_path / "r18.pkl"))
    assert torch.equal(model.student.backbone.bottom_up.stem.conv1.weight, resnet.conv1.weight)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(build, write, tmp_path, nested):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    weights = np.array([Attack()], dtype=object) if nested else Attack()
    path = write({"model": {"stem.conv1.weight": weights}, "__author__": "me"}, "attack.pkl")
    with pytest.raises(InputError, match="attack.pkl: .* wants to run posix.mkdir; it was not run"):
        load_weights(build().student, path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth"])
def test_truncated_file(build, write, resnet, name, kept):
    content = _converted(resnet) if name.endswith("pkl") else resnet.state_dict()
    path = write(content, name)
    with open(path, "r+b") as file:
        file.truncate(int(kept * os.path.getsize(path)))
    with pytest.raises(InputError, match=f"{name}: n.*that can be read .*truncated") as error:
        load_weights(build().student, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a dictionary of weights, got list"),
        ({}, "expected a checkpoint of a run, .* got 0 weights such as 'none'"),
        ({"model": 3}, "expected a dictionary of weights, got int"),
        ({"a": np.zeros(2), "b": "text"}, "expected weights by name, but 'b' is str"),
        ({"model_state": {"a": np.zeros(2)}}, "expected .*, but 'model_state' is dict"),
        ({1: np.zeros(2)}, "expected weights by name; it is a file of another program"),
        ({"trunk.w": np.zeros(2)}, "expected a checkpoint .* got 1 weights such as 'trunk.w'"),
        ({"trunk_w": np.zeros(2)}, "expected a checkpoint .* got 1 weights such as 'trunk.weight'"),
    ],
    ids=["list", "empty", "number", "text", "nested", "numbered", "other", "caffe2"],
)
def test_a_file_of_another_kind_gets_one_line(build, write, content, message):
    with pytest.raises(InputError, match=f"other.pkl: {message}"):
        load_weights(build().student, write(content, "other.pkl"))


def test_a_resnet_of_torchvision_is_sent_to_the_converter(build, write, resnet):
    with pytest.raises(InputError, match="got .* weights .*convert-torchvision-to-d2.py"):
        load_weights(build().student, write(resnet.state_dict(), "resnet18.pth"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.pkl", r"nowhere.pkl: cannot be read \(No such file or directory\)"),
        ("http://127.0.0.1:9/R-50.pkl", "http://127.0.0.1:9/R-50.pkl: cannot be fetched .*refused"),
    ],
)
def test_a_file_that_is_not_there(build, path, message, monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=message):
        load_weights(build().student, path)


def test_a_folder_is_no_file_of_weights(build, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); set MODEL.WEIGHTS"):
        load_weights(build().student, str(tmp_path))
