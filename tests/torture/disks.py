"""Disks that are full or read-only, and processes that share a store: nothing finished is lost."""

import contextlib
import ctypes
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers import a_full_disk, blobs, process

import kdlib
from kdlib import data, runs, slots, store
from torture import kills, ordeal
from torture.ordeal import Lost, Tally, Wrong

SIZE = 2**20  # bytes, of the small disk
# From <sched.h> and <sys/mount.h>.
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
PRIVATE, READ_ONLY, REMOUNT = 1 << 18 | 1 << 14, 1, 32


def mount_a_small_disk(place: Path, options: int = 0) -> bool:
    """Mount a small tmpfs that this process alone sees, and that goes with it; or return False.

    A user who is not root becomes one in a namespace of users, where the kernel allows it.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = NEW_MOUNTS | (NEW_USER if os.geteuid() and not options else 0)
        if not options and (libc.unshare(flags) or libc.mount(b"none", b"/", None, PRIVATE, None)):
            return False
        size = f"size={SIZE}".encode()
        return libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", options, size) == 0
    except (OSError, AttributeError):
        return False


def on_a_disk_of_its_own(work: Callable[..., None], folder: Path, *given: Any) -> str:
    """Do some work in a process that has a small disk; how its disk was made small."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    started = process(_on_a_disk, work, folder, writer, *given)
    writer.close()
    try:
        if not reader.poll(ordeal.PATIENCE):
            ordeal.kill(started.pid or 0)
            raise Lost("a call does not end")
        word, content = reader.recv()
    except EOFError:
        raise Lost(f"a process died with {started.exitcode}") from None
    finally:
        started.join()
    if word != "done":
        raise {"Wrong": Wrong}.get(word, Lost)(content)
    return str(content)


def _on_a_disk(work: Callable[..., None], folder: Path, line: Connection, *given: Any) -> None:
    os.setsid()
    slots.cores = lambda: 1
    data.register("blobs", blobs)
    runs.CHECKPOINT_SECONDS = 0.0
    place = folder / "disk"
    place.mkdir()
    is_mounted = mount_a_small_disk(place)
    os.environ["KDLIB_HOME"] = str(place)
    try:
        work(place, is_mounted, *given)
        line.send(("done", "tmpfs" if is_mounted else "a file-size limit"))
    except Exception as error:
        line.send((type(error).__name__, f"{type(error).__name__}: {error}"))


def kind() -> str:
    """What the ordeals of this machine's disks are made of: for the table."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        return on_a_disk_of_its_own(nothing, Path(folder))


def nothing(place: Path, is_mounted: bool) -> None:
    """No work: only the disk is asked for."""


# --- full


def full(rng: random.Random, folder: Path, budget: float) -> Tally:
    """A disk that is full at some moment of a call."""
    return ordeal.repeat(a_full_one, rng, folder, ordeal.times(30, budget))


def a_full_one(rng: random.Random, folder: Path) -> None:
    """Reference bits from a disk with room, then the same call on a full one."""
    recipes, stack = ordeal.recipes(rng), rng.choice([None, 2])
    usual = kills.undisturbed("one", recipes, stack, folder / "undisturbed")
    # At most a little more than the call takes.
    room = rng.randrange(0, 600_000)
    # A disk that is full of checkpoints is never asked to hold a run. Without one, the rest of a
    # stack is trained alone, whose bits are not those of a stack.
    often = rng.choice([0.0, 1e9]) if stack is None else 0.0
    on_a_disk_of_its_own(fill_and_train, folder, recipes, stack, usual.made, room, often)


def fill_and_train(
    place: Path,
    is_mounted: bool,
    recipes: list[kdlib.Recipe],
    stack: int,
    usual: Any,
    room: int,
    often: float,
) -> None:
    """Train as far as the disk allows, make room, and make the same call again.

    often: seconds from checkpoint to checkpoint.
    """
    runs.CHECKPOINT_SECONDS = often
    kdlib.train(recipes[-1], "cpu")
    stored = ordeal.whole()
    with filled(place, room) if is_mounted else a_full_disk(room // 8):
        try:
            kdlib.train_all(recipes, "cpu", stack=stack)
        except store.StoreError as error:
            if "\n" in str(error):
                raise Lost(f"more than one line: {error}") from None
        now = ordeal.whole()
    if not stored <= now:
        raise Lost("a finished run is gone from a full disk")
    again = kdlib.train_all(recipes, "cpu", stack=stack)
    if [ordeal.bits(run) for run in again] != [each for each, _ in usual]:
        raise Wrong("the same call gave other bits")
    if any(not run.cached for run in again if kdlib.keys.key(run.recipe, run.device) in now):
        raise Lost("a finished run was trained again")
    ordeal.tidy()


@contextlib.contextmanager
def filled(place: Path, room: int) -> Iterator[None]:
    """A disk with only some bytes left."""
    filler = place / "filler"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    filler.write_bytes(bytes(max(0, free - room)))
    try:
        yield
    finally:
        filler.unlink()


# --- read-only


def read_only(rng: random.Random, folder: Path, budget: float) -> Tally:
    """A store that can be read and not written, not even by root."""
    return ordeal.repeat(a_read_only_one, rng, folder, ordeal.times(10, budget))


def a_read_only_one(rng: random.Random, folder: Path) -> None:
    """What is stored is given; what is not is refused before it is trained."""
    recipes = ordeal.recipes(rng)
    stored = rng.randrange(1, len(recipes))
    on_a_disk_of_its_own(lock_and_train, folder, recipes, stored)


def lock_and_train(place: Path, is_mounted: bool, recipes: list[kdlib.Recipe], stored: int) -> None:
    """Train some recipes, make the disk read-only, and ask for all of them."""
    before = [ordeal.bits(run) for run in kdlib.train_all(recipes[:stored], "cpu")]
    lock(place, is_mounted)
    try:
        again = kdlib.train_all(recipes[:stored], "cpu")
        if not all(run.cached for run in again) or list(map(ordeal.bits, again)) != before:
            raise Wrong("a read-only store gave other runs")
        for call in (lambda: kdlib.train_all(recipes, "cpu"), store.prune):
            try:
                call()
            except OSError as error:
                said = str(error)
            except store.StoreError as error:
                said = str(error)
            else:
                raise Wrong("a read-only store was written")
            if "\n" in said:
                raise Lost(f"more than one line: {said}")
        ordeal.whole()
    finally:
        unlock(place, is_mounted)


def lock(place: Path, is_mounted: bool) -> None:
    """Make a disk read-only. Root, which no mode stops, is stopped by the mount, or steps down."""
    if is_mounted:
        if not mount_a_small_disk(place, REMOUNT | READ_ONLY):
            raise Lost("the disk cannot be made read-only")
        return
    for path in (place, *place.rglob("*")):
        path.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


def unlock(place: Path, is_mounted: bool) -> None:
    """Undo `lock`, so that the folder can be removed."""
    if is_mounted:
        return
    if os.getuid() == 0:
        os.seteuid(0)
    for folder, _, _ in os.walk(place):
        os.chmod(folder, 0o755)
        for below in Path(folder).iterdir():
            below.chmod(0o755)


# --- several processes on one store


def shared_by_two(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Two processes that train, while a third prunes."""
    return ordeal.repeat(two_at_a_time, rng, folder, ordeal.times(12, budget))


