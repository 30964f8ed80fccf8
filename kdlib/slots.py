"""The cores of this machine, shared by the processes of one command."""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

DECIDES_NOTHING = "when a training starts changes nothing about it"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def taken(threads: int) -> Iterator[None]:
    """Hold as many cores as a training has threads.

    Chapters that run side by side each start trainings of their own. So many at once would take
    far longer than in turn, so they share a folder, named by KDLIB_SLOTS, with one lock file per
    core. Without that variable there is nothing to share, and nothing is held.
    """
    folder = os.environ.get("KDLIB_SLOTS")
    if not folder:
        yield
        return
    import filelock

    wanted = min(threads, cores())
    while True:
        with contextlib.ExitStack() as held:
            free = [filelock.FileLock(Path(folder) / f"core-{n}.lock") for n in range(cores())]
            random.shuffle(free)
            got = 0
            for lock in free:
                with contextlib.suppress(filelock.Timeout):
                    held.enter_context(lock.acquire(timeout=0))
                    got += 1
                if got == wanted:
                    yield
                    return
        # All or none: two trainings that each wait for the other's core would wait forever.
        time.sleep(random.uniform(0.02, 0.1))
