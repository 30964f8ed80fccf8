"""One way to refuse a bad value: one error that names it, the value and what was expected."""

import contextlib
import contextvars
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

DECIDES_NOTHING = "it only refuses values, and turns NumPy's numbers into Python's"


# Characters of a value in an error.
LONGEST = 1000


@dataclass(frozen=True)
class Rule:
    """What a value must be: in words, and as a function.

    read(value) returns the value as plain Python, or raises ValueError or TypeError.
    """

    expected: str
    read: Callable[[Any], Any]

    # In words alone, since help() shows the rules of a recipe's fields.
    def __repr__(self) -> str:
        return self.expected


def value(name: str, given: Any, rule: Rule) -> Any:
    """The given value as plain Python. Raises ValueError unless the rule accepts it."""
    # Whatever Python, NumPy or PyTorch thinks is wrong, the user reads what is expected.
    try:
        return rule.read(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        refuse(name, given, rule.expected)


def values(rules: dict[str, Rule], **given: Any) -> None:
    """Raise ValueError for the first given value that its rule refuses."""
    for name, one in given.items():
        value(name, one, rules[name])


def refuse(name: str, given: Any, expected: str) -> NoReturn:
    """Raise the one ValueError of a bad value."""
    raise ValueError(f"{name} is {shown(given)}: expected {expected}") from None


def shown(given: Any) -> str:
    """A value in one line, which a tensor, a long list or an object of any kind need not be."""
    try:
        text = " ".join(line.strip() for line in repr(given).splitlines())
    # Nested too deep, too many digits, or an object that fails to describe itself.
    except Exception:
        return f"a {type(given).__name__} that cannot be shown"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def number(low: float = -math.inf, high: float = math.inf, *, ends: str = "[]") -> Rule:
    """A finite real number between two bounds; ends: "(" or ")" leaves a bound out."""

    def read(given: Any) -> float:
        # `float` would take text as well.
        _real(given, numbers.Real)
        plain = float(given)
        above = plain > low if ends[0] == "(" else plain >= low
        below = plain < high if ends[1] == ")" else plain <= high
        if not (above and below and math.isfinite(plain)):
            raise ValueError
        return plain

    if high < math.inf:
        return Rule(f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}", read)
    return Rule(f"a finite number {'above' if ends[0] == '(' else 'from'} {low:g}", read)


# The default bound lies below that of int64, so that any seed accepted fits a generator.
def whole(low: int = 0, high: int = 2**62) -> Rule:
    """A whole number between two bounds, both included."""

    def read(given: Any) -> int:
        _real(given, numbers.Integral)
        if not low <= int(given) <= high:
            raise ValueError
        return int(given)

    if high < 2**62:
        return Rule(f"a whole number from {low} to {high}", read)
    return Rule(f"a whole number, {low} or more", read)


def one_of(*allowed: str) -> Rule:
    """One of some names."""

    # `index` raises the ValueError of a name that is not among them.
    return Rule(f"one of {', '.join(allowed)}", lambda given: allowed[allowed.index(given)])


def boolean() -> Rule:
    """True or False, Python's or NumPy's."""

    def read(given: Any) -> bool:
        # 0, 1 and "false" are more likely slips than truth values.
        if not isinstance(given, bool | np.bool_):
            raise TypeError
        return bool(given)

    return Rule("True or False", read)


def optional(rule: Rule) -> Rule:
    """None, or what another rule accepts."""
    return Rule(
        f"None or {rule.expected}", lambda given: None if given is None else rule.read(given)
    )


def each(rule: Rule, expected: str, length: int | None = None) -> Rule:
    """A list or tuple whose items another rule accepts, as a tuple."""

    def read(given: Any) -> tuple[Any, ...]:
        if not isinstance(given, list | tuple | np.ndarray):
            raise TypeError
        if length is not None and len(given) != length:
            raise ValueError
        return tuple(map(rule.read, given))

    return Rule(expected, read)


POSITIVE = number(0, ends="(]")
COUNT = whole(1)


def _real(given: Any, kind: type) -> None:
    # True is 1 in Python, but a step count of True is a slip.
    if isinstance(given, bool | np.bool_) or not isinstance(given, kind):
        raise TypeError


# A variable of the context, since trainings may go on in several threads.
_in_a_step = contextvars.ContextVar("in_a_step", default=False)


@contextlib.contextmanager
def in_a_step() -> Iterator[None]:
    """While `fit` takes its steps: values on a GPU are trusted, since to read one would make
    the host wait for the device, which also keeps a step from being captured as a graph."""
    token = _in_a_step.set(True)
    try:
        yield
    finally:
        _in_a_step.reset(token)


def may_read(given: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not those on a GPU in one of `fit`'s steps."""
    return not (given.is_cuda and _in_a_step.get())


def per_run(name: str, given: float | Tensor, rule: Rule) -> None:
    """Raise ValueError unless a rule accepts a number, or each value of a tensor.

    A tensor that `may_read` excludes is trusted.
    """
    if not isinstance(given, Tensor):
        value(name, given, rule)
    elif may_read(given):
        value(name, given.flatten().tolist(), each(rule, f"{rule.expected}, for each run"))
