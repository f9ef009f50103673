"""Filters and methods of the user's own; the examples are those of CONTRIBUTING.md."""

import importlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny_run
from ssod.cli.main import main
from ssod.config import merge_config
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY
from ssod.core.method import METHOD_REGISTRY
from ssod.errors import InputError
from ssod.hosts.torchvision.defaults import get_config

HOSTS = ["torchvision"] + ["detectron2"] * (find_spec("detectron2") is not None)
REGISTRIES = (PSEUDO_LABEL_FILTER_REGISTRY, METHOD_REGISTRY)
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

METHOD = """
import os
import torch
from ssod.core.method import METHOD_REGISTRY, Method

open(os.environ["MARKER"], "a").write("x")

@METHOD_REGISTRY.register()
class Mine(Method):
    group = "MINE"

    def __init__(self, student, *, weight=0.5, name="a"):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def losses(self, step):
        return {"loss_mine": self.bias + step.main.regions.logits.mean()}
"""


@pytest.fixture(autouse=True)
def registries():
    """What files have registered is forgotten."""
    before = [dict(registry._obj_map) for registry in REGISTRIES]
    modules = set(sys.modules)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._obj_map.clear()
        registry._obj_map.update(entries)
    for name in set(sys.modules) - modules:
        if name.startswith("ssod_plugin:"):
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin of some text."""
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))

    def write(text=METHOD, name="plugin.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def _marker(path):
    """How often the file has been run."""
    marker = path.parent / "marker"
    return len(marker.read_text()) if marker.exists() else 0


def _example(name):
    """The block of code that follows the first mention of a file."""
    return re.search(rf"`{name}`.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]


def _merge(*overrides, config="", **options):
    return merge_config(get_config(), str(config), [str(item) for item in overrides], **options)


def _tiny_config(host, shapes, output, *overrides):
    tiny = tiny_run if host == "torchvision" else importlib.import_module("tiny_detectron2")
    return tiny.tiny_config(shapes, output, "SSOD.DATA.VAL_JSON", "", *overrides)


def _train(host, shapes, output, *overrides):
    """Train a tiny run; returns the lines of its log and its model."""
    host_module = importlib.import_module(f"ssod.hosts.{host}.host")
    cfg = _tiny_config(host, shapes, output, *overrides)
    model = host_module.train(cfg, "tiny").model
    return host_module.read_log(cfg), model


@pytest.mark.parametrize("host", HOSTS)
def test_the_filter_of_the_example_decides_what_is_learned(host, plugin, shapes, tmp_path):
    path = plugin(_example("my_filter.py"))
    overrides = ("SSOD.PLUGIN", path, "SSOD.FILTER.NAME", "BestFew", "SSOD.FILTER.COUNT", 3)
    lines, model = _train(host, shapes, tmp_path / "run", *overrides)
    assert type(model.pseudo_label_filter).__name__ == "BestFew"
    assert lines[-1]["pseudo/num_per_image"] == lines[-1]["pseudo/best_few"] == 3
    assert 0 < lines[-1]["pseudo/mean_weight"] < 1
    assert lines[-1]["loss_cls_unsup"] > 0


@pytest.mark.parametrize("host", HOSTS)
def test_the_method_of_the_example_adds_its_loss(host, plugin, shapes, tmp_path):
    path = plugin(_example("my_method.py"))
    on = ("SSOD.PLUGIN", path, "SSOD.ENTROPY.ENABLED", True)
    logs, states = [], []
    for name, weight in (("small", 0.1), ("large", 0.2)):
        keys = ("SSOD.ENTROPY.WEIGHT", weight, "SSOD.LOG_PERIOD", 1)
        lines, model = _train(host, shapes, tmp_path / name, *on, *keys)
        logs.append([line["loss_entropy_unsup"] for line in lines if "loss_entropy_unsup" in line])
        states.append(model.student.state_dict())
    assert len(logs[0]) == tiny_run.MAX_ITER - tiny_run.BURN_IN_ITERS
    assert logs[0][0] > 0
    # Until the first step after the burn-in the runs are the same.
    assert logs[1][0] == pytest.approx(2 * logs[0][0], rel=1e-5)
    assert logs[1][1] != pytest.approx(2 * logs[0][1], rel=1e-6)
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("name", ["my_filter.py", "my_method.py"])
def test_the_commands_around_the_examples_are_right(name, plugin, monkeypatch, tmp_path):
    plugin(_example(name), name)
    monkeypatch.chdir(tmp_path)
    shown = TEXT[TEXT.index(f"`{name}`") :]
    if name == "my_filter.py":
        words = (
            re.search(r"python train_net.py .*?\n\n", shown, re.DOTALL)[0]
            .replace("\\\n", "")
            .split()
        )
        cfg = _merge(*words[4:])
        assert (cfg.SSOD.FILTER.NAME, cfg.SSOD.FILTER.COUNT) == ("BestFew", 5)
    else:
        (tmp_path / "config.yaml").write_text(re.search(r"    (SSOD: .*)\n", shown)[1])
        cfg = _merge(config="config.yaml")
        assert dict(cfg.SSOD.ENTROPY) == {"ENABLED": True, "WEIGHT": 0.2}


FILTER = """
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY, FixedThreshold

