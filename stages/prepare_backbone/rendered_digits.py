"""The public text-to-image corpus that tiny-sd is trained on: digits rendered from free fonts.

Glyphs 0-9 of the DejaVu and STIX fonts that matplotlib ships, bent by a random affine map and an elastic
displacement field (Simard et al., ICDAR 2003), thickened or thinned, then blurred through a random coarse grid like a
scan. It contains no image of a federated data set and is rendered in a minute, but it has nothing but digits.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

IMAGE_SIZE = 32
CLASS_NAMES = [f"handwritten number {digit}" for digit in range(10)]

_CANVAS = 48  # glyphs are drawn and bent on a larger canvas, then reduced
_FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
)  # fmt: skip


def render_digits(num_images: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    """Yield `num_images` pairs of an image, uint8 (32, 32, 3), white on black, and its digit, 0 to 9."""
    for _ in range(num_images):
        digit = int(rng.integers(10))
        glyph = _glyph(digit, _FONTS[rng.integers(len(_FONTS))])
        image = _coarsen(_weight(_bend(glyph, rng), rng), rng)
        yield np.repeat((np.clip(image, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2), digit


@cache
def _glyph(digit: int, font_file: str) -> np.ndarray:
    """Draw a digit, scaled to a common height and centred: float32 (48, 48) in [0, 1]."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font_file
    font = ImageFont.truetype(str(path), 64)
    left, top, right, bottom = font.getbbox(str(digit))
    glyph = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), str(digit), fill=255, font=font)
    height = 32
    width = max(4, round(glyph.width * height / glyph.height))
    glyph = glyph.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(glyph, ((_CANVAS - width) // 2, (_CANVAS - height) // 2))
    return np.asarray(canvas, np.float32) / 255


def _bend(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a random affine map (rotation, shear, scale, shift) and a smooth elastic displacement."""
    angle, shear = rng.normal(0, 0.14), rng.normal(0, 0.18)
    scale_y, scale_x = rng.uniform(0.82, 1.12), rng.uniform(0.7, 1.25)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, 0], [shear, 1]]) @ np.diag([1 / scale_y, 1 / scale_x])
    centre = (_CANVAS - 1) / 2
    grid = np.stack(np.meshgrid(*2 * [np.arange(_CANVAS)], indexing="ij")).astype(np.float64) - centre
    shift = rng.normal(0, 1.2, size=(2, 1, 1))
    displacement = rng.uniform(-1, 1, size=grid.shape)
    displacement = ndimage.gaussian_filter(displacement, sigma=(0, 5, 5)) * rng.uniform(0, 45)
    source = np.einsum("ij,jhw->ihw", matrix, grid) + centre + shift + displacement
    return ndimage.map_coordinates(glyph, source, order=1)


def _weight(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary the pen: the stroke is blurred and cut at a random level, so that it grows or shrinks."""
    blurred = ndimage.gaussian_filter(image, rng.uniform(0.8, 2.0))
    level = rng.uniform(0.02, 0.3)
    return np.clip((blurred - level) * rng.uniform(2, 6), 0, 1) * rng.uniform(0.75, 1)


def _coarsen(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reduce to a random grid of 8 to 16 pixels per side and back to 32: the blur of a low-resolution scan."""
    crop = Image.fromarray(image[6:-6, 6:-6])  # (36, 36)
    grid = int(rng.integers(8, 17))
    coarse = crop.resize((grid, grid), Image.Resampling.BOX)
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
