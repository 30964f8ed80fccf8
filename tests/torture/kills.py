"""`kill -9` at random moments: the same call then ends with the bits of an undisturbed one."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nbformat
import psutil
from helpers import KDLIB, blobs, process, tiny_book

import kdlib
from kdlib import Recipe, data, runs, slots
from torture import ordeal
from torture.ordeal import Lost, Tally, Wrong

# What changes a folder, as Python's audit hooks name it.
DEEDS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def in_one_process(rng: random.Random, folder: Path, budget: float) -> Tally:
    """A process that trains all by itself."""
    return ordeal.repeat(partial(training, how="one"), rng, folder, ordeal.times(28, budget))


def in_several_processes(rng: random.Random, folder: Path, budget: float) -> Tally:
    """A process whose forked workers train side by side: it or one of them is killed."""
    return ordeal.repeat(partial(training, how="several"), rng, folder, ordeal.times(26, budget))


def in_an_executors_worker(rng: random.Random, folder: Path, budget: float) -> Tally:
    """A worker of an executor; the call that had it says so, and keeps what had arrived."""
    return ordeal.repeat(partial(training, how="executor"), rng, folder, ordeal.times(26, budget))


@dataclass
class Call:
    """What a process told of a call of train_all: its bits, or why it failed."""

    made: list[tuple[str, bool]] | None = None
    failure: str = ""
    deeds: list[int] = field(default_factory=list)
    seconds: float = 0.0


# (how, recipes, stack) -> the call when nobody disturbs it
_undisturbed: dict[Any, Call] = {}


def training(rng: random.Random, folder: Path, how: str) -> int:
    """Kill a call of train_all once, or again and again; then make the same call in peace."""
    recipes, stack = ordeal.recipes(rng), rng.choice([None, 2]) if how != "several" else None
    usual = undisturbed(how, recipes, stack, folder / "undisturbed")
    stored: set[str] = set()
    kills = rng.choice([1, 1, 2, 3])
    for _ in range(kills):
        # Half of the kills come at any moment, half while something is being written.
        at_deed = rng.randrange(len(usual.deeds)) if rng.random() < 0.5 else None
        wait = rng.uniform(0, 0.004 if at_deed is not None else usual.seconds)
        victim = rng.random()
        call = train(how, recipes, stack, folder / "home", Killer(wait, at_deed, victim))
        if call.failure and "a worker failed" not in call.failure:
            raise Lost(f"after a kill the call said: {call.failure}")
        if not stored <= (now := ordeal.whole()):
            raise Lost(f"{len(stored - now)} finished runs are gone after a kill")
        stored = now
    again = train(how, recipes, stack, folder / "home")
    if again.made is None:
        raise Lost(f"the same call again: {again.failure or 'it died'}")
    if [each for each, _ in again.made] != [each for each, _ in usual.made or []]:
        raise Wrong("the same call gave other bits")
    if not stored <= ordeal.whole():
        raise Lost("the same call lost a finished run")
    ordeal.tidy()
    return kills


def undisturbed(how: str, recipes: list[Recipe], stack: int | None, home: Path) -> Call:
    """The call when nobody disturbs it, made once."""
    known = how, *recipes, stack
    if known not in _undisturbed:
        call = train(how, recipes, stack, home)
        if call.made is None:
            raise Lost(f"an undisturbed call: {call.failure or 'it died'}")
        _undisturbed[known] = call
    return _undisturbed[known]


@dataclass
class Killer:
    """When a process is killed: after some seconds, or so long after a deed; and which one.

    victim: from 0 to 1; the first half is the call's own process, the others its workers.
    """

    seconds: float
    deed: int | None
    victim: float

    def kill(self, leader: int, how: str) -> None:
        workers = psutil.Process(leader).children() if how != "one" else []
        # An executor's owner is no part of kdlib: when it dies, its workers may wait forever.
        chosen = [leader] if how != "executor" else []
        if workers and (self.victim > 0.5 or not chosen):
            chosen = [worker.pid for worker in workers]
        if chosen:
            ordeal.kill(chosen[int(self.victim * 1000) % len(chosen)])


def train(
    how: str, recipes: list[Recipe], stack: int | None, home: Path, killer: Killer | None = None
) -> Call:
    """Make a call in a process of its own, perhaps kill it, and see that nothing of it is left."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    started = process(_train, how, recipes, stack, str(home), writer)
    writer.close()
    call, begun = Call(), 0.0
    until = time.monotonic() + ordeal.PATIENCE
    try:
        while (left := until - time.monotonic()) > 0:
            if killer and begun and (killer.deed is None or len(call.deeds) > killer.deed):
                left = min(left, killer.seconds if killer.deed is not None else
                           begun + killer.seconds - time.monotonic())  # fmt: skip
                if left <= 0 or not reader.poll(left):
                    with contextlib.suppress(psutil.Error):
                        killer.kill(started.pid or 0, how)
                    killer = None
                    continue
            if not reader.poll(max(0.0, left)):
                raise Lost(f"a call does not end ({how})")
            word, content = reader.recv()
            if word == "begun":
                begun = time.monotonic()
            elif word == "deed":
                call.deeds.append(content)
            elif word == "made":
                call.made, call.seconds = content, time.monotonic() - begun
            else:
                call.failure = content
    except EOFError:
        pass
    finally:
        if until <= time.monotonic():
            ordeal.kill(started.pid or 0)
        started.join()
        ordeal.gone(ordeal.of_session(started.pid or 0))
    return call


