"""kdlib: knowledge distillation in small, for the book that explains it.

Four lines: a teacher, a student, both trained, the test errors read.

    teacher = kdlib.Recipe("mlp-1200x1200", jitter=2, dropout=(0.2, 0.5))
    student = kdlib.Recipe("mlp-800x800")
    distilled = student.distil(teacher, temperature=8).replace(learning_rate=0.03)
    print([run.metrics["test_errors"] for run in kdlib.train_all([student, distilled])])
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

# Before PyTorch is loaded: GNU OpenMP's idle threads spin a fifteenth as often as by default.
# On a shared machine, threads that spin take the core from those that work: a step of a small
# network was measured at up to 30 times its length. Threads that never spin wake too late.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from kdlib import data, evaluate, losses, models
from kdlib.loop import fit
from kdlib.recipe import Recipe
from kdlib.runs import Run, train, train_all
from kdlib.stack import Stack
from kdlib.weights import pretrained

__all__ = [
    "Recipe", "Run", "Stack", "data", "evaluate", "fit", "losses", "models", "pretrained",
    "train", "train_all",
]  # fmt: skip


class _Moved(ModuleType):
    """A module under its old name, for this version: it moved into the press, `kdlib.book`."""

    def __getattr__(self, name: str) -> Any:
        # Whoever walks through all modules looks for `__file__` and the like: that must not
        # import the press, and matplotlib and IPython with it.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self.__doc__ or ""), name)


for _old, _new in {"notebook": "page", "plots": "plots", "reference": "reference"}.items():
    globals()[_old] = sys.modules[f"kdlib.{_old}"] = _Moved(f"kdlib.{_old}", f"kdlib.book.{_new}")
