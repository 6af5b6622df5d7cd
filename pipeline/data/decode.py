"""Decode an image file of any format to RGB pixels of the configured size.

The image is turned upright by its EXIF orientation, converted to RGB, cropped to its centre square and resized
bicubically. Transparent pixels become white; of an animation the first frame is used; 16-bit grey is scaled to 8 bits.
torchvision's ImageFolder ignores orientation, drops the transparency mask and clips 16 bits; other images are equal.

Pixels must be complete; metadata (EXIF, XMP) may be damaged. A file is read completely before it is decoded, so that a
system error is never mistaken for a broken image.
"""

import io
import os
from pathlib import Path

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from pipeline.data import image_hashes
from pipeline.io.system_errors import refusal

try:
    import pillow_heif
except ImportError:
    _HEIF_READABLE = False
else:
    pillow_heif.register_heif_opener(thumbnails=False)
    _HEIF_READABLE = True

VERSIONS = {"pillow": PIL.__version__, "pillow-heif": pillow_heif.__version__ if _HEIF_READABLE else None}
"""Versions of the decoders, on which pixels depend, and which files are readable; None: not installed."""

# Pillow rejects a PNG for a long text chunk (XMP) that it accepts in a JPEG. The sum of all chunks stays limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

HEIF_ENDINGS = (".heic", ".heif", ".hif")
"""File extensions of HEIC photographs; readable with the optional extra `heif`."""

ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    *(HEIF_ENDINGS if _HEIF_READABLE else ()),
)  # fmt: skip
"""File extensions of images, in upper or lower case: torchvision's list and some more."""

HEIF_ADVICE = "To read HEIC, install the package pillow-heif"

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"})

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (Exif 2.32, tag 0x0112) -> the transposition that turns the image upright; 1 is upright."""


class BrokenImageError(Exception):
    """A file is not a readable image; the message is the reason."""


def read_image(path: Path, image_size: int, rows_cut: int = 0) -> np.ndarray:
    """Read one image file; see `read_hashed`."""
    return read_hashed(path, image_size, rows_cut)[0]


def read_hashed(path: Path, image_size: int, rows_cut: int = 0) -> tuple[np.ndarray, int]:
    """Read one image file as uint8 (image_size, image_size, 3), without `rows_cut` rows of pixels at its bottom.

    Return it, and the hash of the file's bytes (see `image_hashes`).

    Raises:
        BrokenImageError: The file is missing, not an image, damaged, or has more than twice Pillow's limit of pixels.
        SystemRefusal: The disk, its permissions or the memory are at fault, not the image.
    """
    try:
        if not path.is_file() and path.exists():  # reading a pipe would block
            raise BrokenImageError("is not a file")
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise refusal(error, path) or BrokenImageError(_reason(error)) from None
    return decode_hashed(content, path, image_size, rows_cut)


def decode_hashed(content: bytes, path: Path, image_size: int, rows_cut: int = 0) -> tuple[np.ndarray, int]:
    """Decode the bytes of an image file, which came from the file at `path`; see `read_hashed`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb = _to_rgb(image)
        if rgb.height <= rows_cut:
            raise BrokenImageError(f"is only {rgb.height} pixels high")
        cut = rgb.crop((0, 0, rgb.width, rgb.height - rows_cut))
        return np.asarray(resize(cut, image_size)), image_hashes.of_bytes(content)
    except BrokenImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImageError(_unknown_format(content)) from None
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise refusal(error, path) or BrokenImageError(_reason(error)) from None


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """Return the centre square of an image at this height and width; bicubic, and unchanged if it has that size."""
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _turned_upright(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _turned_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data is ignored in every format, not only in JPEG as by Pillow."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey, 0..65535, to 8 bits; reject wider or floating-point pixels, whose white is unknown."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(f"has pixels of mode {image.mode}, whose range is unknown")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _unknown_format(content: bytes) -> str:
    if not content:
        return "is empty"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS and not _HEIF_READABLE:
        return f"is a HEIC image. {HEIF_ADVICE}"
    return "is not of a known image format"


def _reason(error: BaseException) -> str:
    """Describe the error without the path, so that manifests do not depend on the data set's place."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error) or type(error).__name__
