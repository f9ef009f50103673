import ast
import inspect
from pathlib import Path

import pytest

import ssod
from ssod.config import merge_config, read_host
from ssod.core.filters import PSEUDO_LABEL_FILTER_REGISTRY
from ssod.core.method import METHOD_REGISTRY
from ssod.errors import InputError
from ssod.hosts.torchvision.defaults import get_config
from ssod.removed import REMOVED, RENAMED

PACKAGE = Path(ssod.__file__).parent
SHIPPED = sorted((PACKAGE.parents[1] / "configs").rglob("*.yaml"))
# Read from the file before there is a config; the last marks the file format.
READ_ELSEWHERE = {"SSOD.HOST", "SSOD.PLUGIN", "VERSION"}


def _leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def merge(tmp_path):
    """Merge a YAML text and overrides into the defaults."""

    def merge(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return merge_config(get_config(), str(path), overrides)

    return merge


def test_file_and_overrides_change_the_keys_they_name_and_no_other(merge):
    cfg = merge(
        "SEED: 5\nSSOD:\n  FILTER:\n    SCORE_THRESH: 0.25\n", "SEED", "7", "TEST.EVAL_PERIOD", "3"
    )
    expected = dict(_leaves(get_config()))
    expected |= {"SEED": 7, "SSOD.FILTER.SCORE_THRESH": 0.25, "TEST.EVAL_PERIOD": 3}
    assert dict(_leaves(cfg)) == expected


def test_without_file_and_overrides_the_defaults_stay():
    assert merge_config(get_config(), "") == get_config()


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (("SOLVER.BASE_LR", "1e-3"), "SOLVER.BASE_LR", 0.001),
        (("SOLVER.BASE_LR", "2"), "SOLVER.BASE_LR", 2.0),
        (("SOLVER.STEPS", "[10, 20]"), "SOLVER.STEPS", (10, 20)),
        (("SOLVER.AMP.ENABLED", "True"), "SOLVER.AMP.ENABLED", True),
        (("OUTPUT_DIR", "runs/a b"), "OUTPUT_DIR", "runs/a b"),
    ],
)
def test_overrides_mean_what_they_mean_in_a_file(merge, overrides, key, expected):
    name, text = overrides
    for part in reversed(name.split(".")):
        text = f"{{{part}: {text}}}"
    for cfg in (merge(text), merge_config(get_config(), "", overrides)):
        value = dict(_leaves(cfg))[key]
        assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("SSOD: {BURN_IN_ITER: 3}", "SSOD.BURN_IN_ITER", "SSOD.BURN_IN_ITERS"),
        (
            "SSOD: {FILTER: {SCORE_TRESH: 0.5}}",
            "SSOD.FILTER.SCORE_TRESH",
            "SSOD.FILTER.SCORE_THRESH",
        ),
        ("SSOD: 3", "SSOD", "SSOD.HOST"),
        ("SEED: {A: 1}", "SEED.A", "SEED"),
    ],
)
def test_unknown_key_is_refused_with_the_close_one(merge, text, unknown, meant):
    with pytest.raises(
        InputError, match=rf"config.yaml: unknown key {unknown}; did you mean {meant}\?"
    ):
        merge(text)


def test_unknown_key_without_a_close_one_points_to_the_readme(merge):
    with pytest.raises(InputError, match="command line: unknown key QWXZ; see ssod.keys"):
        merge("SEED: 1", "QWXZ", "1")


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("SEED", "1.5", "int"),
        ("SEED", "True", "int"),
        ("SEED", "", "int"),
        ("SOLVER.MAX_ITER", "null", "int"),
        ("SOLVER.BASE_LR", "fast", "float"),
        ("SOLVER.BASE_LR", "True", "float"),
        ("SOLVER.AMP.ENABLED", "1", "bool"),
        ("SOLVER.STEPS", "3", "tuple"),
    ],
)
def test_value_of_another_type_is_refused(key, value, kind):
    message = f"command line: {key} needs a value of type {kind} such as "
    with pytest.raises(InputError, match=message):
        merge_config(get_config(), "", [key, value])


