"""Runs on disk: one folder each, written beside and renamed into place, read with a check."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from kdlib import data

Weights = dict[str, Tensor]


class StoreError(RuntimeError):
    """The store cannot be written or read; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One stored run, as `kdlib runs` lists it. size_bytes: of its folder."""

    key: str
    recipe: dict[str, Any]
    size_bytes: int
    seconds: float
    created: str
    status: str


def put(path: Path, content: bytes) -> None:
    """Write a file beside and rename it into place. Nothing is left where that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _flush(beside, content)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def folder() -> Path:
    """Where the runs live: `runs` in `data.home()`."""
    return data.home() / "runs"


def write(key: str, record: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Store a run under its key; the record as `read` gives it.

    Raises StoreError when the disk is full or read-only.
    """
    from safetensors.torch import save  # a bare machine measures without it

    content = save({name: weight.cpu().contiguous() for name, weight in weights.items()})
    record = record | {"key": key, "weights": hashlib.sha256(content).hexdigest()}
    text = json.dumps({"digest": _digest(record), "run": record}, indent=1)
    beside = folder() / f".{key}.new"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _flush(beside / "weights.safetensors", content)
        _flush(beside / "run.json", text.encode())
        shutil.rmtree(folder() / key, ignore_errors=True)  # a damaged one, if any
        os.replace(beside, folder() / key)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StoreError(
            f"cannot store a run in {folder()} ({error}): make room with `kdlib runs --prune`, "
            "or set KDLIB_HOME to a folder that can be written; what is stored stays"
        ) from error
    return record


def read(key: str) -> tuple[dict[str, Any], Weights] | None:
    """A stored run's record and weights, or None when it is missing or damaged."""
    from safetensors.torch import load

    try:
        saved = json.loads((folder() / key / "run.json").read_bytes())
        content = (folder() / key / "weights.safetensors").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        saved, content = {}, b""
    record = saved.get("run") if isinstance(saved, dict) else None
    if (
        isinstance(record, dict)
        and saved.get("digest") == _digest(record)
        and record.get("key") == key
        and record.get("weights") == hashlib.sha256(content).hexdigest()
    ):
        return record, load(content)
    warnings.warn(f"the stored run {folder() / key} is damaged: made anew", stacklevel=2)
    return None


def stored() -> list[Entry]:
    """All runs in the store, oldest first."""
    entries = []
    for path in folder().glob("[!.]*/run.json"):
        try:
            record = json.loads(path.read_bytes())["run"]
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            entry = Entry(
                path.parent.name,
                record["recipe"],
                size,
                record["seconds"],
                record["provenance"]["date"],
                record["metrics"]["status"],
            )
        except (ValueError, KeyError, TypeError):
            entry = Entry(path.parent.name, {}, 0, 0.0, "", "damaged")
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry.created)


def prune(keys: Iterable[str] | None = None) -> int:
    """Remove runs by key, or with None all runs, checkpoints and leftovers; bytes freed."""
    paths = [folder() / key for key in keys] if keys is not None else list(folder().glob("*"))
    paths = [path for path in paths if path.name != ".locks"]
    freed = 0
    for path in paths:
        if keys is not None and not (path.name.isalnum() and (path / "run.json").is_file()):
            raise StoreError(f"no stored run {path.name!r}: see `kdlib runs`")
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        freed += sum(file.stat().st_size for file in files)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


@contextlib.contextmanager
def locked(keys: Sequence[str]) -> Iterator[None]:
    """Hold some keys, so that a second process waits and then finds the runs made."""
    locks = folder() / ".locks"
    with contextlib.ExitStack() as held:
        try:
            locks.mkdir(parents=True, exist_ok=True)
            for key in sorted(keys):  # in one order everywhere: no deadlock
                held.enter_context(filelock.FileLock(locks / f"{key}.lock"))
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {folder()} ({error}): "
                "set KDLIB_HOME to a folder that can be written"
            ) from error
        yield


def save_checkpoint(keys: Sequence[str], snapshot: dict[str, Any]) -> None:
    """Keep the state of an unfinished group, in place of its last one."""
    path = _checkpoint(keys)
    content = io.BytesIO()
    torch.save({"keys": list(keys), "snapshot": snapshot}, content)
    try:
        put(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    except OSError as error:
        raise StoreError(
            f"cannot write a checkpoint to {path.parent} ({error}): make room, or set "
            "KDLIB_HOME to another folder; the last checkpoint stays"
        ) from error


def load_checkpoint(keys: Sequence[str]) -> dict[str, Any] | None:
    """The state of an unfinished group, tensors on the CPU, or None."""
    saved = _read_checkpoint(_checkpoint(keys))
    return saved["snapshot"] if saved else None


def drop_checkpoint(keys: Sequence[str]) -> None:
    """Forget the state of a group that is finished."""
    _checkpoint(keys).unlink(missing_ok=True)


def unfinished() -> list[list[str]]:
    """The keys of each group that has a checkpoint, in the group's order."""
    found = map(_read_checkpoint, sorted((folder() / ".checkpoints").glob("*.pt")))
    return [saved["keys"] for saved in found if saved]


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise OSError("its bytes have changed")
        return torch.load(  # type: ignore[no-any-return]
            io.BytesIO(content[32:]), map_location="cpu", weights_only=True
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        warnings.warn(f"the checkpoint {path} is damaged ({error}): left out", stacklevel=2)
        return None


def _checkpoint(keys: Sequence[str]) -> Path:
    name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24]
    return folder() / ".checkpoints" / f"{name}.pt"


def _flush(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
