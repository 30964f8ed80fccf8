"""Recipe: everything that decides a trained network, checked when it is made."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_type_hints

from kdlib import check, data, files, loop, losses, models, precision

DECIDES_NOTHING = "a recipe's fields are in the key of its run themselves"


def _name(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError
    return str(given)


def _recipes(given: Any) -> tuple["Recipe", ...]:
    teachers = (given,) if isinstance(given, Recipe) else given
    if not isinstance(teachers, list | tuple) or not all(isinstance(t, Recipe) for t in teachers):
        raise TypeError
    return tuple(teachers)


def _classes(given: Any) -> tuple[int, ...]:
    # In one order and each once, since the order of the omitted classes decides nothing.
    return tuple(sorted(set(check.each(check.whole(), "").read(given))))


_MODEL = check.Rule("the name of a model", _name)
# Looked up when a recipe is made, since datasets can be registered at any time.
_DATASET = check.Rule(
    "the name of a dataset that data.names() lists",
    lambda given: check.one_of(*data.names()).read(given),
)
_TEACHERS = check.Rule("recipes", _recipes)
_OMITTED = check.Rule("a tuple of class numbers", _classes)
_CHANCE = check.number(0, 1, ends="[)")
_CHANCES = check.each(_CHANCE, "two chances in [0, 1), of the input and of hidden units", 2)
_BOUNDED = check.number(0, losses.HIGHEST_IN_FLOAT64, ends="(]")
_WHY = "higher ones leave no digit of the divergence (its limit: logit_matching_loss)"
_PRECISION = check.one_of(*precision.PRECISIONS)
_TEMPERATURE = check.Rule(f"{_BOUNDED.expected}; {_WHY}", _BOUNDED.read)


@dataclass(frozen=True)
class Recipe:
    """A trained network as a value: the same recipe gives the same weights.

    model: a name for `models.build`. dataset: a name for `data.load`.
    epochs: how often each training sample is used; steps, if given, counts batches instead.
    batch_size: samples per step. learning_rate: its peak. momentum: Nesterov's, its final value.
    schedule: "one-cycle", "cosine", "constant" or "classic" (see `loop.SCHEDULES`).
    dropout: the probabilities of dropping an input pixel and a hidden unit (mlp models).
    max_norm: the maximum length of a hidden unit's incoming weights (L2, not squared).
    jitter: in each epoch, each image is moved by up to so many pixels at random.
    fraction, omit, subset_seed: a stratified part of the training set, without some classes.
    validation: train without the held-out sixth and count errors on it; else train on all.
    teacher, temperature, hard_weight: the teachers' recipes (the logits of several are
    averaged) and the distillation loss; `distil` sets all three. A hard_weight of 1, the default,
    leaves the teacher without effect.
    label_smoothing: the share of each hard target that is spread evenly over all classes.
    precision: "fp32", "bf16" (autocast, where the processor is fast at it), "tf32", "fp64".
    seed: decides the initial weights, the order of the samples, the jitter and the dropout.

    Numbers may be NumPy's; the recipe holds Python's. Raises ValueError that names the
    field, its value and what was expected.
    """

    # Each field with its type, the rule that its values obey, and its default.
    model: Annotated[str, _MODEL]
    dataset: Annotated[str, _DATASET] = "mnist"
    epochs: Annotated[float, check.POSITIVE] = 10
    steps: Annotated[int | None, check.optional(check.COUNT)] = None
    batch_size: Annotated[int, check.COUNT] = 128
    learning_rate: Annotated[float, check.POSITIVE] = 0.1
    momentum: Annotated[float, _CHANCE] = 0.9
    schedule: Annotated[str, check.one_of(*loop.SCHEDULES)] = "one-cycle"
    dropout: Annotated[tuple[float, float], _CHANCES] = (0.0, 0.0)
    max_norm: Annotated[float | None, check.optional(check.POSITIVE)] = None
    jitter: Annotated[int, check.whole(0, 27)] = 0
    fraction: Annotated[float, check.number(0, 1, ends="(]")] = 1.0
    omit: Annotated[tuple[int, ...], _OMITTED] = ()
    subset_seed: Annotated[int, check.whole()] = 0
    validation: Annotated[bool, check.boolean()] = False
    teacher: Annotated[tuple["Recipe", ...], _TEACHERS] = ()
    temperature: Annotated[float, _TEMPERATURE] = 1.0
    hard_weight: Annotated[float, check.number(0, 1)] = 1.0
    precision: Annotated[str, _PRECISION] = "fp32"
    seed: Annotated[int, check.whole()] = 0
    label_smoothing: Annotated[float, _CHANCE] = 0.0

    def __post_init__(self) -> None:
        for field, rule in _RULES.items():
            # The rule's plain value is kept: equal recipes then have equal keys, 1 and 1.0 too.
            object.__setattr__(self, field, check.value(field, getattr(self, field), rule))
        if self.model not in models.names() and models.widths(self.model) is None:
            # Raises an error that lists the names that exist.
            models.build(self.model)
        if any(self.dropout) and models.widths(self.model) is None:
            check.refuse("dropout", self.dropout, f"(0, 0), as model {self.model!r} has none")
        # Without a teacher the weight would have no effect, so another value is a slip.
        if not self.teacher and self.hard_weight != 1:
            remedy = "1 without a teacher, or recipe.distil(teacher, temperature=…, hard_weight=…)"
            check.refuse("hard_weight", self.hard_weight, remedy)
        # Soft targets take the place of smoothed labels.
        if self.teacher and self.label_smoothing:
            check.refuse("label_smoothing", self.label_smoothing, "0 with a teacher")

    def replace(self, **changes: Any) -> Self:
        """The same recipe with some fields changed. Raises TypeError for an unknown field."""
        return dataclasses.replace(self, **changes)

    def distil(self, *teachers: "Recipe", temperature: float, hard_weight: float = 0.0) -> Self:
        """The same student, trained on the soft targets of one or more teachers."""
        if not teachers:
            raise ValueError("distil() got no teacher: expected one or more recipes")
        return self.replace(teacher=teachers, temperature=temperature, hard_weight=hard_weight)

    @property
    def key(self) -> str:
        """A digest of all fields, teachers included: 16 hexadecimal digits."""
        return files.digest(self.as_dict())[:16]

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, for `from_dict`."""
        fields = vars(self) | {"dropout": list(self.dropout), "omit": list(self.omit)}
        # A field that came later: recipes without it keep the keys that they had.
        if not self.label_smoothing:
            del fields["label_smoothing"]
        return fields | {"teacher": [teacher.as_dict() for teacher in self.teacher]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The recipe that `as_dict` gave as fields."""
        teachers = [cls.from_dict(teacher) for teacher in fields.get("teacher", ())]
        return cls(**{**fields, "teacher": teachers})


_RULES: dict[str, check.Rule] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Recipe, include_extras=True).items()
}