@pytest.mark.parametrize("value", ['"2024"', "'1.5'", '"None"'])
def test_a_quoted_string_stays_a_string(merge, value):
    assert value[1:-1] == merge(f"OUTPUT_DIR: {value}").OUTPUT_DIR


def test_an_empty_override_of_a_string_is_the_empty_string(merge):
    assert merge("MODEL: {WEIGHTS: a.pth}", "MODEL.WEIGHTS", "").MODEL.WEIGHTS == ""


def test_base_is_read_first_and_relative_to_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1\nSSOD: {EMA_DECAY: 0.5, BURN_IN_ITERS: 9}")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "child.yaml"
    path.write_text("_BASE_: ../base.yaml\nSSOD: {EMA_DECAY: 0.25}")
    cfg = merge_config(get_config(), str(path))
    assert (cfg.SEED, cfg.SSOD.EMA_DECAY, cfg.SSOD.BURN_IN_ITERS) == (1, 0.25, 9)


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml: config file not found"):
        merge_config(get_config(), str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "SEED: [1",
        "SEED: !!python/object/apply:os.getpid []",
        "_BASE_: nowhere.yaml",
        "_BASE_: config.yaml",
    ],
)
def test_malformed_file_is_reported(merge, text):
    with pytest.raises(InputError, match="config.yaml: cannot be read as a YAML mapping"):
        merge(text)


@pytest.mark.parametrize("text", ["", "# only a comment", "3", "[1]"])
def test_file_without_a_mapping_is_reported(merge, text):
    with pytest.raises(
        InputError, match="config.yaml: (expected a|cannot be read as a YAML) mapping of keys"
    ):
        merge(text)


@pytest.mark.parametrize("value", ["{", "@here", "%d"])
def test_override_that_is_no_yaml_is_reported_with_its_key(value):
    with pytest.raises(InputError, match="command line: SEED needs"):
        merge_config(get_config(), "", ["SEED", value])


@pytest.mark.parametrize("value", ["{", "@here", "2024", "", "None"])
def test_text_on_the_command_line_is_taken_as_it_is(value):
    assert merge_config(get_config(), "", ["OUTPUT_DIR", value]).OUTPUT_DIR == value


