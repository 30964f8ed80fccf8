"""Systems take turns: A B C, A B C, …, each in a process of its own, one at work at a time."""

import contextlib
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems import SYSTEMS, Job, Training, network
from kdlib import data, loop


@dataclass
class Result:
    """What a job gave: seconds of each turn, test errors of each run, what it noted."""

    job: Job
    seconds: list[float] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def step(self) -> float:
        """Seconds of one step of one run: the median of the turns, without the warm-up."""
        return statistics.median(self.seconds) / self.job.every / self.job.runs


def take(jobs: Sequence[Job], device: str, teachers: Path) -> list[Result]:
    """Results of jobs that train side by side, turn by turn. A failure is one of them."""
    results = [Result(job) for job in jobs]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_start(job, device, teachers)) for job in jobs]
        going = [pair for pair in zip(results, workers, strict=True) if _receive(*pair) == "ready"]
        while going:
            for result, worker in list(going):
                worker.send("go")
                if _receive(result, worker) != "turn":
                    going.remove((result, worker))
    for result in results:
        result.seconds = result.seconds[1:]  # the first turn was the warm-up
    return results


@dataclass
class Workers:
    """The processes of a job as one: sent each word together, and as slow as the slowest."""

    lines: list[Connection]

    def send(self, word: str) -> None:
        """Tell all of them."""
        for line in self.lines:
            line.send(word)

    def recv(self) -> tuple[str, Any]:
        """What all of them say; a failure before anything else."""
        said = [line.recv() for line in self.lines]
        word, content = min(said, key=lambda one: one[0] != "failed")
        if word == "turn":
            content = max(seconds for _, seconds in said)
        elif word == "done":
            content = [wrong for _, (errors, _) in said for wrong in errors], content[1]
        return word, content


@contextlib.contextmanager
def _start(job: Job, device: str, teachers: Path) -> Iterator[Workers]:
    """Processes that wait for their turns, each with a share of the runs; gone at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.turns"])  # PyTorch is imported once, not run
    share = job.runs // job.processes
    threads = (job.threads or torch.get_num_threads()) // job.processes
    group, processes = Workers([]), []
    for number in range(job.processes):
        here, there = context.Pipe()
        part = replace(job, runs=share, seed=job.seed + number * share, processes=1)
        given = (there, part, device, teachers, max(1, threads))
        process: BaseProcess = context.Process(target=work, args=given)
        process.start()
        there.close()  # so that the end of the process is noticed
        group.lines.append(here)
        processes.append(process)
    try:
        yield group
    finally:
        for line in group.lines:
            line.close()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(result: Result, worker: Workers) -> str:
    """The worker's next word, what comes with it noted down."""
    try:
        word, content = worker.recv()
    except EOFError:
        word, content = "failed", "the process died: out of memory?"
    if word == "turn":
        result.seconds.append(content)
    elif word == "done":
        result.errors, result.note = content
    elif word == "failed":
        result.failure = content
    return str(word)


def work(line: Connection, job: Job, device: str, teachers: Path, threads: int) -> None:
    """In a process of its own: train, stopping after each turn until told to go on."""
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            content = _train(line, job, torch.device(device), teachers)
            told = {str(w.message).splitlines()[0] for w in said if w.category is UserWarning}
        content[1]["warnings"] = sorted(told)
        line.send(("done", content))
    except (EOFError, BrokenPipeError):  # nobody listens any more
        return
    except Exception:
        line.send(("failed", traceback.format_exc()))


def _train(
    line: Connection, job: Job, device: torch.device, teachers: Path
) -> tuple[list[int], dict[str, Any]]:
    dataset = data.load(job.task.dataset, device)
    started = 0.0

    def after(step: int) -> bool:
        nonlocal started
        if step % job.every == 0:
            line.send(("turn", time.perf_counter() - started))
            line.recv()
            started = time.perf_counter()
        return step >= job.steps

    training = Training(job, dataset, teacher(job.task.teacher, teachers).to(device), device, after)
    line.send(("ready", None))
    line.recv()
    started = time.perf_counter()
    students = SYSTEMS[job.system](training)
    test = dataset.test
    errors = [loop.count_errors(one.eval(), test.images, test.labels) for one in students]
    return errors, training.note | {"threads": torch.get_num_threads()}


def teacher(name: str, folder: Path) -> torch.nn.Module:
    """A trained teacher, from the folder where the caller put its weights."""
    made = network(name, 0).eval().requires_grad_(False)
    made.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return made
