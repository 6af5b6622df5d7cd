"""Where images come from: scikit-learn's digits (the embedded default), CIFAR-10, or a folder of images."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import datasets, seeding
from pipeline.datasets import Images, Source
from pipeline.errors import PipelineError
from pipeline.progress import track

_DIGITS_TEST_FRACTION = 0.2
_DIGITS_SPLIT_SEED = 0  # fixed: every user has the same digits test set
_FOLDER_TEST_FRACTION = 0.2


def digits(image_size: int) -> Source:
    """The 1,797 handwritten digits of the UCI optical recognition set, as scikit-learn ships them.

    8x8 pixels of 0..16 are scaled to 0..255 and resized bicubically; 1,438 train, 359 test, a fixed stratified
    split. Class names are worded to be prompts: "handwritten number 3".
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    resized = [
        np.asarray(Image.fromarray(image).resize((image_size,) * 2, Image.Resampling.BICUBIC)) for image in small
    ]
    images = np.repeat(np.stack(resized)[..., None], 3, axis=3)  # (N, H, W, 3)
    everything = Images.of_one_domain(images, bunch.target.astype(np.int64))
    test_rows = round(_DIGITS_TEST_FRACTION * len(everything))
    rng = seeding.numpy_generator(_DIGITS_SPLIT_SEED, "digits", "train/test split")
    test, train = datasets.stratified_split(everything.labels, test_rows, rng)
    return Source(
        [f"handwritten number {digit}" for digit in range(10)],
        {"train": everything.take(train), "test": everything.take(test)},
        "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    )


def cifar10(root: Path, image_size: int) -> Source:
    """CIFAR-10 by torchvision, downloaded into `root` if it is not there.

    Raises:
        PipelineError: it is not there and cannot be downloaded, or what is there is damaged.
    """
    from torchvision.datasets import CIFAR10

    try:
        halves = {"train": CIFAR10(root, train=True, download=True), "test": CIFAR10(root, train=False)}
    except (OSError, RuntimeError) as error:
        raise PipelineError(
            f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-python.tar.gz there, "
            "or use source: folder"
        ) from None
    splits = {
        split: Images.of_one_domain(_resize_all(half.data, image_size), np.asarray(half.targets, np.int64))
        for split, half in halves.items()
    }
    return Source(list(halves["train"].classes), splits, "see https://www.cs.toronto.edu/~kriz/cifar.html")


def image_folder(root: Path, image_size: int, rng: np.random.Generator) -> Source:
    """Any tree of images in torchvision's ImageFolder layout; a class folder's name is its class name.

    `root` holds either `train/` and `test/` with the same class folders in both, or class folders alone, of which
    one image in five, stratified and drawn by `rng`, becomes the test split. Images are converted to RGB, resized by
    their shorter side and cropped at the centre.

    Raises:
        PipelineError: the folder is missing or empty, the splits' classes differ, or an image is broken (named).
    """
    if not root.is_dir():
        raise PipelineError(f"{root} is not a folder: set prepare_data.path to a tree of <class>/<image> folders")
    if (root / "train").is_dir() and (root / "test").is_dir():
        class_names, train = _read_tree(root / "train", image_size)
        test_names, test = _read_tree(root / "test", image_size)
        if class_names != test_names:
            differing = sorted(set(class_names) ^ set(test_names))
            raise PipelineError(f"{root}: train and test differ in their class folders: {', '.join(differing)}")
    else:
        class_names, everything = _read_tree(root, image_size)
        test_rows = max(1, round(_FOLDER_TEST_FRACTION * len(everything)))
        in_test, in_train = datasets.stratified_split(everything.labels, test_rows, rng)
        train, test = everything.take(in_train), everything.take(in_test)
    return Source(class_names, {"train": train, "test": test}, "unknown: see the folder's own terms")


def _read_tree(root: Path, image_size: int) -> tuple[list[str], Images]:
    """Class names, sorted, and the images of a tree, sorted by path within their class."""
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise PipelineError(f"{root} is not in ImageFolder layout: {error}") from None
    images = np.empty((len(tree), image_size, image_size, 3), np.uint8)
    labels = np.asarray(tree.targets, np.int64)
    for row, (path, _) in enumerate(track(tree.samples, f"read {root.name}", len(tree), "image")):
        images[row] = _read_image(Path(path), image_size)
    return [name.replace("_", " ") for name in tree.classes], Images.of_one_domain(images, labels)


def _read_image(path: Path, image_size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PipelineError(f"{path} is not a readable image ({error}): mend or remove it") from None
    scale = image_size / min(rgb.size)
    if scale != 1:
        rgb = rgb.resize([max(image_size, round(side * scale)) for side in rgb.size], Image.Resampling.BICUBIC)
    left, top = (rgb.width - image_size) // 2, (rgb.height - image_size) // 2
    return np.asarray(rgb.crop((left, top, left + image_size, top + image_size)))


def _resize_all(images: np.ndarray, image_size: int) -> np.ndarray:
    if images.shape[1:3] == (image_size, image_size):
        return images
    sized = [np.asarray(Image.fromarray(image).resize((image_size,) * 2, Image.Resampling.BICUBIC)) for image in images]
    return np.stack(sized)