@pytest.mark.parametrize(
    "pair",
    [
        ("SOLVER.STEPS", "[a]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[1, 2, 3, 4, 5]"),
        ("INPUT.MIN_SIZE_TRAIN", "[]"),
        ("INPUT.MIN_SIZE_TEST", "0"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0"),
    ],
    ids=lambda pair: pair[0],
)
def test_value_that_could_only_fail_later_is_refused(pair):
    with pytest.raises(InputError, match=f"command line: {pair[0]} "):
        merge_config(get_config(), "", pair)


def test_odd_number_of_overrides_is_refused():
    with pytest.raises(InputError, match="KEY VALUE pairs, got 'SEED 1 OUTPUT_DIR'"):
        merge_config(get_config(), "", ["SEED", "1", "OUTPUT_DIR"])


def test_host_of_the_overrides_beats_the_file_and_the_file_the_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("SSOD: {HOST: detectron2}")
    assert read_host("") == "torchvision"
    assert read_host(str(path)) == "detectron2"
    assert read_host(str(path), ["SEED", "1", "SSOD.HOST", "torchvision"]) == "torchvision"


def test_host_of_the_base_is_found(tmp_path):
    (tmp_path / "base.yaml").write_text("SSOD: {HOST: detectron2}")
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\nSEED: 1")
    assert read_host(str(tmp_path / "child.yaml")) == "detectron2"


def test_unknown_host_is_refused():
    with pytest.raises(InputError, match="SSOD.HOST must be .* got 'keras'"):
        read_host("", ["SSOD.HOST", "keras"])


def _keys_read(source):
    """Upper-case ends of attribute chains that are read: `A.B` for `cfg.A.B`, `B` for `a.B`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names = []
            while isinstance(node, ast.Attribute) and node.attr.isupper():
                names.append(node.attr)
                node = node.value
            if names:
                yield ".".join(reversed(names))


def _arguments(group, classes):
    for cls in classes:
        yield from (f"SSOD.{group}.{name.upper()}" for name in inspect.signature(cls).parameters)


def dead_keys(host, keys):
    """Those of the keys that no code of a host, or of what hosts share, reads."""
    folders = ("core", "data", "evaluation", "cli", f"hosts/{host}")
    sources = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    sources += PACKAGE.glob("hosts/*.py")
    read = {key for path in sources for key in _keys_read(path.read_text())}
    # Those of filters and methods are handed to them by name.
    read |= set(_arguments("FILTER", (cls for _, cls in PSEUDO_LABEL_FILTER_REGISTRY)))
    for _, cls in METHOD_REGISTRY:
        read |= set(_arguments(cls.group, [cls]))
    return {key for key in keys if not any(f".{key}".endswith(f".{end}") for end in read)}


def test_every_key_is_read():
    keys = {key for key, _ in _leaves(get_config())} - READ_ELSEWHERE
    assert len(keys) > 50
    assert dead_keys("torchvision", keys) == set()


def _nested(key, value):
    """A YAML text."""
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    return value


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_accepted_with_the_value_that_is_still_done(merge, key):
    """Every config that a run of an earlier version has written has it."""
    assert key not in dict(_leaves(get_config()))
    stays, _ = REMOVED[key]
    assert merge(_nested(key, stays)) == merge_config(get_config(), "", [key, str(stays)])
    assert merge(_nested(key, stays)) == get_config()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("SSOD.FILTER.N_SIGMA", "2"),
        ("SSOD.FILTER.MIN_SCORE", "5e-2"),
        ("SSOD.LSM.IGNORE_LOW_SCORES", "false"),
    ],
)
def test_a_removed_keys_value_may_be_written_in_another_way(merge, key, text):
    assert merge(_nested(key, text)) == merge("SEED: 0", key, text) == get_config()


@pytest.mark.parametrize("key", REMOVED)
def test_another_value_of_a_removed_key_says_what_to_do_instead(merge, key):
    stays, instead = REMOVED[key]
    value = {bool: not stays, str: "other"}.get(type(stays), 7)
    for merge_it in (lambda: merge(_nested(key, value)), lambda: merge("SEED: 1", key, str(value))):
        with pytest.raises(InputError) as error:
            merge_it()
        message = str(error.value)
        assert f"{key} was removed" in message and repr(value) in message
        assert message.endswith(instead)
        assert "\n" not in message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_former_name_of_a_key_is_understood(merge, tmp_path, old, new):
    def read(*arguments):
        return dict(_leaves(merge(*arguments)))[new]

    assert read(_nested(old, 0.25)) == read("SEED: 1", old, "0.25") == 0.25
    assert read(_nested(old, 0.25), new, "0.5") == read(_nested(new, 0.25), old, "0.5") == 0.5
    with pytest.raises(InputError, match=f"command line: {old} needs a value of type float"):
        merge("SEED: 1", old, "high")
    # One of a file and one of its base: which of them is meant cannot be told.
    (tmp_path / "base.yaml").write_text(f"SSOD: {_nested(new.removeprefix('SSOD.'), 0.5)}")
    with pytest.raises(InputError, match=f"{old} is {new} now, and both are set"):
        merge(f"_BASE_: base.yaml\nSSOD: {_nested(old.removeprefix('SSOD.'), 0.25)}")


def test_what_is_named_instead_of_removed_keys_exists():
    keys = {part for key, _ in _leaves(get_config()) for part in (key, key.split(".")[-1])}
    for _, instead in REMOVED.values():
        words = [word.strip(",.:;") for word in instead.split()]
        named = [word for word in words if word.isupper() and len(word) > 3]
        assert all(word in keys for word in named), instead


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_can_be_read(path):
    assert read_host(str(path)) in ("torchvision", "detectron2")
    if read_host(str(path)) == "torchvision":
        assert merge_config(get_config(), str(path)) != get_config()