@PSEUDO_LABEL_FILTER_REGISTRY.register()
class Own(FixedThreshold):
    {body}
"""


def test_a_class_without_a_constructor_of_its_own_has_no_keys_of_its_own(plugin):
    text = METHOD[: METHOD.index("    def __init__")] + METHOD[METHOD.index("    def losses") :]
    assert dict(_merge("SSOD.PLUGIN", plugin(text)).SSOD.MINE) == {"ENABLED": False}
    path = plugin(FILTER.format(body="pass"), "filter.py")
    assert _merge("SSOD.PLUGIN", path).SSOD.FILTER == get_config().SSOD.FILTER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHOD.replace('group = "MINE"', ""), "group of Mine must be a new name .*, got None"),
        (METHOD.replace("MINE", "HOST"), "group of Mine must be a new name .*, got 'HOST'"),
        (METHOD.replace("MINE", "a.b"), "group of Mine must be a new name .*, got 'a.b'"),
        (METHOD.replace("(Method)", ""), "Mine must be a Method"),
        (
            METHOD.replace('name="a"', "name={}"),
            "the argument name of Mine needs a default, a number, text",
        ),
        (METHOD + "\nraise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        (
            FILTER.format(body="def __init__(self, *, ema_decay=0.5): super().__init__()"),
            "ema_decay of Own has the default 0.5, but the key EMA_DECAY exists with 0.999",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(plugin, text, message):
    with pytest.raises(InputError, match=message) as error:
        _merge("SSOD.PLUGIN", plugin(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no')", "Mine cannot be made of its keys: no"),
        ("self.student = student", "MINE: a method must not keep the student"),
    ],
)
def test_a_method_that_cannot_be_made_is_one_line(plugin, shapes, tmp_path, body, message):
    path = plugin(METHOD.replace("self.bias =", f"{body}; self.bias ="))
    with pytest.raises(InputError, match=message):
        _train(
            "torchvision", shapes, tmp_path / "run", "SSOD.PLUGIN", path, "SSOD.MINE.ENABLED", True
        )


def test_a_sweep_looks_at_rescored_detections(plugin, shapes, tmp_path):
    rescore = """
    def rescore(self, class_probs, embeddings):
        return class_probs * 0.5
