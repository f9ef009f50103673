import os

import numpy as np
import pytest
from PIL import Image

from ssod.data.datasets import check_disjoint, read_image_folder
from ssod.data.records import DetectionDataset, ImageRecord
from ssod.errors import InputError


def _record(image_id, num_boxes=0, file_name=None):
    boxes = np.arange(4 * num_boxes, dtype=np.float32).reshape(-1, 4)
    classes = np.full(num_boxes, num_boxes % 3, np.int64)
    return ImageRecord(image_id, file_name or f"/data/{image_id}.jpg", 10, 20, boxes, classes)


@pytest.fixture
def dataset():
    counts = {"a": 2, "b": 0, "c": 1, "d": 4}
    return DetectionDataset([_record(*item) for item in counts.items()], list("xyz"), [3, 5, 8])


def test_records_come_back_as_they_went_in(dataset):
    assert len(dataset) == 4 and dataset.num_classes == 3
    for index, (image_id, num_boxes) in enumerate(zip("abcd", (2, 0, 1, 4), strict=True)):
        record, expected = dataset[index], _record(image_id, num_boxes)
        assert (record.image_id, record.height, record.width) == (image_id, 10, 20)
        assert record.file_name == expected.file_name
        np.testing.assert_array_equal(record.boxes, expected.boxes)
        np.testing.assert_array_equal(record.classes, expected.classes)
        assert record.boxes.dtype == np.float32 and record.classes.dtype == np.int64
    with pytest.raises(IndexError):
        dataset[4]


def test_statistics(dataset):
    assert dataset.image_ids == list("abcd")
    assert dataset.aspect_ratios.tolist() == [2.0] * 4
    assert dataset.aspect_ratios.dtype == np.float32
    assert dataset.class_counts.tolist() == [0, 5, 2]


def test_a_set_without_boxes_counts_zero():
    dataset = DetectionDataset([_record("a")], list("xyz"), [3, 5, 8])
    assert dataset.class_counts.tolist() == [0, 0, 0]
    assert dataset[0].boxes.shape == (0, 4)


def test_select_keeps_the_order_of_the_set(dataset):
    selected = dataset.select(["d", "a"])
    assert selected.image_ids == ["a", "d"]
    assert selected.category_ids == [3, 5, 8] and selected.class_names == list("xyz")
    np.testing.assert_array_equal(selected[1].boxes, dataset[3].boxes)
    assert selected.class_counts.tolist() == [0, 4, 2]
    assert len(dataset.select([])) == 0


def test_select_of_unknown_ids_names_one(dataset):
    with pytest.raises(InputError, match=r"1 of 2 selected image ids .* 4 images, .* 'zz'"):
        dataset.select(["a", "zz"])


def test_folder_is_read_in_order_with_relative_ids(write_image, tmp_path):
    names = ["b.JPG", "a dir/ä ö.png", "a dir/x.webp", "Z.tiff", "c.jpeg", "d.bmp"]
    for name in names:
        write_image(f"folder/{name}", height=10, width=30)
    for hidden in (".hidden.png", ".cache/e.png"):
        write_image(f"folder/{hidden}")
    (tmp_path / "folder/notes.txt").write_text("not an image")

    dataset = read_image_folder(tmp_path / "folder", ["thing"], [1])
    assert dataset.image_ids == sorted(names)
    assert all(os.path.isabs(name) and os.path.isfile(name) for name in dataset.file_names)
    assert dataset.num_classes == 1 and dataset.aspect_ratios.tolist() == [3.0] * len(names)
    assert all(len(record.boxes) == 0 for record in (dataset[i] for i in range(len(dataset))))


def test_folder_honours_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    record = read_image_folder(tmp_path, ["thing"], [1])[0]
    assert (record.height, record.width) == (30, 10)


def test_unreadable_headers_are_left_out_with_one_warning(write_image, tmp_path, caplog):
    write_image("good.png")
    for name in ("bad1.png", "bad2.jpg"):
        (tmp_path / name).write_bytes(b"not an image")
    dataset = read_image_folder(tmp_path, ["thing"], [1])
    assert dataset.image_ids == ["good.png"]
    (message,) = caplog.messages
    assert "2 unreadable" in message and "bad1.png" in message


def test_bad_folders_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="nowhere: image folder not found"):
        read_image_folder(tmp_path / "nowhere", ["thing"], [1])
    with pytest.raises(InputError, match=r"expected a folder with images \(.*\), but it has none"):
        read_image_folder(tmp_path, ["thing"], [1])
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of its 1 images is readable"):
        read_image_folder(tmp_path, ["thing"], [1])


def test_leak_is_found_through_links(tmp_path, write_image):
    write_image("a/1.png")
    write_image("b/2.png")
    (tmp_path / "b/3.png").symlink_to(tmp_path / "a/1.png")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    labeled = read_image_folder(tmp_path / "a", ["thing"], [1])
    for folder in "abc":
        other = read_image_folder(tmp_path / folder, ["thing"], [1])
        with pytest.raises(InputError, match=r"1 image files are both .* among them .*a/1\.png"):
            check_disjoint(labeled, other)
    check_disjoint(labeled, read_image_folder(tmp_path / "b", ["thing"], [1]).select(["2.png"]))
