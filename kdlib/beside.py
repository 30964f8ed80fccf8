"""Trainings side by side on one computer: small networks do not fill several cores.

Processes are forked: they find recipes, teachers and networks of a notebook's own in their
memory. Each computes with one thread, as PyTorch's own data loaders do after a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch


def processes(device: torch.device) -> int:
    """How many trainings go side by side on a device: one a thread of a CPU, else one."""
    alone = multiprocessing.parent_process() is None and not torch.cuda.is_available()
    if device.type == "cpu" and sys.platform == "linux" and alone:
        return torch.get_num_threads()
    return 1  # elsewhere a process that has computed cannot be forked


@contextlib.contextmanager
def threads(helpers: int) -> Iterator[None]:
    """Compute with one thread where there are several helpers, as each of them does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if helpers > 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(function: Callable[[int], Any], count: int, helpers: int) -> Iterator[tuple[int, Any]]:
    """(n, function(n)) for n in 0 … count - 1, as they come, from forked processes.

    Raises what the function raises; RuntimeError when a process dies. The others are then
    stopped, as they are when the caller is interrupted, or dies.
    """
    context = multiprocessing.get_context("fork")
    working: dict[Any, Any] = {}
    try:
        for first in range(min(helpers, count)):
            reader, writer = context.Pipe(duplex=False)
            numbers = range(first, count, helpers)
            arguments = (function, numbers, writer, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            writer.close()  # so that the process's end is the pipe's end
            working[reader] = process
        while working:
            ready: list[Any] = wait(list(working))
            for reader in ready:
                try:
                    number, result, error = reader.recv()
                except EOFError:
                    _ended(working.pop(reader))
                    continue
                if error is not None:
                    raise error
                yield number, result
    finally:
        for process in working.values():
            process.kill()
            process.join()


def _work(function: Callable[[int], Any], numbers: range, writer: Connection, parent: int) -> None:
    """In a process of its own: the calls of some numbers, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends this one
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    for number in numbers:
        try:
            writer.send((number, function(number), None))
        except Exception as error:
            writer.send((number, None, error))


def _ended(process: BaseProcess) -> None:
    """RuntimeError for a process that did not end by itself."""
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"a training's process ended with {process.exitcode}: what was trained before is "
            "stored, and the same call goes on from there"
        )


def _leave_with(parent: int) -> None:
    """End this process soon after its parent: nothing is half-written at any moment."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
