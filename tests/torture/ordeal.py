"""What all ordeals share: how a try is judged, what a training gives, what may be left behind."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from helpers import blobs

import kdlib
from kdlib import Recipe, data, store

# Seconds after which a call that does not end is given up.
PATIENCE = 120.0


class Tally(NamedTuple):
    """What an ordeal found: how often it was tried, and how that ended."""

    tried: int
    survived: int
    lost: int
    wrong: int


class Lost(Exception):
    """A finished run is gone, a call does not end well, or something is left behind."""


class Wrong(Exception):
    """A result that differs from the undisturbed one, is stale or half-written."""


def repeat(
    trial: Callable[[random.Random, Path], Any], rng: random.Random, folder: Path, times: int
) -> Tally:
    """Make a trial as often, each with random numbers and a folder of its own.

    A trial raises Lost or Wrong; it may return how many tries it was.
    """
    tried = lost = wrong = 0
    name = getattr(trial, "func", trial).__name__
    while tried < times:
        seed = rng.getrandbits(32)
        place = folder / f"{name}-{tried}"
        place.mkdir(parents=True)
        os.environ["KDLIB_HOME"] = str(place / "home")
        tries = 1
        try:
            tries = trial(random.Random(seed), place) or 1
        except Wrong as found:
            wrong += 1
            say(f"WRONG in {name}, seed {seed}: {found}")
        except Lost as found:
            lost += 1
            say(f"LOST in {name}, seed {seed}: {found}")
        # Whatever else goes wrong in a trial is a loss, and no reason to leave out the others.
        except Exception:
            lost += 1
            say(f"LOST in {name}, seed {seed}:\n{traceback.format_exc()}")
        tried += tries
        shutil.rmtree(place, ignore_errors=True)
    return Tally(tried, tried - lost - wrong, lost, wrong)


def times(count: int, budget: float) -> int:
    """How often something is tried: `count` times in a torture of full length."""
    return max(1, round(count * budget))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- small trainings and their bits


def recipes(rng: random.Random) -> list[Recipe]:
    """A student, its teacher and a third run: seconds together, drawn from a few families."""
    data.register("blobs", blobs)
    seed = rng.randrange(3)
    plain = Recipe(
        "mlp-16", dataset="blobs", steps=rng.choice([150, 300]), batch_size=20, seed=seed,
        dropout=rng.choice([(0.0, 0.0), (0.1, 0.3)]), jitter=rng.choice([0, 1]),
    )  # fmt: skip
    taught = plain.replace(model="mlp-12", seed=7).distil(plain, temperature=3.0)
    return [taught, plain.replace(seed=seed + 10), plain.replace(seed=seed + 20)]


def bits(run: kdlib.Run) -> str:
    """A digest of all that a run holds, but for its time and place."""
    digest = hashlib.sha256(repr((run.recipe, run.curves, run.metrics)).encode())
    for name, weight in sorted(run.weights.items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- what is in a store, and what is left behind


def whole() -> set[str]:
    """The keys of the stored runs. Wrong where one of them, or a checkpoint, is not whole."""
    keys = {path.name for path in store.folder().glob("[!.]*")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            broken = [key for key in keys if store.read(key) is None]
            store.unfinished()
        except UserWarning as warning:
            raise Wrong(f"half-written: {warning}") from None
    if broken:
        raise Wrong(f"half-written: runs {broken}")
    return keys


def tidy() -> None:
    """Lost unless a store holds finished runs and nothing else. Lock files stay by design."""
    places = [path for path in store.folder().rglob("*") if ".locks" not in path.parts]
    left = [path for path in places if path.is_file() and path.parent.name not in whole()]
    left += [path for path in store.folder().glob(".*") if path.suffix == ".new"]
    if left:
        raise Lost(f"left behind: {[str(path.relative_to(store.folder())) for path in left]}")


def gone(which: Callable[[psutil.Process], bool]) -> None:
    """Wait until some processes have ended. Lost, and ends them, if they do not."""
    started = time.monotonic()
    while left := list(_alive(which)):
        if time.monotonic() - started > 30:
            for process in left:
                process.kill()
            raise Lost(f"left behind: processes {[process.name() for process in left]}")
        time.sleep(0.02)


def _alive(which: Callable[[psutil.Process], bool]) -> Iterable[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and which(process):
                yield process
        # It has ended meanwhile, or is another user's.
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue


def of_session(leader: int) -> Callable[[psutil.Process], bool]:
    """Whether a process belongs to the session that a process has begun."""
    return lambda process: os.getsid(process.pid) == leader


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
