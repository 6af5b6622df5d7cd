"""One image file -> RGB pixels of the wanted size, whatever the file holds.

The image is turned upright by its EXIF orientation, converted to RGB, cropped to its centre square and resized
bicubically. Transparent pixels show white; of an animation the first frame is taken; 16-bit grey is scaled to 8 bits.
torchvision's ImageFolder ignores orientation, drops the transparency mask and clips 16 bits: images that have none of
these come out the same here.
"""

import errno
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import PipelineError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
)  # fmt: skip
"""What counts as an image file in a class folder: torchvision's list and three more; in either case of letters."""

_NOT_A_FILE = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO)


class BrokenImageError(Exception):
    """A file that should be an image and cannot be read as one; its text is the reason."""


def read_image(path: Path, image_size: int, rows_cut: int = 0) -> np.ndarray:
    """Reads one image file.

    Args:
        path: the file.
        image_size: height and width of the result, pixels.
        rows_cut: rows of pixels to remove at the bottom first.

    Returns:
        uint8 (image_size, image_size, 3).

    Raises:
        BrokenImageError: the file is missing, no image, damaged, or of more than twice Pillow's limit of pixels.
        PipelineError: the disk or its permissions are at fault, not the image.
    """
    try:
        with Image.open(path) as image:
            rgb = _to_rgb(image)
        if rgb.height <= rows_cut:
            raise BrokenImageError(f"is only {rgb.height} pixels high")
        return np.asarray(resize(rgb.crop((0, 0, rgb.width, rgb.height - rows_cut)), image_size))
    except BrokenImageError:
        raise
    except OSError as error:
        if error.errno is not None and error.errno not in _NOT_A_FILE:
            raise PipelineError(f"{path} cannot be read: {error.strerror}") from None
        raise BrokenImageError(_reason(error, path)) from None
    except MemoryError:
        raise PipelineError(f"{path}: out of memory while decoding it") from None
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise BrokenImageError(_reason(error, path)) from None


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """The centre square of an image at this height and width; bicubic, and unchanged if it has that size."""
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, 0..65535, to 8-bit grey; wider or floating-point pixels have no known white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(f"has pixels of mode {image.mode}, whose range is unknown")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _reason(error: Exception, path: Path) -> str:
    """The error in words, without the path, so that it is the same wherever the data set stands."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "is empty" if path.stat().st_size == 0 else "is not of a known image format"
    return str(error).replace(str(path), path.name) or type(error).__name__