"""
    keys = ("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.SOURCE", "sweep")
    keys += ("SSOD.PLUGIN", plugin(METHOD + rescore), "SOLVER.MAX_ITER", tiny_run.BURN_IN_ITERS + 1)
    thresholds = []
    for enabled in (False, True):
        output = tmp_path / str(enabled)
        _, model = _train("torchvision", shapes, output, *keys, "SSOD.MINE.ENABLED", enabled)
        thresholds.append(model.pseudo_label_filter.reliable_thresh)
    low = 0.05  # least threshold
    assert (thresholds[0] > 2 * low).any()
    torch.testing.assert_close(thresholds[1], (thresholds[0] / 2).clamp(min=low))


def test_arguments_become_keys_with_their_defaults(plugin):
    cfg = _merge("SSOD.PLUGIN", plugin())
    assert dict(cfg.SSOD.MINE) == {"ENABLED": False, "WEIGHT": 0.5, "NAME": "a"}
    assert _merge("SSOD.PLUGIN", plugin(), "SSOD.MINE.WEIGHT", "2").SSOD.MINE.WEIGHT == 2.0
    with pytest.raises(InputError, match="unknown key SSOD.MINE.WEIGH; did you mean SSOD.MINE.W"):
        _merge("SSOD.PLUGIN", plugin(), "SSOD.MINE.WEIGH", 2)
    with pytest.raises(InputError, match="SSOD.MINE.WEIGHT needs a value of type float"):
        _merge("SSOD.PLUGIN", plugin(), "SSOD.MINE.WEIGHT", "much")


def test_the_command_line_names_the_file_rather_than_the_config(plugin, tmp_path):
    (tmp_path / "config.yaml").write_text("SSOD: {PLUGIN: nowhere.py, MINE: {WEIGHT: 0.25}}")
    cfg = _merge("SSOD.PLUGIN", plugin(), config=tmp_path / "config.yaml")
    assert cfg.SSOD.MINE.WEIGHT == 0.25


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"^SSOD.PLUGIN nowhere.py: not found; name a Python file"):
        _merge("SSOD.PLUGIN", "nowhere.py")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('too\\nbad')", "RuntimeError: too bad"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_fails_is_reported_in_one_line_and_can_be_mended(plugin, text, reason):
    path = plugin(text)
    with pytest.raises(InputError) as error:
        _merge("SSOD.PLUGIN", path)
    assert str(error.value).startswith(f"SSOD.PLUGIN {path}: cannot be imported: {reason}")
    assert "\n" not in str(error.value)
    assert "MINE" in _merge("SSOD.PLUGIN", plugin()).SSOD


def test_an_argument_without_a_default_is_reported(plugin):
    path = plugin(METHOD.replace("weight=0.5", "weight"))
    message = rf"^SSOD.PLUGIN {path}: the argument weight of Mine needs a default, .*$"
    with pytest.raises(InputError, match=message):
        _merge("SSOD.PLUGIN", path)


def test_a_file_is_run_once_in_a_process(plugin):
    path = plugin()
    first, second = _merge("SSOD.PLUGIN", path), _merge("SSOD.PLUGIN", path)
    assert first == second
    assert _marker(path) == 1


def test_configs_with_and_without_the_file_do_not_disturb_each_other(plugin, shapes, tmp_path):
    path = plugin()
    on = ("SSOD.PLUGIN", path, "SSOD.MINE.ENABLED", True)
    build = importlib.import_module("ssod.hosts.torchvision.host").build
    with_it = _tiny_config("torchvision", shapes, tmp_path / "with", *on)
    without = _tiny_config("torchvision", shapes, tmp_path / "without")
    assert "MINE" not in without.SSOD
    assert list(build(with_it).methods) == ["MINE"]
    assert list(build(without).methods) == []
    with pytest.raises(InputError, match="unknown key SSOD.MINE"):
        _merge("SSOD.MINE.ENABLED", True)


@pytest.mark.parametrize("host", HOSTS)
def test_a_config_that_nobody_named_runs_no_code_and_still_gives_the_detector(
    host, plugin, shapes, tmp_path
):
    """All that is left out belongs to training: the filter, and the methods of the file."""
    own = METHOD + "from ssod.core.filters import *\n"
    own += "@PSEUDO_LABEL_FILTER_REGISTRY.register()\nclass Own(FixedThreshold):\n    pass\n"
    path = plugin(own)
    on = ("SSOD.PLUGIN", path, "SSOD.MINE.ENABLED", True, "SSOD.FILTER.NAME", "Own")
    # Bounds that the default filter would refuse.
    on += (
        "SSOD.LSM.ENABLED",
        True,
        "SSOD.FILTER.UNDECIDED_THRESH",
        0.9,
        "SSOD.FILTER.SCORE_THRESH",
        0.95,
    )
    cfg = _tiny_config(host, shapes, tmp_path / "run", *on)
    assert _marker(path) == 1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    sys.modules.pop(f"ssod_plugin:{path.resolve()}")
    module = importlib.import_module(f"ssod.hosts.{host}.host")
    config = str(tmp_path / "config.yaml")
    found = merge_config(module.get_config(), config, run_plugin=False)
    assert _marker(path) == 1
    assert found.MODEL == cfg.MODEL and found.SSOD.DATA == cfg.SSOD.DATA
    default = module.get_config().SSOD
    assert (found.SSOD.PLUGIN, found.SSOD.FILTER, found.SSOD.LSM) == (
        "",
        default.FILTER,
        default.LSM,
    )
    expected = module.build(cfg).student.state_dict()
    actual = module.build(found).student.state_dict()
    assert {n: v.shape for n, v in actual.items()} == {n: v.shape for n, v in expected.items()}


def test_predict_runs_the_file_of_a_config_only_if_it_is_named(plugin, shapes, tmp_path):
    path = plugin()
    on = ("SSOD.PLUGIN", path, "SSOD.MINE.ENABLED", True)
    _train("torchvision", shapes, tmp_path / "run", *on)
    # As in another process.
    sys.modules.pop(f"ssod_plugin:{path.resolve()}")
    METHOD_REGISTRY._obj_map.pop("Mine")
    assert _marker(path) == 1
    images = sorted((shapes / "images").glob("val_*"))[0]
    arguments = ["predict", str(images), "--weights", str(tmp_path / "run"), "--no-images"]
    results = []
    for options in ([], ["--config-file", str(tmp_path / "run" / "config.yaml")]):
        output = tmp_path / f"out{len(options)}"
        assert main([*arguments, "--output", str(output), *options]) == 0
        results.append(json.loads((output / "predictions.json").read_text()))
        assert _marker(path) == (2 if options else 1)
    assert results[0] == results[1]
