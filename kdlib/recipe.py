"""Recipe: everything that decides a trained network, checked when it is made."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from kdlib import data, loop, models, precision


@dataclass(frozen=True)
class Recipe:
    """A trained network as a value: the same recipe gives the same weights.

    model: a name for `models.build`. dataset: a name for `data.load`.
    epochs: passes over the training samples; steps, where given, counts batches instead.
    batch_size: samples a step. learning_rate: its peak. momentum: Nesterov's, its last value.
    schedule: "one-cycle", "cosine", "constant" or "classic" (see `loop.SCHEDULES`).
    dropout: the chances of dropping an input pixel and a hidden unit (mlp models).
    max_norm: the greatest length of a hidden unit's incoming weights (L2, not squared).
    jitter: each image is moved by up to so many pixels, anew in each pass.
    fraction, omit, subset_seed: a stratified part of the training set, without some classes.
    validation: train without the held-out sixth and count errors on it; else train on all.
    teacher, temperature, hard_weight: recipes of the teachers (several are averaged by
    their logits) and the distillation loss; without a teacher, hard targets alone.
    precision: "fp32", "bf16" (autocast, where the processor is fast at it), "tf32", "fp64".
    seed: decides the initial weights, the order of the samples, the jitter and the dropout.

    Raises ValueError or TypeError that names the field, its value and what was expected.
    """

    model: str
    dataset: str = "mnist"
    epochs: float = 10
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    schedule: str = "one-cycle"
    dropout: tuple[float, float] = (0.0, 0.0)
    max_norm: float | None = None
    jitter: int = 0
    fraction: float = 1.0
    omit: tuple[int, ...] = ()
    subset_seed: int = 0
    validation: bool = False
    teacher: tuple["Recipe", ...] = ()
    temperature: float = 1.0
    hard_weight: float = 1.0
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("dropout", "omit", "teacher"):  # lists, as papermill gives them
            value = getattr(self, field)
            if isinstance(value, Recipe):
                value = (value,)
            if isinstance(value, list | tuple):
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.omit, tuple) and all(map(_whole(0), self.omit)):
            object.__setattr__(self, "omit", tuple(sorted(set(self.omit))))
        for field, (expected, holds) in _EXPECTED.items():
            value = getattr(self, field)
            if not holds(value):
                raise ValueError(f"{field} is {value!r}: expected {expected}")
        if self.model not in models.names() and models.widths(self.model) is None:
            models.build(self.model)  # raises with the names that there are
        if any(self.dropout) and models.widths(self.model) is None:
            raise ValueError(
                f"dropout is {self.dropout} but model {self.model!r} has none: use an mlp model"
            )
        if not self.teacher and self.hard_weight != 1:
            raise ValueError(
                f"hard_weight is {self.hard_weight} but there is no teacher: "
                "use recipe.distil(teacher, temperature=…, hard_weight=…)"
            )

    def replace(self, **changes: Any) -> Self:
        """The same recipe but for some fields."""
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"a recipe has no field {sorted(unknown)[0]!r}")
        return dataclasses.replace(self, **changes)

    def distil(self, *teachers: "Recipe", temperature: float, hard_weight: float = 0.0) -> Self:
        """The same student, taught by teachers: at a temperature, with a hard_weight."""
        if not teachers:
            raise ValueError("distil() got no teacher: expected one or more recipes")
        return self.replace(teacher=teachers, temperature=temperature, hard_weight=hard_weight)

    @property
    def key(self) -> str:
        """A digest of all fields, teachers included: 16 hexadecimal digits."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, for `from_dict`."""
        fields = dataclasses.asdict(self)
        floats = (
            "epochs",
            "learning_rate",
            "momentum",
            "fraction",
            "temperature",
            "hard_weight",
        )
        fields |= {name: float(fields[name]) for name in floats}  # 1 and 1.0 are one recipe
        fields["teacher"] = [teacher.as_dict() for teacher in self.teacher]
        fields["dropout"] = [float(chance) for chance in self.dropout]
        fields["max_norm"] = None if self.max_norm is None else float(self.max_norm)
        fields["omit"] = list(self.omit)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A recipe from what `as_dict` gave."""
        teachers = tuple(cls.from_dict(teacher) for teacher in fields.get("teacher", ()))
        return cls(**{**fields, "teacher": teachers})


def _number(low: float, high: float = math.inf, *, open_low: bool = True) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        above = real and (low < value if open_low else low <= value)
        return bool(above and value <= high and math.isfinite(value))

    return holds


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _one_of(*values: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(values)}", lambda value: value in values


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_chance = _number(0, 0.999, open_low=False)
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("the name of a model", _is(str)),
    "dataset": (
        "the name of a dataset that data.names() lists",
        lambda value: value in data.names(),
    ),
    "epochs": ("a finite number above 0", _number(0)),
    "steps": ("None or a whole number, 1 or more", lambda v: v is None or _whole(1)(v)),
    "batch_size": ("a whole number, 1 or more", _whole(1)),
    "learning_rate": ("a finite number above 0", _number(0)),
    "momentum": ("a number in [0, 1)", _chance),
    "schedule": _one_of(*loop.SCHEDULES),
    "dropout": (
        "two chances in [0, 1), of the input and of hidden units",
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_chance, value)),
    ),
    "max_norm": ("None or a finite number above 0", lambda v: v is None or _number(0)(v)),
    "jitter": ("a whole number of pixels, 0 to 27", _whole(0, 27)),
    "fraction": ("a number in (0, 1]", _number(0, 1)),
    "omit": (
        "a tuple of class numbers",
        lambda value: isinstance(value, tuple) and all(map(_whole(0), value)),
    ),
    "subset_seed": ("a whole number, 0 or more", _whole(0, 2**62)),
    "validation": ("True or False", _is(bool)),
    "teacher": (
        "recipes",
        lambda value: isinstance(value, tuple) and all(map(_is(Recipe), value)),
    ),
    "temperature": ("a finite number above 0", _number(0)),
    "hard_weight": ("a number in [0, 1]", _number(0, 1, open_low=False)),
    "precision": _one_of(*precision.PRECISIONS),
    "seed": ("a whole number, 0 or more", _whole(0, 2**62)),
}


# The networks of Hinton et al. 2015, section 3, under two recipes. The paper gives widths,
# jitter, "dropout and weight-constraints" for the teacher, none for the student, and T = 20.
#
# classic: dropout 0.2 and 0.5, squared length at most 15, batches of 100, 3,000 passes, a rate
# that falls by 0.2 % a pass and is multiplied by 1 - momentum, momentum 0.5 to 0.99: those of
# Hinton et al. 2012 (arXiv 1207.0580). Its rate of 10 diverges here, where hidden units are
# ReLU and weights start as PyTorch has them. The rates and the hard weight are ours, the rates
# by errors on 10,000 held-out digits after 20 passes of the compressed schedule, one seed, bf16:
# teacher 0.25: 231, 0.5: 206, 1: 211, 2: 344 (69 % of its first layer never active);
# student 0.25: 270, 0.5: 218, 1: 222; distilled 0.12: 283, 0.25: 256, 0.5: 337. At the next
# rate, 2 and 1, the students diverged.
#
# modern: one rise and one fall of the rate, bf16, batches of 250 for speed; what had few errors
# on 10,000 held-out digits, over four seeds. Teacher, 160 passes: hidden dropout of 0, 0.2, 0.3,
# 0.5 and (0.1, 0.5), at rates from 0.04 to 0.4; 0.3 at 0.1 had the fewest (83 ± 4), 0 at 0.2
# about as few (85), but logits so large that students of its diverge at a rate of 0.1. Hard
# targets: rates from 0.05 to 0.3. Distilled: T of 8 and 20, hard weights 0 and 0.1, rates 0.05
# and 0.1 were alike within chance.
#
# short: for a few passes on a CPU. Then dropout is no help yet, and the teacher needs a higher
# rate. Distilled: of T from 1 to 20, rates from 0.03 to 0.4, hard weights 0, 0.05, 0.1; at a
# rate of 0.1 T = 4, 8, 20 were alike, and 0.2 diverged.
_LARGE = Recipe("mlp-1200x1200", dropout=(0.2, 0.5), max_norm=math.sqrt(15), jitter=2)
_SMALL = Recipe("mlp-800x800")


def _classic(recipe: Recipe, learning_rate: float) -> Recipe:
    return recipe.replace(
        schedule="classic", momentum=0.99, learning_rate=learning_rate, batch_size=100, epochs=3000
    )


def _modern(recipe: Recipe, learning_rate: float, epochs: float) -> Recipe:
    return recipe.replace(
        precision="bf16", learning_rate=learning_rate, batch_size=250, epochs=epochs
    )


def _trio(teacher: Recipe, student: Recipe, distilled: Recipe) -> dict[str, Recipe]:
    taught = distilled.distil(teacher, temperature=20, hard_weight=0.1)
    return {"teacher": teacher, "student": student, "distilled": taught}


PAPER: dict[str, dict[str, Recipe]] = {
    "classic": _trio(_classic(_LARGE, 0.5), _classic(_SMALL, 0.5), _classic(_SMALL, 0.25)),
    "modern": _trio(
        _modern(_LARGE.replace(dropout=(0, 0.3)), 0.1, 160),
        _modern(_SMALL, 0.2, 20),
        _modern(_SMALL, 0.1, 80),
    ),
    "short": _trio(
        _modern(_LARGE.replace(dropout=(0, 0)), 0.2, 5),
        _modern(_SMALL, 0.2, 5),
        _modern(_SMALL, 0.1, 5),
    ),
}