def _train(how: str, recipes: list[Recipe], stack: int | None, home: str, line: Connection) -> None:
    """In a process of its own, whose session tells what belongs to it."""
    os.setsid()
    os.environ["KDLIB_HOME"] = home
    data.register("blobs", blobs)
    runs.CHECKPOINT_SECONDS = 0.0
    slots.cores = lambda: 2 if how == "several" else 1
    # To kdlib this is nobody's worker, and may have workers.
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    options: dict[str, Any] = {"stack": stack}
    with contextlib.ExitStack() as entered:
        if how == "executor":
            context = multiprocessing.get_context("fork")
            options["executor"] = pool = ProcessPoolExecutor(2, context)
            entered.callback(_end, pool)
        sys.addaudithook(partial(_tell, line, home))
        line.send(("begun", None))
        try:
            made = kdlib.train_all(recipes, "cpu", **options)
            line.send(("made", [(ordeal.bits(run), run.cached) for run in made]))
        except Exception as error:
            line.send(("failed", f"{type(error).__name__}: {error}"))


def _end(pool: ProcessPoolExecutor) -> None:
    """End a caller's pool after the call. Its own shutdown, Python's, waits forever where an idle
    worker is killed as it begins: the others wait for a lock that the dead one holds."""
    for worker in list((pool._processes or {}).values()):
        worker.kill()
    pool.shutdown()


def _tell(line: Connection, home: str, event: str, arguments: tuple[Any, ...]) -> None:
    if event in DEEDS and str(arguments[0]).startswith(home):
        # Reading changes nothing.
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        line.send(("deed", os.getpid()))


# --- kdlib run

CELL = """\
import hashlib, kdlib
recipes = [kdlib.Recipe("mlp-8", dataset=dataset, steps=400, seed=seed + n) for n in range(NUMBERS)]
for run in kdlib.train_all(recipes, "cpu"):
    weights = b"".join(weight.numpy().tobytes() for weight in run.weights.values())
    print(run.metrics["test_errors"], hashlib.sha256(weights).hexdigest())
"""


def in_kdlib_run(rng: random.Random, folder: Path, budget: float) -> Tally:
    """`kdlib run` on a book of two tiny chapters: the command or a process of its is killed."""
    return ordeal.repeat(a_run_of_the_book, rng, folder, ordeal.times(20, budget))


_usual: list[tuple[dict[str, str], float]] = []


def a_run_of_the_book(rng: random.Random, folder: Path) -> None:
    """Kill one command, then give the same command in peace."""
    if not _usual:
        book = small_book(folder / "undisturbed")
        command = Command(book, folder / "undisturbed-home", jobs=2)
        started = time.monotonic()
        command.finish()
        _usual.append((pages(book), time.monotonic() - started))
    expected, seconds = _usual[0]
    book, home = small_book(folder / "book"), folder / "home"
    jobs = rng.choice([1, 2])
    command = Command(book, home, jobs)
    time.sleep(rng.uniform(0, seconds))
    victims = [command.process.pid]
    if rng.random() < 0.4:
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(command.process.pid).children(recursive=True)
            victims = [each.pid for each in below] or victims
    ordeal.kill(rng.choice(victims))
    command.end()
    for name, text in pages(book).items():
        if text != expected[name]:
            raise Wrong(f"after the kill the page {name} is not the undisturbed one")
    ordeal.whole()
    again = Command(book, home, jobs)
    again.finish()
    if pages(book) != expected:
        raise Wrong("the same command gave other pages")
    if left := [path.name for path in (book / "_build").glob(".*")]:
        raise Lost(f"left behind: {left}")
    ordeal.tidy()


class Command:
    """`kdlib run`, started; what it starts is known by a mark in its environment."""

    def __init__(self, book: Path, home: Path, jobs: int) -> None:
        self.mark = uuid.uuid4().hex
        own = {"KDLIB_HOME": str(home), "TORTURE_MARK": self.mark}
        with (book.parent / f"log-{self.mark}").open("w+b") as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                [*KDLIB, "run", "--jobs", str(jobs)],
                cwd=book,
                env=os.environ | own,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                # A background job's children would ignore what ends them.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def end(self) -> int:
        """Its exit status, once it and all that it had started have ended."""
        try:
            status = self.process.wait(ordeal.PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Lost("kdlib run does not end") from None
        finally:
            marked = lambda one: one.environ().get("TORTURE_MARK") == self.mark  # noqa: E731
            ordeal.gone(marked)
        return status

    def finish(self) -> None:
        """Lost unless it succeeds."""
        if self.end():
            raise Lost(f"kdlib run failed: {self.log.read_text(errors='replace')[-500:]}")


def small_book(folder: Path) -> Path:
    """A book of two chapters that train, and share a run."""
    chapters = {f"0{n}_chapter": CELL.replace("NUMBERS", str(n + 1)) for n in (1, 2)}
    return tiny_book(folder, {name: [cell] for name, cell in chapters.items()})


def pages(book: Path) -> dict[str, str]:
    """What each executed page prints. Wrong for a page that is not whole."""
    found = {}
    for path in sorted((book / "_build" / "executed").rglob("*.ipynb")):
        try:
            cells = nbformat.read(path, as_version=4).cells
        except Exception as error:
            raise Wrong(f"the page {path.name} is half-written: {error}") from None
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        found[path.stem] = "".join(output.get("text", "") for output in outputs)
    return found
