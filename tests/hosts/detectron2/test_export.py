import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ssod.cli.main import main
from ssod.errors import InputError
from ssod.hosts.detectron2.export import export_config, export_detector
from ssod.hosts.detectron2.run import Checkpointer
from tiny_detectron2 import tiny_config
from tiny_run import differences

FIELDS = ("pred_boxes", "scores", "pred_classes")


def _save_run(cfg, name="model_final", started=True, shift=0.1):
    """Save a checkpoint as Detectron2 does; the two models differ. Returns the model."""
    torch.manual_seed(0)
    model = build_model(cfg)
    model.iteration, model.teacher_started = 7, started
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=shift)
    Checkpointer(model, cfg.OUTPUT_DIR).save(name, iteration=7)
    return model


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """Folder, config and model of a run; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(shapes, folder, "INPUT.FORMAT", "RGB")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder, cfg, _save_run(cfg)


@pytest.fixture
def run(shapes, tmp_path):
    """Folder and config of a run without checkpoints."""
    cfg = tiny_config(shapes, tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path, cfg


def _assert_one_line_error(capsys, status, *parts):
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: ")
    assert all(part in lines[-1] for part in parts), lines[-1]


def _model_of(path):
    return torch.load(path / "model.pth", weights_only=True)["model"]


def test_detectron2_alone_finds_what_the_teacher_finds(finished, shapes, tmp_path, capsys):
    """The printed lines, run by a program that has no other config or module than Detectron2's."""
    folder, cfg, model = finished
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"teacher of {folder / 'model_final.pth'} written to {tmp_path}")
    image = sorted((shapes / "images").iterdir())[0]
    found = tmp_path / "found.pth"
    before = f"import cv2, torch\ntorch.set_num_threads(1)\nimage = cv2.imread({str(image)!r})\n"
    shown = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    after = (
        "import sys\nassert not any(m.split('.')[0] == 'ssod' for m in sys.modules)\n"
        "get = lambda name: getattr(instances.get(name), 'tensor', instances.get(name))\n"
        f"torch.save([get(name) for name in {FIELDS}], {str(found)!r})\n"
    )
    code = before + "\n".join(shown) + "\n" + after
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    predictor = DefaultPredictor(cfg)
    predictor.model.load_state_dict(model.state_dict())
    expected = predictor(cv2.imread(str(image)))["instances"]
    assert len(expected) > 5
    values = [getattr(expected.get(name), "tensor", expected.get(name)) for name in FIELDS]
    assert differences(torch.load(found), values) == []
    predictor.model.eval_model = "student"
    student = predictor(cv2.imread(str(image)))["instances"]
    assert not np.array_equal(student.scores.numpy(), expected.scores.numpy())


def test_config_is_detectron2s_but_for_the_detector(finished, tmp_path):
    _, cfg, _ = finished
    (tmp_path / "config.yaml").write_text(export_config(cfg, tmp_path / "model.pth").dump())
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "config.yaml"), allow_unsafe=False)
    expected = get_cfg()
    for group in ("MODEL", "INPUT", "TEST"):
        expected[group] = cfg[group].clone()
    expected.defrost()
    expected.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    expected.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    expected.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    assert yaml.safe_load(plain.dump()) == yaml.safe_load(expected.dump())
    assert plain.DATASETS.TRAIN == plain.DATASETS.TEST == () and "SSOD" not in plain
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudentRCNN"


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_either_detector_is_exported_under_detectron2s_names(finished, tmp_path, which):
    folder, cfg, model = finished
    export_detector(cfg, folder / "model_final.pth", tmp_path / "out", which)
    expected = dict(getattr(model, which).state_dict())
    assert differences(dict(_model_of(tmp_path / "out")), expected) == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "model.pth"]


