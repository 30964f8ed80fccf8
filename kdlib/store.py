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
from typing import Any, BinaryIO

import filelock
import torch
from torch import Tensor

from kdlib import files

DECIDES_NOTHING = "it keeps what was trained, and checks that it is read as it was written"

Weights = dict[str, Tensor]


class StoreError(RuntimeError):
    """The store cannot be written or read; the message suggests what to do."""


@dataclass(frozen=True)
class Entry:
    """One stored run, as `kdlib runs` lists it. size_bytes: of its folder."""

    key: str
    recipe: dict[str, Any]
    size_bytes: int
    seconds: float
    created: str
    status: str


def folder() -> Path:
    """The folder of the runs: `runs` in `files.home()`."""
    return files.home() / "runs"


def write(key: str, record: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Store a run under its key; returns the record as `read` gives it.

    Raises StoreError when the disk is full or read-only.
    """
    from safetensors.torch import save

    # A copy of each: safetensors refuses tensors that share memory, as tied weights and views do.
    content = save({name: weight.cpu().contiguous().clone() for name, weight in weights.items()})
    record = record | {"key": key, "weights": hashlib.sha256(content).hexdigest()}
    text = json.dumps({"digest": files.digest(record), "run": record}, indent=1)
    beside = folder() / f".{key}.new"
    try:
        with _alone():
            # What a process left that was killed here; its lock is ours now.
            shutil.rmtree(beside, ignore_errors=True)
            files.put(beside / "weights.safetensors", content)
            files.put(beside / "run.json", text.encode())
            # Whatever has the key's name is damaged, or the run would not have been trained.
            shutil.rmtree(folder() / key, ignore_errors=True)
            beside.replace(folder() / key)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _error(
            "cannot store a run", error, "make room with `kdlib runs --prune`; what is stored stays"
        ) from error
    return record


def read(key: str) -> tuple[dict[str, Any], Weights] | None:
    """A stored run's record and weights, or None if it is missing or damaged."""
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
        and saved.get("digest") == files.digest(record)
        # A folder that was renamed or copied holds another recipe's run.
        and record.get("key") == key
        and record.get("weights") == hashlib.sha256(content).hexdigest()
    ):
        # safetensors gives them in another order each time.
        return record, dict(sorted(load(content).items()))
    warnings.warn(f"the stored run {folder() / key} is damaged: it is trained again", stacklevel=2)
    return None


def stored() -> list[Entry]:
    """All runs in the store, oldest first."""
    found = filter(None, map(_entry, folder().glob("[!.]*/run.json")))
    return sorted(found, key=lambda entry: entry.created)


def _entry(path: Path) -> Entry | None:
    """A run as it is listed; None if another process has removed it."""
    try:
        saved = json.loads(path.read_bytes())
        record = saved["run"]
        if saved["digest"] != files.digest(record):
            raise ValueError
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        date, status = record["provenance"]["date"], record["metrics"]["status"]
        return Entry(path.parent.name, record["recipe"], size, record["seconds"], date, status)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Entry(path.parent.name, {}, 0, 0.0, "", "damaged")


def prune(keys: Iterable[str] | None = None) -> int:
    """Remove runs by key, or with None all runs, checkpoints and leftovers; bytes freed."""
    freed = 0
    with _alone():
        paths = [folder() / key for key in keys] if keys is not None else list(folder().glob("*"))
        for path in paths:
            # A key comes from the command line: nothing but a run's own folder is ever removed.
            is_run = path == folder() / path.name and (path / "run.json").is_file()
            if keys is not None and not (path.name.isalnum() and is_run):
                raise StoreError(f"no stored run {path.name!r}: see `kdlib runs`")
            # Another process may hold a lock.
            if path.name == ".locks":
                continue
            below = [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
            freed += sum(file.stat().st_size for file in below)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the store for a moment: what is being written is not pruned as a leftover."""
    locks = folder() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(locks / "store.lock"):
        yield


@contextlib.contextmanager
def locked(keys: Sequence[str]) -> Iterator[None]:
    """Hold some keys, so that a second process waits and then finds the runs."""
    locks = folder() / ".locks"
    with contextlib.ExitStack() as held:
        try:
            locks.mkdir(parents=True, exist_ok=True)
            # In one order everywhere: two processes cannot wait for each other.
            for key in sorted(keys):
                held.enter_context(filelock.FileLock(locks / f"{key}.lock"))
        except OSError as error:
            raise _error("cannot write to the store", error, "nothing was trained") from error
        yield


def save_checkpoint(keys: Sequence[str], snapshot: dict[str, Any]) -> None:
    """Keep the state of an unfinished group, in place of its previous one."""
    content = io.BytesIO()
    torch.save(snapshot, content)
    state = content.getvalue()
    digest = hashlib.sha256(state).hexdigest()
    # In a line of its own: what a checkpoint is of can be read without its weights.
    head = json.dumps({"keys": list(keys), "bytes": len(state), "digest": digest})
    try:
        with _alone():
            files.put(_checkpoint(keys), head.encode() + b"\n" + state)
    except OSError as error:
        raise _error(
            "cannot write a checkpoint", error, "make room; the last checkpoint stays"
        ) from error


def load_checkpoint(keys: Sequence[str]) -> dict[str, Any] | None:
    """The state of an unfinished group, tensors on the CPU, or None."""
    path = _checkpoint(keys)
    try:
        with path.open("rb") as file:
            head, state = _head(path, file), file.read()
        # PyTorch's own format does not notice a changed byte among the weights.
        if hashlib.sha256(state).hexdigest() != head.get("digest"):
            raise ValueError("its bytes have changed")
        return torch.load(  # type: ignore[no-any-return]
            io.BytesIO(state), map_location="cpu", weights_only=True
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGE as error:
        _leave_out(path, error)
        return None


def drop_checkpoint(keys: Sequence[str]) -> None:
    """Forget the state of a group that is finished."""
    path = _checkpoint(keys)
    # With what processes left that were killed while they wrote it.
    for file in (path, *path.parent.glob(f".{path.name}.*.new")):
        file.unlink(missing_ok=True)


def unfinished() -> list[list[str]]:
    """The keys of each group that has a checkpoint, in the group's order."""
    found = []
    for path in sorted((folder() / ".checkpoints").glob("*.pt")):
        try:
            with path.open("rb") as file:
                found.append(_head(path, file)["keys"])
        except FileNotFoundError:  # its group is finished
            continue
        except _DAMAGE as error:
            _leave_out(path, error)
    return found


_DAMAGE = OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError


def _head(path: Path, file: BinaryIO) -> dict[str, Any]:
    """A checkpoint's first line; `file` is then at its state. One of _DAMAGE if it is none."""
    line = file.readline()
    head: dict[str, Any] = json.loads(line)
    if (
        len(line) + head["bytes"] != os.fstat(file.fileno()).st_size
        or _checkpoint(head["keys"]) != path
    ):
        raise ValueError("it is cut short or changed")
    return head


def _leave_out(path: Path, error: Exception) -> None:
    warnings.warn(
        f"the checkpoint {path} is damaged or of another version ({error}): left out; "
        "`kdlib runs --prune` removes it",
        stacklevel=3,
    )


def _checkpoint(keys: Sequence[str]) -> Path:
    return folder() / ".checkpoints" / f"{files.digest(list(keys))[:24]}.pt"


def _error(problem: str, cause: OSError, remedy: str) -> StoreError:
    return StoreError(
        f"{problem} in {folder()} ({cause}): {remedy}, or set KDLIB_HOME to a folder that can be "
        "written"
    )