def shared_by_four(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Four processes that train, while a fifth prunes."""
    return ordeal.repeat(four_at_a_time, rng, folder, ordeal.times(12, budget))


def two_at_a_time(rng: random.Random, folder: Path) -> None:
    """See `share`."""
    share(rng, folder, 2)


def four_at_a_time(rng: random.Random, folder: Path) -> None:
    """See `share`."""
    share(rng, folder, 4)


def share(rng: random.Random, folder: Path, count: int) -> None:
    """Calls with the same runs in one store at one time, and pruning in between."""
    recipes = ordeal.recipes(rng)
    usual = kills.undisturbed("one", recipes, None, folder / "undisturbed")
    expected = dict(zip(recipes, (each for each, _ in usual.made or []), strict=True))
    home, lines = folder / "home", []
    for _ in range(count):
        chosen = rng.sample(recipes, rng.randrange(1, len(recipes) + 1))
        reader, writer = multiprocessing.Pipe(duplex=False)
        started = process(kills._train, "one", chosen, None, str(home), writer)
        writer.close()
        lines.append((started, reader, chosen))
    try:
        disturb(rng, lines, expected)
    finally:
        for started, *_ in lines:
            if started.is_alive():
                ordeal.kill(started.pid or 0)
            started.join()
            ordeal.gone(ordeal.of_session(started.pid or 0))
    again = kills.train("one", recipes, None, home)
    if [each for each, _ in again.made or []] != list(expected.values()):
        raise Wrong(f"the same call afterwards: {again.failure or 'other bits'}")
    ordeal.tidy()


def disturb(rng: random.Random, lines: list[Any], expected: dict[Any, str]) -> None:
    """Prune at random moments until some processes have ended, each with the expected bits."""
    until, waiting = time.monotonic() + ordeal.PATIENCE, list(lines)
    while waiting:
        if time.monotonic() > until:
            raise Lost("calls that share a store do not end")
        time.sleep(rng.uniform(0, 0.05))
        if failure := prune(rng):
            raise Lost(f"pruning failed: {failure}")
        waiting = [one for one in waiting if not has_ended(*one, expected)]


def prune(rng: random.Random) -> str:
    """Prune all runs or one, as another process may do at any time; what went wrong."""
    try:
        known = [entry.key for entry in store.stored()]
        if rng.random() < 0.2:
            store.prune(None if rng.random() < 0.5 or not known else [rng.choice(known)])
    except Exception as error:
        return repr(error)
    return ""


def has_ended(started: Any, reader: Connection, chosen: list[Any], expected: Any) -> bool:
    """Take what a process tells; whether it has told all. Lost or Wrong for a bad end."""
    try:
        while reader.poll(0):
            word, content = reader.recv()
            if word == "failed":
                raise Lost(f"beside others a call failed: {content}")
            if word == "made" and [b for b, _ in content] != [expected[r] for r in chosen]:
                raise Wrong("beside others a call gave other bits")
    except (EOFError, OSError):
        if started.join() or started.exitcode:
            raise Lost(f"beside others a call died with {started.exitcode}") from None
        return True
    return False
