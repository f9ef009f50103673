import random
import shutil

import numpy as np
import pytest
from PIL import Image

from ssod.data.coco import to_coco
from ssod.data.datasets import read_coco, read_voc
from ssod.errors import InputError
from voc_files import voc_xml, write_voc

OBJECTS = [("dog", 1, 1, 32, 24), ("cat", 4, 5, 10, 9)]


@pytest.fixture
def write(tmp_path, write_image):
    """Write an image and its XML file below `images` and `xml`; returns the latter."""

    def write(name="a", objects=OBJECTS, text=None, filename=None, size=(24, 32)):
        write_image(f"images/{name}.png")
        path = tmp_path / "xml" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        filename = f"{path.stem}.png" if filename is None else filename
        path.write_text(voc_xml(filename, size, objects) if text is None else text, "utf-8")
        return path

    return write


@pytest.fixture
def read(tmp_path):
    return lambda **options: read_voc(tmp_path / "xml", tmp_path / "images", **options)


def test_pixels_count_from_one_and_the_last_is_inside(write, read):
    write()
    dataset = read()
    # A box from 1 to the width covers the whole image.
    assert dataset[0].boxes.tolist() == [[0, 0, 32, 24], [3, 4, 10, 9]]
    assert (dataset.class_names, dataset.category_ids) == (["cat", "dog"], [1, 2])
    assert dataset[0].classes.tolist() == [1, 0]
    assert dataset.image_ids == ["a"] and (dataset[0].height, dataset[0].width) == (24, 32)


def test_boxes_counted_from_zero_are_clipped(write, read):
    write(objects=[("dog", 0, 0, 5.5, 6)])
    assert read()[0].boxes.tolist() == [[0, 0, 5.5, 6]]


def test_set_is_the_same_as_in_coco_format(shapes, tmp_path):
    expected = read_coco(shapes / "annotations" / "labeled.json", shapes / "images")
    folder = write_voc(tmp_path / "voc", expected)
    dataset = read_voc(folder, shapes / "images", like=expected)
    assert dataset.file_names == expected.file_names
    assert dataset.category_ids == expected.category_ids
    for index in range(len(expected)):
        np.testing.assert_array_equal(dataset[index].boxes, expected[index].boxes)
        np.testing.assert_array_equal(dataset[index].classes, expected[index].classes)


def test_coco_content_of_a_set_is_read_back_as_it_was(write, read, write_json, tmp_path):
    write("a")
    write("b", objects=[])
    dataset = read()
    copy = read_coco(write_json(to_coco(dataset)), tmp_path)
    assert (copy.image_ids, copy.file_names) == (dataset.image_ids, dataset.file_names)
    assert (copy.class_names, copy.category_ids) == (dataset.class_names, dataset.category_ids)
    for index in range(2):
        np.testing.assert_array_equal(copy[index].boxes, dataset[index].boxes)
        np.testing.assert_array_equal(copy[index].classes, dataset[index].classes)


