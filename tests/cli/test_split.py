import json
import random
import re
import sys

import pytest

from ssod.cli.main import main
from ssod.data.build import load_run_data
from ssod.data.split_files import hash_ids
from ssod.hosts.torchvision.defaults import get_config

NUM_IMAGES = 30


@pytest.fixture
def source(tmp_path):
    """Path of an annotation file of images that are not there."""
    images = [
        {"id": 2 * i + 1, "file_name": f"{i}.jpg", "height": 10, "width": 20}
        for i in range(NUM_IMAGES)
    ]
    annotations = [
        {"id": n, "image_id": image["id"], "category_id": 1 + n % 3, "bbox": [0, 0, 4, 4]}
        for n, image in enumerate(images[1:])
    ]
    categories = [{"id": i, "name": name} for i, name in ((1, "a"), (2, "ß"), (3, "\ud800"))]
    path = tmp_path / "set.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def _split(*args):
    return main(["split", *map(str, args)])


def _error(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_have_the_names_other_tools_read(source, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert _split(source, "--percent", 10, 2.5, "--folds", 2, "--output", folder) == 0
    pairs = [f"set.{fold}@{percent}" for fold in (1, 2) for percent in ("10", "2.5")]
    names = [f"{pair}{end}.json" for pair in pairs for end in ("", "-unlabeled")]
    assert {path.name for path in folder.iterdir()} == {*names, "set.splits.json"}
    printed = capsys.readouterr().out
    for name in names:
        ids = [image["id"] for image in json.loads((folder / name).read_bytes())["images"]]
        assert re.search(rf"{name}: written, {len(ids)} images, .* ids {hash_ids(ids)}\n", printed)


def test_manifest_describes_the_files_and_keeps_earlier_ones(source, tmp_path):
    options = ("--percent", 20, "--truth", "--output", tmp_path / "out")
    assert _split(source, *options, "--fold", 3, "--stratified") == 0
    assert _split(source, *options, "--fold", 7) == 0
    files = _files(tmp_path / "out")
    manifest = json.loads(files.pop("set.splits.json"))
    assert manifest["source"]["file"] == "set.json"
    assert sorted(manifest["files"]) == sorted(files) and len(files) == 6
    for name, entry in manifest["files"].items():
        content = json.loads(files[name])
        names = {category["id"]: category["name"] for category in content["categories"]}
        boxes = [names[annotation["category_id"]] for annotation in content["annotations"]]
        assert entry["boxes"] == {name: boxes.count(name) for name in sorted(set(boxes))}
        assert entry["images"] == len(content["images"])
        assert entry["ids_sha256"] == hash_ids(image["id"] for image in content["images"])
        seed, method = (3, "stratified") if ".3@" in name else (7, "uniform")
        assert (entry["seed"], entry["method"], entry["percent"]) == (seed, method, 20)
    empty = [name for name in files if not manifest["files"][name]["boxes"]]
    assert empty == [name for name in files if name.endswith("-unlabeled.json")]
    truth = manifest["files"]["set.3@20-unlabeled-truth.json"]
    assert truth["ids_sha256"] == manifest["files"]["set.3@20-unlabeled.json"]["ids_sha256"]


def test_files_that_are_there_are_kept_unless_told_otherwise(source, capsys):
    folder = source.parent
    assert _split(source, "--percent", 10) == 0
    before = _files(folder)
    times = {name: (folder / name).stat().st_mtime_ns for name in before if "@" in name}
    assert _split(source, "--percent", 10) == 0
    assert capsys.readouterr().out.count("already there, ") == 2
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert _files(folder) == before

    (folder / "set.1@10.json").write_text("mine")
    before = _files(folder)
    assert _split(source, "--percent", 5, 10) == 2
    assert "set.1@10.json: is there and differs" in _error(capsys)
    assert _files(folder) == before
    assert _split(source, "--percent", 5, 10, "--overwrite") == 0
    after = _files(folder)
    assert len(after) == 6 and json.loads(after["set.1@10.json"])["images"]


@pytest.mark.parametrize("manifest", ["rubbish", "[]", '{"source": 1}'])
def test_manifest_of_something_else_is_not_lost(source, manifest, capsys):
    path = source.parent / "set.splits.json"
    path.write_text(manifest)
    assert _split(source, "--percent", 10) == 2
    assert "set.splits.json: is there and does not list splits of this set.json" in _error(capsys)
    assert path.read_text() == manifest and len(_files(source.parent)) == 2
    assert _split(source, "--percent", 10, "--overwrite") == 0
    assert len(json.loads(path.read_text())["files"]) == 2


def test_files_train_the_images_that_the_config_key_chooses(shapes, tmp_path):
    labeled = shapes / "annotations" / "labeled.json"
    assert _split(labeled, "--percent", 40, "--fold", 2, "--truth", "--output", tmp_path) == 0

    def images(*keys):
        cfg = get_config()
        keys += ("SSOD.DATA.LABELED_IMAGES", str(shapes / "images"))
        cfg.merge_from_list([*keys, "MODEL.ROI_HEADS.NUM_CLASSES", 6])
        data = load_run_data(cfg)
        sets = (data.labeled, data.unlabeled, data.hidden_truth)
        return [
            [(i, part[n].boxes.tolist()) for n, i in enumerate(part.image_ids)] for part in sets
        ]

    by_key = images(
        *("SSOD.DATA.LABELED_JSON", str(labeled)),
        *("SSOD.DATA.PERCENT", 40.0, "SSOD.DATA.SPLIT_SEED", 2),
    )
    by_file = images(
        *("SSOD.DATA.UNLABELED_IMAGES", str(shapes / "images")),
        *("SSOD.DATA.LABELED_JSON", str(tmp_path / "labeled.2@40.json")),
        *("SSOD.DATA.UNLABELED_JSON", str(tmp_path / "labeled.2@40-unlabeled.json")),
        *("SSOD.DATA.UNLABELED_TRUTH_JSON", str(tmp_path / "labeled.2@40-unlabeled-truth.json")),
    )
    assert by_file[0] == by_key[0] and by_file[2] == by_key[2]
    assert [i for i, _ in by_file[1]] == [i for i, _ in by_key[1]]
    assert not any(boxes for _, boxes in by_file[1])


def test_index_of_unbiased_teacher(source, tmp_path):
    index = tmp_path / "index.txt"
    index.write_text(json.dumps({"10.0": {"0": [0, 28]}, "20.0": {"0": [1, 2, 3, 4, 5]}}))
    options = ("--unbiased-teacher", index, "--fold", 0, "--output", tmp_path / "out")
    assert _split(source, *options, "--percent", 10, 20) == 0
    labeled, unlabeled = (
        {image["id"] for image in json.loads((tmp_path / "out" / name).read_bytes())["images"]}
        for name in ("set.0@10.json", "set.0@10-unlabeled.json")
    )
    assert labeled == {3, 59} and unlabeled == {*range(5, 59, 2)}  # 1 has no box
    manifest = json.loads((tmp_path / "out" / "set.splits.json").read_bytes())
    assert {entry["method"] for entry in manifest["files"].values()} == {"unbiased-teacher"}


def test_check_of_a_pair(source, tmp_path, capsys):
    assert _split(source, "--percent", 20, "--folds", 2, "--stratified") == 0
    one, two = ((tmp_path / f"set.{fold}@20.json") for fold in (1, 2))
    rest = tmp_path / "set.1@20-unlabeled.json"
    printed = capsys.readouterr().out
    assert _split("--check", one, rest) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no image is in both files" and "in neither" not in lines[0]
    boxes = [json.loads(one.read_bytes())["annotations"], *[[]] * 3]
    counts = [sum(a["category_id"] == k for a in boxes[0]) for k in (1, 2, 3)]
    rows = [line.split() for line in lines[2:6]]
    assert rows == [
        [name, str(count)]
        for name, count in zip(("a", "ß", "\\ud800", "all"), (*counts, sum(counts)), strict=True)
    ]
    hashes = [line.split()[-1] for line in lines if "images, ids" in line]
    assert len(hashes) == 2 and all(f"ids {digest}\n" in printed for digest in hashes)

    assert _split(source, "--check", one, rest) == 0
    assert capsys.readouterr().out.startswith(f"0 images of {source} are in neither file\n")
    assert _split("--check", two, rest) == 2
    assert "leak: " in _error(capsys)
    assert _split(two, "--check", one, rest) == 2
    assert re.search(r"set\.1@20\.json: \d of 6 images are not in .*set\.2@20", _error(capsys))
    # The same ids, but other files.
    content = json.loads(source.read_bytes())
    for image in content["images"]:
        image["file_name"] = f"other/{image['file_name']}"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    assert _split(other, "--check", one, rest) == 2
    assert "6 of 6 images are not in" in _error(capsys)


@pytest.mark.parametrize(
    "option", [["--truth"], ["--stratified"], ["--overwrite"], ["--output", "x"]]
)
def test_a_check_takes_no_option_of_a_split(source, option, capsys):
    assert _split("--check", source, source, *option) == 2
    assert "--check writes nothing" in _error(capsys)


def test_folds_are_not_negative(source, capsys):
    with pytest.raises(SystemExit):
        _split(source, "--percent", 20, "--fold", "-1")
    assert "--fold: must be a number from 0, got '-1'" in capsys.readouterr().err


def test_check_tells_of_annotations_in_the_unlabeled_file(source, tmp_path, capsys):
    assert _split(source, "--percent", 20, "--truth") == 0
    truth = tmp_path / "set.1@20-unlabeled-truth.json"
    assert _split("--check", tmp_path / "set.1@20.json", truth) == 0
    assert f"{truth}: has annotations, which training does not read" in capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["set.json"], ["--percent", "3"]])
