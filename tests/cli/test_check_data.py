import json
import random
import shutil

import pytest

from ssod.cli.main import main
from ssod.data.datasets import read_coco
from tiny_run import SPEC, tiny_options
from voc_files import write_voc

HIDDEN = ("SSOD.DATA.UNLABELED_TRUTH_JSON", "")


@pytest.fixture
def check(tmp_path, capsys, shapes):
    """Check the data of the tiny config with overrides; returns exit status, stdout and stderr."""
    config = tmp_path / "mine.yaml"
    config.write_text("SSOD:\n  BURN_IN_ITERS: 2\n")

    def check(*args):
        options = [*tiny_options(shapes, tmp_path / "unused"), *map(str, args)]
        return main(["check-data", "--config-file", str(config), *options]), *capsys.readouterr()

    return check


@pytest.fixture
def copy(shapes, tmp_path):
    """Folder of a copy of the Shapes set."""
    return shutil.copytree(shapes, tmp_path / "copy")


def _keys(root):
    options = tiny_options(root, root)
    start = options.index("SSOD.DATA.UNLABELED_TRUTH_JSON")
    return options[start : options.index("OUTPUT_DIR")]


def test_whole_set_is_described_without_a_problem(check, shapes):
    status, out, _ = check()
    assert status == 0 and "\n0 errors\n" in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    truth = json.loads((shapes / "annotations" / "unlabeled_truth.json").read_text())
    assert rows["labeled"][1] == str(SPEC.num_labeled)
    assert rows["unlabeled"][1:3] == [str(SPEC.num_unlabeled), "-"]
    assert rows["validation"][1] == str(SPEC.num_val)
    assert rows["hidden truth"][2:4] == [str(SPEC.num_unlabeled), str(len(truth["annotations"]))]
    circles = sum(a["category_id"] == 1 for a in truth["annotations"])
    assert rows["circle"][-1] == str(circles)


def test_a_file_that_a_split_puts_on_both_sides_is_an_error(check, copy):
    """The labels are split by image id, so a file under two ids may leak."""
    path = copy / "annotations" / "labeled.json"
    content = json.loads(path.read_text())
    content["images"] += [image | {"id": image["id"] + 1000} for image in content["images"]]
    path.write_text(json.dumps(content))
    keys = (*_keys(copy), "SSOD.DATA.PERCENT", 50, *HIDDEN)
    keys += ("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_IMAGES", "")
    status, out, _ = check(*keys)
    assert status == 1
    assert "labeled as well: remove it from one of the two" in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert rows["labeled"][1] == rows["unlabeled"][1] == str(SPEC.num_labeled)


def test_an_unlabeled_source_that_cannot_be_read_is_one_error(check, tmp_path):
    (tmp_path / "empty").mkdir()
    keys = ("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_IMAGES", tmp_path / "empty")
    status, out, _ = check(*keys, *HIDDEN)
    assert status == 1 and "\n1 errors\n" in out


def test_every_problem_is_shown_at_once(check, copy):
    path = copy / "annotations" / "labeled.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [1, 1, 0, 5]
    content["annotations"][1]["category_id"] = 1234
    path.write_text(json.dumps(content))
    images = copy / "images"
    (images / "labeled_000002.jpg").unlink()
    (images / "labeled_000003.jpg").write_bytes(b"")
    shutil.copy(images / "labeled_000001.jpg", images / "val_000001.jpg")
    content = json.loads((copy / "annotations" / "val.json").read_text())
    content["images"][1]["width"] += 1
    content["categories"][0]["name"] = "disc"
    (copy / "annotations" / "val.json").write_text(json.dumps(content))
    status, out, _ = check(*_keys(copy), "MODEL.ROI_HEADS.NUM_CLASSES", 9)
    assert status == 1
    for part in (
        "annotations[0] (id 1): box from (1, 1) to (1, 6) has no area",
        "category_id 1234 is not the id",
        "labeled, image 2: ",
        "labeled_000003.jpg: is empty",
        "labeled_000001.jpg (labeled): remove it from one of the two",
        "validation, image 2: the annotations say ",
        "has 6 categories, but MODEL.ROI_HEADS.NUM_CLASSES is 9",
        "val.json: its categories differ",
    ):
        assert part in out, part


def test_boxes_that_are_left_out_are_warnings(check, copy):
    path = copy / "annotations" / "labeled.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [1, 1, 0, 5]
    path.write_text(json.dumps(content))
    assert check(*_keys(copy))[0] == 1
    status, out, _ = check(*_keys(copy), "SSOD.DATA.SKIP_INVALID_BOXES", True)
    assert status == 0 and "boxes without area, left out: 1" in out


def test_the_first_of_each_kind_are_shown_or_all(check, copy):
    path = copy / "annotations" / "labeled.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:11]:
        annotation["bbox"] = None
    path.write_text(json.dumps(content))
    count = min(11, len(content["annotations"]))
    assert count == 11
    status, out, _ = check(*_keys(copy))
    assert (status, out.count("bbox must be 4 finite")) == (1, 10) and "and 1 more; --all" in out


def test_voc_files_are_checked(check, shapes, tmp_path):
    labeled = read_coco(shapes / "annotations" / "labeled.json", shapes / "images")
    folder = write_voc(tmp_path / "voc", labeled)
    keys = ("SSOD.DATA.LABELED_JSON", "", "SSOD.DATA.LABELED_VOC", folder, *HIDDEN)
    keys += ("SSOD.DATA.VAL_JSON", "", "MODEL.ROI_HEADS.NUM_CLASSES", sum(labeled.class_counts > 0))
    status, out, _ = check(*keys)
    assert status == 0 and str(labeled.class_counts.sum()) in out
    (folder / "labeled_000001.xml").write_text("<annotation>")
    (folder / "labeled_000002.xml").write_text("<html/>")
    status, out, _ = check(*keys)
    assert status == 1 and "annotation files: 2" in out


def test_sets_after_one_that_cannot_be_read_are_checked(check, shapes, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, _ = check(
        *("SSOD.DATA.LABELED_JSON", "nowhere.json", "SSOD.DATA.UNLABELED_JSON", "", *HIDDEN),
        *("SSOD.DATA.UNLABELED_IMAGES", tmp_path / "empty"),
    )
    assert status == 1 and "annotations: 2\n" in out and "\nvalidation " in out
    assert "nowhere.json: annotation file not found" in out and "expected a folder" in out


def test_any_damage_of_a_file_ends_in_the_report(check, copy):
    path = copy / "annotations" / "labeled.json"
    content = path.read_bytes()
    rng = random.Random(0)
    keys = (*_keys(copy), *HIDDEN, "SSOD.DATA.VAL_JSON", "")
    for _ in range(15):
        place = rng.randrange(len(content))
        cut = content[:place] + (rng.randbytes(3) + content[place + 3 :]) * rng.randrange(2)
        path.write_bytes(cut)
        status, out, _ = check(*keys)
        assert status in (0, 1) and (" errors\n" in out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: config file not found"),
        (["--config-file", "", "SSOD.DATA.X", "1"], "unknown key SSOD.DATA.X"),
    ],
)
def test_config_that_cannot_be_read_is_one_line(args, message, capsys):
    assert main(["check-data", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