def test_list_of_a_voc_tree(tmp_path, write_image):
    tree = tmp_path / "VOC 2007"
    (tree / "Annotations").mkdir(parents=True)
    (tree / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("000001", "000002", "000003"):
        write_image(f"VOC 2007/JPEGImages/{name}.jpg")
        text = voc_xml(f"{name}.jpg", (24, 32), OBJECTS)
        (tree / "Annotations" / f"{name}.xml").write_text(text)
    names = tree / "ImageSets" / "Main" / "trainval.txt"
    names.write_text("000003\n000001 \n\n")
    dataset = read_voc(names, tree / "JPEGImages")
    assert dataset.image_ids == ["000003", "000001"]
    names.write_text("000009\n")
    with pytest.raises(InputError, match=r"Annotations/000009\.xml: annotation file not found"):
        read_voc(names, tree / "JPEGImages")


@pytest.mark.parametrize(
    ("name", "filename", "image"),
    [
        ("straße 1", "straße 1.png", "straße 1.png"),
        ("a", "other.jpg", "a.png"),
        ("sub/a", "a", "sub/a.png"),
        ("sub/a", "a.png", "a.png"),
        ("a", "b.v2", "b.v2.png"),
        ("a", "sub/b.png", "sub/b.png"),
        ("a", "C:\\photos\\b.PNG", "b.PNG"),
        ("a", "b.bmp", "b.png"),
    ],
)
def test_image_is_found(name, filename, image, write, read, write_image, tmp_path):
    write(name, filename=filename)
    shutil.rmtree(tmp_path / "images")
    path = write_image(f"images/{image}")
    assert read().file_names == [str(path)]
    assert read().image_ids == [name]


def test_hidden_files_and_other_files_are_no_annotations(write, read, tmp_path):
    write()
    (tmp_path / "xml" / "._a.xml").write_bytes(b"\0")
    (tmp_path / "xml" / "classes.txt").write_text("cat")
    assert read().image_ids == ["a"]


@pytest.mark.parametrize("size", [(0, 0), ("", ""), (24, 0)])
def test_missing_size_is_that_of_the_upright_image(size, write, read, tmp_path):
    write(size=size)
    image = Image.open(tmp_path / "images" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "a.png", exif=exif)
    dataset = read()
    assert (dataset[0].height, dataset[0].width) == (32, 24)


def test_images_without_objects_stay_and_difficult_ones_count(write, read):
    text = voc_xml("b.png", (24, 32), OBJECTS).replace("<difficult>0", "<difficult>1")
    write("a", objects=[])
    write("b", text=text)
    dataset = read()
    assert [len(dataset[i].boxes) for i in range(2)] == [0, 2]


def test_box_without_area(write, read, caplog):
    write(objects=[*OBJECTS, ("dog", 9, 9, 8, 12), ("dog", 40, 1, 50, 9)])
    with pytest.raises(InputError, match=r"a\.xml: object\[2\]: .*SKIP_INVALID_BOXES True"):
        read()
    assert len(read(skip_invalid_boxes=True)[0].boxes) == 2
    assert [m for m in caplog.messages if "left out 2 boxes" in m] == caplog.messages


def test_unknown_class_of_another_set_is_named(write, read):
    path = write()
    labeled = read()
    path.write_text(voc_xml("a.png", (24, 32), [("dog", 1, 1, 9, 9), ("cow", 1, 1, 9, 9)]))
    with pytest.raises(InputError, match=r"a\.xml: object\[1\]: class 'cow' is not .* \(cat, dog"):
        read(like=labeled)
    path.write_text(voc_xml("a.png", (24, 32), [("dog", 1, 1, 9, 9)]))
    assert read(like=labeled)[0].classes.tolist() == [1]


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "'
    + "x" * 1000
    + '">'
    + "".join(
        f'<!ENTITY {new} "{f"&{old};" * 10}">'
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><annotation><filename>&i;</filename></annotation>"
)
GOOD = voc_xml("a.png", (24, 32), OBJECTS)
BAD_FILES = [
    ("<annotation>\n<object>\n</annotation>", "is not XML .*mismatched tag: line 3"),
    ("", "is not XML"),
    ("<a/>", "whose top element is <annotation>, but it is <a>"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is not XML .*encoding"),
    (BOMB, "is not XML .*amplification"),
    ("<annotation>" + "<b>" * 100_000 + "</b>" * 100_000 + "</annotation>", "without any object"),
    (GOOD.replace("<width>32", "<width>wide"), "size/width must be a number of pixels, got 'wide'"),
    (GOOD.replace("<width>32", "<width>-3"), "size/width must be .*got '-3'"),
    (GOOD.replace("<name>cat", "<name> "), r"object\[1\]: expected a class in <name>"),
    (GOOD.replace("<xmin>4", "<xmin>nan"), r"object\[1\]: bndbox/xmin must be .*, got 'nan'"),
    (GOOD.replace("<ymax>9", "<ymax>1e99"), r"object\[1\]: bndbox/ymax must be .*, got '1e99'"),
    (GOOD.replace("bndbox>", "polygon>"), r"object\[0\]: bndbox/xmin must be .*, got ''"),
    (voc_xml("a.png", (24, 32), []), "1 files without any object"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[m for _, m in BAD_FILES])
def test_what_is_wrong_is_named(text, message, write, read):
    write(text=text)
    with pytest.raises(InputError, match=f"xml.*: .*{message}") as error:
        read()
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_named(write, read, tmp_path, write_image):
    with pytest.raises(InputError, match="neither a folder of XML files nor a list"):
        read()
    (tmp_path / "xml").mkdir()
    with pytest.raises(InputError, match="expected VOC annotations of images, but none"):
        read()
    write()
    write_image("images/a.jpg")
    (tmp_path / "xml" / "a.xml").write_text(voc_xml("b.png", (24, 32), OBJECTS))
    with pytest.raises(InputError, match=r"2 images in .* fit: \['a.jpg', 'a.png'\]"):
        read()
    (tmp_path / "images" / "a.jpg").unlink()
    write("b", filename="a.png")
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.xml: its image .*a\.png has another .*a\.xml"):
        read()
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.xml: found neither an image 'a' .*filename 'b.png'"):
        read()
    with pytest.raises(InputError, match="cannot be read as a list of image names"):
        read_voc(write_image("list.png"), tmp_path)


def test_all_problems_are_collected(write, read):
    write("a", text="<annotation>")
    write("b", text=GOOD.replace("<xmin>4", "<xmin>x").replace("a.png", "b.png"))
    write("c", objects=[("dog", 9, 9, 3, 3), ("dog", 1, 1, 60, 9), ("cat", 1, 1, 2, 2)])
    problems = []
    dataset = read(on_problem=lambda kind, error: problems.append((kind, str(error))))
    assert [kind for kind, _ in problems] == [
        "annotation files",
        "annotations",
        "boxes without area",
        "boxes that reach out of their image",
    ]
    assert dataset.image_ids == ["b", "c"] and dataset.class_counts.tolist() == [1, 2]


def _damage(content, rng):
    action = rng.randrange(4)
    if action == 0:  # random bytes
        return rng.randbytes(rng.randrange(200))
    if action == 1:
        return content[: rng.randrange(len(content))]
    place = rng.randrange(len(content))
    if action == 2:
        return content[:place] + rng.randbytes(3) + content[place + 3 :]
    parts = content.split(b">")  # one text replaced by another type
    index = rng.randrange(len(parts))
    junk = rng.choice([b"", b"-1", b"1e400", b"nan", b"<x/>", b"\xff", "ü".encode(), b"0x10"])
    parts[index] = junk + b"<" + parts[index].rpartition(b"<")[2]
    return b">".join(parts)


def test_any_damage_is_an_input_error_or_harmless(write, read):
    content = write().read_bytes()
    path = write("b")
    rng = random.Random(0)
    cuts = [content[:end] for end in range(0, len(content), 7)]
    outcomes = []
    for damaged in [*cuts, *(_damage(content, rng) for _ in range(150))]:
        path.write_bytes(damaged)
        try:
            dataset = read()
            outcomes.append("read")
            assert all(np.isfinite(dataset[i].boxes).all() for i in range(len(dataset)))
        except InputError as error:
            outcomes.append("refused")
            assert "b.xml" in str(error) and "\n" not in str(error)
    assert min(outcomes.count("read"), outcomes.count("refused")) > 10
