"""kdlib: knowledge distillation in small, for the book that explains it.

Four lines: a teacher, a student, both trained, the test errors read.

    teacher = kdlib.Recipe("mlp-1200x1200", jitter=2, dropout=(0.2, 0.5))
    student = kdlib.Recipe("mlp-800x800")
    distilled = student.distil(teacher, temperature=8).replace(learning_rate=0.03)
    print([run.metrics["test_errors"] for run in kdlib.train_all([student, distilled])])
"""

import os

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
