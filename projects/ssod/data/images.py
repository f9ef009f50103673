"""Reading image files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ssod.errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_ORIENTATION = 0x0112  # Exif tag; values 5 to 8 swap the axes
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101


def read_image(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """
    Decode an image file to (H, W, 3) uint8 RGB, turned upright by its Exif orientation.

    Every colour mode is converted: 16 bit grayscale is scaled to 8 bit (not clipped), palettes
    are looked up, alpha is dropped.

    Args:
        path: of the file.
        content: its bytes, if they have been read already.

    Raises:
        InputError: naming the file, if it is missing, truncated or not an image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # "I;16", or "I" where Pillow widens 16 bit files
                gray = np.rint(np.asarray(image, dtype=np.float64) / 257).clip(0, 255)
                image = Image.fromarray(gray.astype(np.uint8))
            elif image.mode == "P":  # palettes with transparency convert to RGB only with a warning
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise nearly any type on damaged files
        # Pillow's own message is the address of the bytes.
        unknown = content is not None and isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if unknown else error
        raise InputError(f"{path}: cannot be decoded as an image ({reason})") from error


def read_image_size(path: str | Path) -> tuple[int, int]:
    """
    Return (height, width) of the upright image from the file's header, without decoding it.

    Raises:
        InputError: naming the file, if its header cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow 11 and later report the size already turned
                width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
            # The PNG override of `getexif` decodes the pixels to look for a trailing Exif chunk.
            orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception as error:  # as in `read_image`
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