def test_checkpoint_is_the_last_or_the_one_named(run, tmp_path, capsys):
    folder, cfg = run
    models = {"model_0000001": _save_run(cfg, "model_0000001", shift=0.2)}
    assert main(["export", str(folder)]) == 0  # from `last_checkpoint`
    assert f"teacher of {folder / 'model_0000001.pth'}" in capsys.readouterr().out
    models["model_final"] = _save_run(cfg)
    _save_run(cfg, "model_best", shift=0.3)
    assert main(["export", str(folder)]) == 0  # the best is not the last, whenever it was saved
    expected = dict(models["model_final"].teacher.state_dict())
    assert differences(dict(_model_of(folder / "exported")), expected) == []

    for name in ("model_0000001.pth", str(folder / "model_0000001.pth")):
        args = ["export", str(folder), "--checkpoint", name, "--student"]
        assert main([*args, "--output", str(tmp_path / "student")]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("cfg.MODEL.WEIGHTS")
        expected = dict(models["model_0000001"].student.state_dict())
        assert differences(dict(_model_of(tmp_path / "student")), expected) == []


def test_teacher_that_has_not_started_is_not_exported(run, capsys):
    folder, cfg = run
    model = _save_run(cfg, started=False)
    _assert_one_line_error(
        capsys, main(["export", str(folder)]), "had not started at iteration 7", "--student"
    )
    assert not (folder / "exported").exists()
    assert main(["export", str(folder), "--student"]) == 0
    expected = dict(model.student.state_dict())
    assert differences(dict(_model_of(folder / "exported")), expected) == []


def test_what_is_missing_is_named(run, tmp_path, capsys):
    folder, _ = run
    status = main(["export", str(tmp_path / "nowhere")])
    _assert_one_line_error(capsys, status, str(tmp_path / "nowhere"), "OUTPUT_DIR of a run")
    _assert_one_line_error(capsys, main(["export", str(folder)]), "no checkpoint", "--checkpoint")
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    _assert_one_line_error(capsys, main(["export", str(folder)]), "model_0000002.pth")
    status = main(["export", str(folder), "--checkpoint", "model_best.pth"])
    _assert_one_line_error(capsys, status, f"no checkpoint {folder / 'model_best.pth'}")


def test_run_of_the_torchvision_host_is_refused(first_run, capsys):
    status = main(["export", str(first_run)])
    _assert_one_line_error(capsys, status, "config.yaml", "a run of the torchvision host")


def test_without_detectron2_the_error_says_how_to_install_it(finished, capsys, monkeypatch):
    folder, *_ = finished
    for name in [n for n in sys.modules if n.startswith("ssod.hosts.detectron2")]:
        monkeypatch.delitem(sys.modules, name)
    # None makes an import fail as if the package were not installed.
    for name in [n for n in sys.modules if n.split(".")[0] == "detectron2"]:
        monkeypatch.setitem(sys.modules, name, None)
    status = main(["export", str(folder)])
    _assert_one_line_error(capsys, status, "needs Detectron2", "uv sync --extra detectron2")


def test_checkpoint_of_another_config_or_kind_is_refused(finished, shapes, tmp_path):
    folder, cfg, _ = finished
    other = tiny_config(shapes, tmp_path, "MODEL.FPN.OUT_CHANNELS", 8)
    with pytest.raises(InputError, match="model_final.pth: .*another architecture.*fpn_lateral"):
        export_detector(other, folder / "model_final.pth", tmp_path / "out")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "plain.pth")
    with pytest.raises(InputError, match="plain.pth: expected a checkpoint of a run"):
        export_detector(cfg, tmp_path / "plain.pth", tmp_path / "out")
    (tmp_path / "damaged.pth").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="damaged.pth: not a checkpoint that can be read"):
        export_detector(cfg, tmp_path / "damaged.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_of_a_run_is_never_overwritten(finished, capsys):
    folder, cfg, _ = finished
    before = (folder / "config.yaml").read_text()
    status = main(["export", str(folder), "--output", str(folder)])
    _assert_one_line_error(capsys, status, "config.yaml of something else", "another folder")
    assert (folder / "config.yaml").read_text() == before


def test_folder_that_cannot_be_written(finished, tmp_path):
    folder, cfg, _ = finished
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: cannot be written .*; choose another folder"):
        export_detector(cfg, folder / "model_final.pth", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
