import math
import re

import pytest
from PIL import Image

from ssod.cli.main import main
from ssod.data.datasets import read_image_folder
from ssod.data.index import read_index
from ssod.data.splits import make_split

CLASSES = (["thing"], [1])


@pytest.fixture
def folder(tmp_path):
    """Folder with 13 images in two subfolders."""
    for i in range(13):
        path = tmp_path / "images" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20 + i, 10)).save(path)
    return tmp_path / "images"


@pytest.fixture
def index(tmp_path, capsys):
    """Run `ssod index`; returns the status, what was printed, and the index."""

    def run(folder, *args):
        status = main(["index", str(folder), "--output", str(tmp_path / "index.tsv"), *args])
        return status, capsys.readouterr(), tmp_path / "index.tsv"

    return run


def test_all_images_are_listed(index, folder):
    status, printed, path = index(folder)
    assert status == 0 and printed.out == f"{path}: 13 of the 13 images of {folder}\n"
    expected, found = read_image_folder(folder, *CLASSES), read_index(path, "", *CLASSES)
    assert found.file_names == expected.file_names
    assert found.aspect_ratios.tolist() == expected.aspect_ratios.tolist()
    assert [entry.name for entry in path.parent.iterdir() if entry.is_file()] == [path.name]


@pytest.mark.parametrize(("percent", "seed"), [("20", 0), ("20", 1), ("0.1", 0), ("99.9", 3)])
def test_share_is_that_of_make_split(index, folder, percent, seed):
    status, printed, path = index(folder, "--percent", percent, "--seed", str(seed))
    names = read_image_folder(folder, *CLASSES).image_ids
    expected = make_split(names, float(percent), seed)
    assert len(expected) == max(1, math.floor(0.5 + 13 * float(percent) / 100))
    assert status == 0 and f"{len(expected)} of the 13 images" in printed.out
    assert read_index(path, "", *CLASSES).image_ids == sorted(expected)


def test_what_cannot_be_listed_is_left_out_and_reported(index, folder, caplog):
    (folder / "broken.jpg").write_bytes(b"not an image")
    Image.new("L", (5, 5)).save(folder / "a\tb.png")
    status, printed, path = index(folder)
    assert status == 0 and "13 of the 15 images" in printed.out
    assert len(read_index(path, "", *CLASSES)) == 13
    reported = " ".join(caplog.messages)
    assert "broken.jpg: cannot be read as an image" in reported and r"'a\tb.png'" in reported


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nowhere", (), "nowhere: image folder not found"),
        ("empty", (), "empty: expected a folder with images, but it has none"),
        ("bad", (), "bad: none of its 1 images is readable"),
        ("bad\tname", (), r"bad\\tname': rename this folder"),
        ("images", ("--percent", "0"), r"--percent must be in \(0, 100\], got 0.0"),
        ("images", ("--percent", "nan"), r"--percent must be in \(0, 100\], got nan"),
        ("images", ("--output", "nowhere/i.tsv"), "nowhere/i.tsv: cannot be written; name a file"),
        ("images", ("--output", "."), ".: cannot be written; name a file"),
    ],
)
def test_bad_input_is_one_line_and_keeps_what_was_there(index, folder, name, args, message):
    for made in ("empty", "bad", "bad\tname"):
        (folder.parent / made).mkdir()
    (folder.parent / "bad" / "a.png").write_bytes(b"")
    (folder.parent / "index.tsv").write_text("mine")
    status, printed, path = index(folder.parent / name, *args)
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in printed.err
    assert re.search(message, errors[0]), errors[0]
    assert path.read_text() == "mine" and printed.out == ""
