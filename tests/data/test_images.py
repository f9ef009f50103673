import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssod.data.images import read_image, read_image_size
from ssod.errors import InputError


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(256, size=(7, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a b/ü.bmp", "a.tif", "a.webp"])
def test_rgb_pixels_are_kept(tmp_path, pixels, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, lossless=True)
    image = read_image(path)
    np.testing.assert_array_equal(image, pixels)
    assert image.dtype == np.uint8 and image.flags.writeable
    assert read_image_size(path) == (7, 5)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_images_get_three_equal_channels(tmp_path, pixels, mode):
    gray = Image.fromarray(pixels).convert(mode)
    gray.save(tmp_path / "gray.png")
    expected = np.asarray(gray.convert("L"))
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.stack([expected] * 3, 2))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 300], [30_000, 65_278, 65_535]], np.uint16)
    expected = np.array([[0, 1, 1], [117, 254, 255]])
    for suffix in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
        image = read_image(tmp_path / f"deep.{suffix}")
        np.testing.assert_array_equal(image, np.stack([expected] * 3, 2))


def test_alpha_is_dropped(tmp_path, pixels):
    alpha = np.random.default_rng(1).integers(256, size=(7, 5, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), pixels)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes_are_looked_up(tmp_path, pixels, transparency):
    image = Image.fromarray(pixels).quantize(16)
    image.save(tmp_path / "palette.png", **({"transparency": transparency} if transparency else {}))
    with Image.open(tmp_path / "palette.png") as saved:
        assert saved.mode == "P"
    expected = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), expected)


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    image = read_image(tmp_path / "red.jpg").astype(int)
    assert image.shape == (8, 16, 3)
    assert np.abs(image - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path, write_image, orientation, suffix):
    with Image.open(write_image("upright.png", 16, 48)) as image:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"turned.{suffix}"
        image.save(path, exif=exif)
    with Image.open(path) as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved))
    image = read_image(path)
    np.testing.assert_array_equal(image, expected)
    assert read_image_size(path) == image.shape[:2]
    assert image.shape[:2] == ((48, 16) if orientation > 4 else (16, 48))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_truncated_files(write_image, suffix):
    path = write_image(f"cut.{suffix}", 64, 64)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=rf"cut\.{suffix}: cannot be decoded"):
        read_image(path)


def test_not_an_image(tmp_path):
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.png: cannot be decoded as an image"):
            read_image(tmp_path / "bad.png")
        with pytest.raises(InputError, match=r"bad\.png: cannot be read as an image"):
            read_image_size(tmp_path / "bad.png")
    with pytest.raises(InputError, match=r"gone\.png: cannot be decoded"):
        read_image(tmp_path / "gone.png")
