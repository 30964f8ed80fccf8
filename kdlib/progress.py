"""Progress bars, in a terminal only: a notebook's page would keep them as text."""

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any

DECIDES_NOTHING = "it only shows how far a training is"


def _is_quiet() -> bool:
    # The bars of several processes would overwrite one another.
    return not sys.stderr.isatty() or multiprocessing.parent_process() is not None


@contextlib.contextmanager
def of_a_training(model: str, runs: int) -> Iterator[Callable[[Any], None]]:
    """One bar for a group of runs; the function that it gives shows a `loop.State`."""
    # Imported here, since `kdlib.fit` alone needs no bars.
    from tqdm import tqdm

    name = f"{model}, {runs} run{'s'[: runs > 1]}"
    with tqdm(desc=name, unit="step", disable=_is_quiet(), leave=False) as bar:

        def show(state: Any) -> None:
            bar.total = state.steps * runs
            last = {name: values[-1] for name, values in state.curves.items() if name != "step"}
            mean = {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in last.items()}
            bar.set_postfix({name: f"{value:.4g}" for name, value in mean.items()}, refresh=False)
            bar.update(state.step * runs - bar.n)

        yield show


@contextlib.contextmanager
def of_groups(groups: int, at_a_time: int) -> Iterator[Callable[[int], None]]:
    """One bar for groups trained side by side; the function that it gives counts a run, with its
    test errors. One at a time, each has a bar of its own."""
    from tqdm import tqdm

    quiet = _is_quiet() or at_a_time == 1
    name = f"{groups} trainings, {at_a_time} at a time"
    with tqdm(desc=name, total=groups, disable=quiet, leave=False) as bar:

        def count(errors: int) -> None:
            bar.set_postfix(errors=errors, refresh=False)
            bar.update()

        yield count