def test_what_is_missing_is_named(args, capsys):
    assert _split(*args) == 2
    assert "name an annotation file and --percent to split it, or --check" in _error(capsys)


@pytest.mark.parametrize(
    "args",
    [
        ["--percent", "0"],
        ["--percent", "100"],
        ["--percent", "nan"],
        ["--percent", "ten"],
        ["--folds", "0"],
        ["--folds", "x"],
        ["--folds", "2", "--fold", "2"],
        ["--stratified", "--unbiased-teacher", "index"],
    ],
)
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as stop:
        _split("set.json", *args)
    assert stop.value.code == 2
    assert "ssod split: error: argument --" in capsys.readouterr().err.splitlines()[-1]


def test_folder_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _split(source, "--percent", 10, "--output", tmp_path / "file" / "out") == 2
    assert "cannot be written" in _error(capsys)
    (tmp_path / "set.1@10.json").mkdir()
    assert _split(source, "--percent", 10) == 2
    assert "set.1@10.json: cannot be written" in _error(capsys)


def test_rubbish_is_one_line(source, tmp_path, capsys):
    rng = random.Random(0)
    text = source.read_bytes()
    rubbish = tmp_path / "rubbish.json"
    for case in range(60):
        if case % 2:
            rubbish.write_bytes(text[: rng.randrange(len(text))])
        else:
            rubbish.write_bytes(rng.randbytes(rng.randrange(50)))
        for args in (
            (rubbish, "--percent", 10),
            (source, "--percent", 10, "--unbiased-teacher", rubbish),
            ("--check", rubbish, source),
            ("--check", source, rubbish),
            (rubbish, "--check", source, source),
        ):
            assert _split(*args) == 2
            _error(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"set.json", "rubbish.json"}


def test_what_is_nested_too_deeply_is_one_line(source, capsys):
    content = source.read_text()
    deepest = sys.getrecursionlimit()
    outcomes = []
    for depth in (10, *range(deepest - 150, deepest, 5), 100_000):
        source.write_text(content[:-1] + f', "info": {"[" * depth}{"]" * depth}}}')
        outcomes.append(_split(source, "--percent", 10, "--overwrite"))
    assert outcomes[0] == 0 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert all("it is not JSON" in line for line in capsys.readouterr().err.splitlines())
