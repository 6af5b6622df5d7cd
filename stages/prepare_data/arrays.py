"""Data sets that their release holds as arrays: scikit-learn's digits, and MNIST, USPS, SVHN, CIFAR by torchvision.

Class names are written for use in prompts, in the order of the labels: digits are numbered as they are named (SVHN's
release calls zero 10; torchvision makes it 0), CIFAR's names come from the release's own table. Each function raises
DataError if the data set is not in `root` and cannot be downloaded, or is damaged.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import seeding
from pipeline.data.images import Source, stratified_split
from pipeline.data.lazy_images import ImageArrays, LazyImages
from pipeline.errors import DataError
from pipeline.io.system_errors import SystemRefusal, refusal
from pipeline.settings.params import PrepareData

_DIGITS_TEST_FRACTION = 0.2
_DIGITS_SPLIT_SEED = 0  # fixed: every user has the same digits test set
_NOT_ABOUT_READING = (None, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_HANDWRITTEN = [f"handwritten number {digit}" for digit in range(10)]


def digits(root: Path, params: PrepareData) -> Source:
    """Read the 1,797 handwritten digits of the UCI optical recognition set, as scikit-learn ships them.

    8x8 pixels of 0..16 are scaled to 0..255 and resized bicubically; 1,438 train, 359 test, a fixed stratified
    split. Nothing is read from `root`.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    everything = LazyImages.of(ImageArrays(grey, params.image_size), bunch.target)
    test_rows = round(_DIGITS_TEST_FRACTION * len(everything))
    rng = seeding.numpy_generator(_DIGITS_SPLIT_SEED, "digits", "train/test split")
    test, train = stratified_split(everything.labels, test_rows, rng)
    splits = {"train": everything.take(train), "test": everything.take(test)}
    return Source(_HANDWRITTEN, splits, "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)")


def mnist(root: Path, params: PrepareData) -> Source:
    """Read MNIST: 60,000 and 10,000 grey images of 28x28."""
    from torchvision.datasets import MNIST

    files = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files"
    train, test = _halves(MNIST, "MNIST", root, f"{files} in {root / 'MNIST' / 'raw'}")
    return Source(_HANDWRITTEN, _splits(train, test, params), "CC BY-SA 3.0")


def usps(root: Path, params: PrepareData) -> Source:
    """Read USPS in LIBSVM's form: 7,291 and 2,007 grey images of 16x16."""
    from torchvision.datasets import USPS

    train, test = _halves(USPS, "USPS", root, f"usps.bz2 and usps.t.bz2 in {root}")
    return Source(_HANDWRITTEN, _splits(train, test, params), "unknown: published for research")


def svhn(root: Path, params: PrepareData) -> Source:
    """Read SVHN's cropped digits: 73,257 and 26,032 colour images of 32x32; its easier "extra" images are left out."""
    from torchvision.datasets import SVHN

    read = reader("SVHN", root, f"train_32x32.mat and test_32x32.mat in {root}")
    splits = {}
    for split in ("train", "test"):
        half = read(SVHN, split=split, download=True)
        splits[split] = _split(half.data.transpose(0, 2, 3, 1), half.labels, params)  # (N, C, H, W) -> (N, H, W, C)
    return Source([f"street view house number {digit}" for digit in range(10)], splits, "non-commercial use only")


def cifar10(root: Path, params: PrepareData) -> Source:
    """Read CIFAR-10: 50,000 and 10,000 colour images of 32x32."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", root, params)


def cifar100(root: Path, params: PrepareData) -> Source:
    """Read CIFAR-100 with its 100 fine labels: 50,000 and 10,000 colour images of 32x32."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", root, params)


def reader(title: str, root: Path, what_where: str) -> Callable[..., Any]:
    """Return a function that calls a torchvision data set's class, and turns errors, of many types, into one line."""

    def read(dataset: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return dataset(root, **kwargs)
        except Exception as error:
            if refused := _refusal(error, root):
                raise refused from None
            problem = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{title} is incomplete in {root} and could not be downloaded ({problem}). Put {what_where}."
            ) from error

    return read


def _refusal(error: Exception, root: Path) -> SystemRefusal | None:
    """Return the system's refusal to read a file; errors of the network and of writing belong to the download."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.errno in _NOT_ABOUT_READING:
        return None
    return refusal(error, Path(error.filename or root))


def _cifar(dataset: Any, title: str, root: Path, params: PrepareData) -> Source:
    where = f"{dataset.filename} in {root}, or use prepare_data.source: folder"
    train, test = _halves(dataset, title, root, where)
    names = [name.replace("_", " ") for name in train.classes]
    return Source(names, _splits(train, test, params), "see https://www.cs.toronto.edu/~kriz/cifar.html")


def _halves(dataset: Any, title: str, root: Path, what_where: str) -> tuple[Any, Any]:
    read = reader(title, root, what_where)
    return read(dataset, train=True, download=True), read(dataset, train=False, download=True)


def _splits(train: Any, test: Any, params: PrepareData) -> dict[str, LazyImages]:
    halves = {"train": train, "test": test}
    return {name: _split(np.asarray(half.data), half.targets, params) for name, half in halves.items()}


def _split(images: np.ndarray, labels: Sequence[int], params: PrepareData) -> LazyImages:
    if len(images) != len(labels):
        raise DataError(f"{params.source} has {len(images)} images and {len(labels)} labels. Fetch it again.")
    return LazyImages.of(ImageArrays(images, params.image_size), np.asarray(labels))
