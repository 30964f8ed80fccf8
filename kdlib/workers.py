"""Processes that train side by side on this machine, and what a forked process must not do."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kdlib import slots

DECIDES_NOTHING = "where a training of one thread runs changes nothing about it"

is_forked = False  # whether this process is a copy of one that may have computed
one_at_a_time = threading.Lock()  # PyTorch's generators are a process's, not a thread's


def _after_fork() -> None:
    global is_forked, one_at_a_time
    is_forked, one_at_a_time = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def count(device: torch.device, threads: int) -> int:
    """How many trainings go side by side on a device.

    More than one only where processes can be forked, since these find a notebook's own networks
    and data in their memory, and only with one thread each: OpenMP's threads do not survive a
    fork, and a forked process that starts them may wait forever.
    """
    is_worker = multiprocessing.parent_process() is not None
    if device.type != "cpu" or threads > 1 or is_worker or torch.cuda.is_available():
        return 1
    return slots.cores() if sys.platform == "linux" and not _autograd_has_threads() else 1


def _autograd_has_threads() -> bool:
    """Whether PyTorch refuses gradients to a forked copy of this process.

    A backward pass starts a thread for each device but the CPU. After torch.export or
    torch.compile there are such devices even on a machine without a GPU, pretended ones.
    """
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # of a thread that has just ended
            if name.read_text().startswith("pt_autograd"):
                return True
    return False


class InTurn(Executor):
    """Calls each function at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def side_by_side(processes: int) -> Iterator[Executor]:
    """An executor of forked processes, which end with this block, and with this process."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _begin, (reader, writer))
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns that a process with threads is forked. Ours compute with one
            # thread, as PyTorch's data loaders do after a fork.
            warnings.filterwarnings(
                "ignore", "This process .* is multi-threaded", DeprecationWarning
            )
            pool.submit(os.getpid)  # starts all processes
        yield pool
        pool.shutdown()
    finally:
        # After an error the workers are in the middle of something: this ends them.
        writer.close()
        pool.shutdown(cancel_futures=True)
        reader.close()


def for_each(job: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """job(task) for every task, in their order: side by side where `count` allows it.

    A job computes with one thread, and returns what can be pickled.
    """
    processes = min(count(torch.device("cpu"), 1), len(tasks))
    if processes < 2:
        return [job(task) for task in tasks]
    with side_by_side(processes) as pool:
        return list(pool.map(job, tasks))


def end_if_broken(pool: Executor) -> None:
    """End a process pool that has lost a worker and has not noticed it.

    Where a worker is killed while it sends a result, Python (as of 3.13) waits for the rest of
    it, forever. When nobody can write into the pipe any more, the pool breaks as it should.
    """
    processes = list((getattr(pool, "_processes", None) or {}).values())
    if any(process.exitcode for process in processes):
        for process in processes:
            process.kill()
        pool._result_queue._writer.close()  # type: ignore[attr-defined]


def _begin(reader: Connection, writer: Connection) -> None:
    """In a new worker, before its first training."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this one
    writer.close()  # so that the parent's end of the pipe is the only one
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()


def _end_with_parent(reader: Connection) -> None:
    # Nothing ever comes through the pipe. It closes when the parent closes it, or is killed, and
    # this process then stops at once: at no moment is anything half-written.
    with contextlib.suppress(EOFError, OSError):
        reader.recv()
    os._exit(1)
