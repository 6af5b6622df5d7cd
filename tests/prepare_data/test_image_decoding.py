"""Every kind of image file that turns up in real folders, against pixels worked out by hand."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.data.decode import BrokenImageError, read_image
from pipeline.data.image_search import ImageSearch, has_images, subfolders
from pipeline.io.system_errors import SystemRefusal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the stage does

LOSSLESS = {"JPEG": {"quality": 100}, "PNG": {}, "WEBP": {"lossless": True}}
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def save(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_image_of_the_configured_size_is_unchanged(tmp_path):
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
    assert np.array_equal(read_image(save(tmp_path, Image.fromarray(rgb)), 8), rgb)


def test_grey_and_bilevel_become_three_equal_channels(tmp_path):
    for image, expected in ((Image.fromarray(RAMP), RAMP), (Image.fromarray(RAMP > 100), 255 * (RAMP > 100))):
        pixels = read_image(save(tmp_path, image), 8)
        assert all(np.array_equal(pixels[..., channel], expected) for channel in range(3))


def test_transparent_pixels_become_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 0, 255)
    rgba[4:] = (200, 100, 0, 0)
    pixels = read_image(save(tmp_path, Image.fromarray(rgba)), 8)
    assert (pixels[:4] == (200, 100, 0)).all()
    assert (pixels[4:] == 255).all()


def test_half_transparent_grey_is_mixed_with_white(tmp_path):
    la = np.full((8, 8, 2), (100, 51), np.uint8)  # a fifth of 100 and four fifths of 255: 224
    assert (read_image(save(tmp_path, Image.fromarray(la)), 8) == 224).all()


@pytest.mark.parametrize("transparency", [None, b"\xff\x00"])
def test_palette_is_converted(tmp_path, transparency):
    image = Image.fromarray(np.repeat([[0], [1]], 4, axis=0).astype(np.uint8) * np.ones(8, np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    options = {} if transparency is None else {"transparency": transparency}
    pixels = read_image(save(tmp_path, image, **options), 8)
    assert (pixels[:4] == (10, 20, 30)).all()
    assert (pixels[4:] == ((40, 50, 60) if transparency is None else 255)).all()


def test_cmyk_is_converted(tmp_path):
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    pixels = read_image(save(tmp_path, cmyk, "image.jpg", quality=100), 8).astype(int)
    assert (np.abs(pixels - (255, 0, 0)) <= 3).all()


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    wide = np.full((8, 8), 65535, np.uint16)
    wide[:4] = 257 * 77
    image = Image.fromarray(wide)
    pixels = read_image(save(tmp_path, image, name), 8)
    assert (pixels[:4] == 77).all()
    assert (pixels[4:] == 255).all()


@pytest.mark.parametrize("values", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), -3, np.int32)])
def test_pixels_of_unknown_range_are_rejected(tmp_path, values):
    with pytest.raises(BrokenImageError, match="range is unknown"):
        read_image(save(tmp_path, Image.fromarray(values), "image.tif"), 8)


def test_exif_orientation_turns_the_image_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    path = save(tmp_path, Image.fromarray(RAMP), exif=exif)
    assert np.array_equal(read_image(path, 8)[..., 0], np.rot90(RAMP, -1))


DAMAGED_EXIF = {
    "no TIFF header": b"Exif\x00\x00junkjunkjunkjunk",
    "two bytes": b"Exif\x00\x00MM",
    "cut": b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\x00\x09",
    "a tag of a wrong type": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x1a\x00\x02\x00\x00\x00\x01AAAA",
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_damaged_exif_data_does_not_break_an_image_of_any_format(tmp_path, format, exif):
    path = save(tmp_path, Image.new("L", (8, 8), 90), format=format, exif=exif, **LOSSLESS[format])
    assert (read_image(path, 8) == 90).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientation_beside_a_damaged_tag_is_applied(tmp_path, format):
    # tag 0x0112 (orientation) = 6, then tag 0x011A (a rational) as text: it cannot be written again
    tags = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x01\x1a\x00\x02\x00\x00\x00\x01A\x00\x00\x00"
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + tags + bytes(4)
    halves = Image.fromarray(np.repeat([[0], [255]], 4, axis=0).astype(np.uint8) * np.ones(8, np.uint8))
    pixels = read_image(save(tmp_path, halves, format=format, exif=exif, **LOSSLESS[format]), 8)[..., 0].astype(int)
    assert (pixels[:, :4] > 250).all() and (pixels[:, 4:] < 5).all()  # turned right: the lower half is on the left


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"])
def test_truncated_file_is_broken_in_every_format(tmp_path, format):
    path = save(
        tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), format=format
    )
    read_image(path, 8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenImageError):
        read_image(path, 8)


def test_long_text_chunk_does_not_break_a_png(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    assert (read_image(save(tmp_path, Image.new("L", (8, 8), 90), pnginfo=note), 8) == 90).all()


def test_first_frame_of_an_animation_is_used(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "image.gif", save_all=True, append_images=frames[1:])
    assert (read_image(path, 8) == (255, 0, 0)).all()


def test_the_centre_square_is_kept(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = RAMP
    assert np.array_equal(read_image(save(tmp_path, Image.fromarray(wide)), 8)[..., 0], RAMP)
    assert np.array_equal(read_image(save(tmp_path, Image.fromarray(wide.T)), 8)[..., 0], RAMP.T)


def test_half_size_is_the_crop_resized_bicubically(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8))
    expected = image.crop((0, 8, 16, 24)).resize((8, 8), Image.Resampling.BICUBIC)
    difference = np.abs(read_image(save(tmp_path, image), 8)[2:-2].astype(int) - np.asarray(expected)[2:-2])
    assert difference.max() <= 1  # rows at the border may look one pixel further


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 50_000)])
def test_very_thin_images_are_resized(tmp_path, size):
    pixels = read_image(save(tmp_path, Image.new("RGB", size, (9, 8, 7))), 64)
    assert pixels.shape == (64, 64, 3) and (pixels == (9, 8, 7)).all()


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def half_a_jpeg():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "jpeg")
    return stream.getvalue()[:1500]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not of a known image format"),
        (half_a_jpeg(), "image file is truncated"),
        (png_header(8, 8), "image file is truncated"),
        (png_header(60_000, 60_000), "decompression bomb"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "known image format"),
        (b"GIF89a" + b"\xff" * 50, "."),
        (b"II*\x00\x08\x00\x00\x00" + b"\xff" * 80, "."),
        (b"P5 99999999999 8 255\n", "."),
    ],
    ids=["empty", "html", "half", "no-data", "bomb", "png", "gif", "tiff", "pgm"],
)
def test_reason_of_a_broken_file_omits_its_path(tmp_path, content, reason):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=reason) as caught:
        read_image(path, 8)
    assert str(tmp_path) not in str(caught.value)


def test_missing_file_and_circular_link_are_broken(tmp_path):
    with pytest.raises(BrokenImageError, match="No such file"):
        read_image(tmp_path / "image.png", 8)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(BrokenImageError, match="symbolic links"):
        read_image(tmp_path / "loop.png", 8)


def test_system_error_is_not_blamed_on_the_image(tmp_path):
    path = save(tmp_path, Image.new("L", (8, 8)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(SystemRefusal, match="Too many open files.*ulimit"):
            read_image(path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_system_error_is_not_blamed_on_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", Image.new("L", (8, 8)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for look in (ImageSearch(tmp_path).class_folders, ImageSearch(tmp_path).of_class, has_images, subfolders):
            with pytest.raises(SystemRefusal, match="Too many open files.*ulimit"):
                look(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rows_are_cut_at_the_bottom_before_the_crop(tmp_path):
    tall = np.vstack([RAMP, np.full((20, 8), 255, np.uint8)])
    path = save(tmp_path, Image.fromarray(tall))
    assert np.array_equal(read_image(path, 8, rows_cut=20)[..., 0], RAMP)
    with pytest.raises(BrokenImageError, match="only 28 pixels high"):
        read_image(path, 8, rows_cut=28)
