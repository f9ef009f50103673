import random
import shutil

import pytest

from ssod.data.build import load_run_data
from ssod.data.datasets import find_images, read_image_folder, read_sizes
from ssod.data.index import can_be_listed, read_index, write_index
from ssod.errors import InputError
from tiny_run import SPEC, tiny_config

NAMES = ["b.JPG", "a dir/ä ö.png", "a dir/x.webp", "Z.tiff", " c.jpeg", "a dir.bmp", "漢\r.png"]
CLASSES = (["thing"], [1])


@pytest.fixture
def folder(write_image, tmp_path):
    for i, name in enumerate(NAMES):
        write_image(f"images/{name}", height=10 + i, width=30)
    return tmp_path / "images"


@pytest.fixture
def index(folder):
    """Write an index of the folder's images; returns its path."""
    names = find_images(str(folder))
    images = [(name, *size) for name, size in zip(names, read_sizes(folder, names), strict=True)]
    path = folder.parent / "index.tsv"
    write_index(path, str(folder), images[::-1])
    return path


def _assert_same(actual, expected):
    assert actual.image_ids == expected.image_ids and actual.file_names == expected.file_names
    for i in range(len(expected)):
        one, other = actual[i], expected[i]
        assert (one.height, one.width, len(one.boxes)) == (other.height, other.width, 0)
    assert (actual.class_names, actual.category_ids) == CLASSES


def test_an_index_is_one_line_an_image(index, folder):
    lines = index.read_bytes().decode().split("\n")
    assert lines[0] == f"ssod-index 1\t7\t{folder}"
    assert lines[1:3] == [" c.jpeg\t14\t30", "Z.tiff\t13\t30"]
    assert lines[1:-1] == sorted(lines[1:-1]) and len(lines) == 9 and lines[-1] == ""


def test_an_index_opens_the_set_that_the_folder_does(index, folder, tmp_path):
    _assert_same(read_index(index, "", *CLASSES), read_image_folder(folder, *CLASSES))
    moved = shutil.move(folder, tmp_path / "moved")
    _assert_same(read_index(index, moved, *CLASSES), read_image_folder(moved, *CLASSES))


def test_names_that_are_not_text_come_back(tmp_path):
    name = "\udcff\udc80.jpg"
    write_index(tmp_path / "index.tsv", str(tmp_path), [(name, 5, 6)])
    try:
        (tmp_path / name).touch()
    except OSError:  # a file system that has no such names
        with pytest.raises(InputError, match="1 of 1 image files looked for are missing"):
            read_index(tmp_path / "index.tsv", "", *CLASSES)
    else:
        assert read_index(tmp_path / "index.tsv", "", *CLASSES).image_ids == [name]


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg"])
def test_names_that_would_break_the_format_are_refused(name, tmp_path):
    assert not can_be_listed(name)
    for folder, image in (("/images", name), (f"/{name}", "b.jpg")):
        with pytest.raises(ValueError, match="with a tab or a newline cannot stand in an index"):
            write_index(tmp_path / "index.tsv", folder, [(image, 5, 6)])
    assert not (tmp_path / "index.tsv").exists()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"a.jpg\t1", "line 3: expected a path, a height and a width .* found 'a.jpg.t1.n'"),
        (b"", r"line 3: .* found '\\n'"),
        (b"z.jpg\t1\t0", "line 3: expected a path"),
        (b"z.jpg\t1\t-5", "line 3: expected a path"),
        (b"z.jpg\t1\t2.0", "line 3: expected a path"),
        (b"z.jpg\t1\t1234567", "line 3: expected a path"),
        (b"z.jpg\t1\t2\t3", "line 3: expected a path"),
        (b"\t1\t2", "line 3: expected a path"),
        (b" c.jpeg\t1\t2", "line 3: expected paths in ascending order, each once, found ' c.jpeg'"),
        (b"\xff\xfe\0", "line 3: expected a path"),
    ],
)
def test_damaged_lines_are_named(index, line, found):
    lines = index.read_bytes().split(b"\n")
    index.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(InputError, match=f"index.tsv: {found}"):
        read_index(index, "", *CLASSES)


def test_an_index_cut_anywhere_is_refused(index):
    content = index.read_bytes()
    for length in range(len(content)):
        index.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"index.tsv: (line \d+: )?expected"):
            read_index(index, "", *CLASSES)


def test_random_damage_is_an_input_error_or_harmless(index):
    content, rng = index.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b"\0\t\n\r\x80\xff09a/ ")
        index.write_bytes(damaged)
        try:
            assert len(read_index(index, "", *CLASSES)) == len(NAMES)
        except InputError as error:
            assert str(error).startswith(f"{index}: ")
    for size in (0, 1, 100, 10000):
        index.write_bytes(rng.randbytes(size))
        with pytest.raises(InputError, match="line 1: expected a file that `ssod index`"):
            read_index(index, "", *CLASSES)


def test_missing_files_folders_and_indexes_are_input_errors(index, folder):
    with pytest.raises(InputError, match="nowhere.tsv: index cannot be read .No such file"):
        read_index(folder / "nowhere.tsv", "", *CLASSES)
    with pytest.raises(InputError, match="images: index cannot be read"):
        read_index(folder, "", *CLASSES)
    (folder / "Z.tiff").unlink()
    with pytest.raises(InputError, match="1 of 7 image files looked for are missing.*Z.tiff"):
        read_index(index, "", *CLASSES)
    with pytest.raises(InputError, match="7 of 7 .* SSOD.DATA.UNLABELED_IMAGES to their folder"):
        read_index(index, folder.parent / "nowhere", *CLASSES)
    write_index(index, str(folder), [])
    with pytest.raises(InputError, match="at least one, found 0"):
        read_index(index, "", *CLASSES)


def test_a_run_reads_the_index_its_config_names(shapes, tmp_path):
    images = [(f"unlabeled_{i + 1:06d}.jpg", 64, 64) for i in range(SPEC.num_unlabeled)]
    index = tmp_path / "index.tsv"
    write_index(index, str(shapes / "images"), images)
    only = ("SSOD.DATA.UNLABELED_TRUTH_JSON", "", "SSOD.DATA.UNLABELED_INDEX", index)

    def load(*overrides):
        return load_run_data(tiny_config(shapes, "unused", *only, *overrides))

    with pytest.raises(InputError, match="UNLABELED_JSON and SSOD.DATA.UNLABELED_INDEX both name"):
        load()
    for folder in ("", shapes / "images"):
        data = load("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_IMAGES", folder)
        assert data.unlabeled.image_ids == [name for name, _, _ in images]
        assert data.unlabeled.category_ids == data.labeled.category_ids
    write_index(index, str(shapes / "images"), [*images, ("labeled_000001.jpg", 64, 64)])
    with pytest.raises(InputError, match="1 image files are both labeled and unlabeled"):
        load("SSOD.DATA.UNLABELED_JSON", "", "SSOD.DATA.UNLABELED_IMAGES", "")
