"""What a registered network is: a digest that changes whenever the network would.

A name is registered with a function or class of the user's, often in a notebook, where it changes
from one run of a cell to the next. The digest covers its code, as compiled, so that classes
without a source file count too; the values that this code reaches, through closures, defaults and
globals; and how the untrained network behaves.
"""

import contextlib
import dis
import functools
import hashlib
import inspect
import io
import math
import pickle
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import models
from kdlib.fast import threads
from kdlib.precision import default_dtype

DECIDES_NOTHING = "a change here gives other keys, and never another run"

_NO_MEMBERS = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__annotate_func__",
    "__annotations_cache__", "__abstractmethods__", "_abc_impl",
}  # fmt: skip
_TORCHS_OWN = set(vars(nn.Module()))
_CORE = sys.stdlib_module_names | {"builtins", "kdlib", "torch", "numpy"}


def of_model(
    name: str, build: Callable[[Any], nn.Module], recipe: Any, size: tuple[int, ...]
) -> str:
    """The digest of a registered model.

    build(recipe): its untrained network. size: height and width of an image. Raises ValueError
    for a value in it that cannot be read.
    """
    # The behaviour first: modules that the network imports as it runs are then there to be read.
    behaviour = _behaviour(build, recipe, size)
    try:
        return _digest([behaviour, models.registered(name), _network(build(recipe), exact=False)])
    except Exception as error:
        raise ValueError(
            f"the model {name!r} uses a value whose content cannot be read ({error}): a change in "
            "it would go unnoticed; make it inside the factory, or use numbers, strings, tensors, "
            "functions or classes"
        ) from error


def _digest(value: Any) -> str:
    stream = io.BytesIO()
    _Content(stream, protocol=4).dump(value)
    return hashlib.sha256(stream.getvalue()).hexdigest()


def _part(kind: str) -> None:
    """Stands in the stream for what `_Content` describes itself. Nothing ever loads the stream."""


class _Content(pickle._Pickler):
    """Pickles a value by content, with the code that it reaches.

    pickle itself knows how to take most objects apart, and what to do about cycles.
    """

    def memoize(self, obj: Any) -> None:
        # Equal strings may be one object or two, which changes nothing.
        if not isinstance(obj, str | bytes | tuple):
            super().memoize(obj)  # type: ignore[misc]

    def reducer_override(self, obj: Any) -> Any:
        described = _described(obj)
        # As the state, which is written after the object is known: it may refer to the object.
        return (
            described if described is NotImplemented else (_part, (type(obj).__name__,), described)
        )


def _described(value: Any) -> Any:
    """A list of all that a value is, or NotImplemented if pickle knows it."""
    match value:
        case Tensor():
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return [str(value.dtype), tuple(value.shape), content.tobytes()]
        case set() | frozenset():
            # A set of strings has another order in each process.
            return sorted(map(_digest, value))
        case types.ModuleType():
            return [value.__name__]
        case types.CodeType():
            return [value.co_code, value.co_names, value.co_varnames, _constants(value)]
        case types.CellType():
            # Empty for a name that its function has not assigned yet.
            with contextlib.suppress(ValueError):
                return [value.cell_contents]
            return []
        case type() | types.FunctionType() if _is_foreign(value):
            return NotImplemented if value is _part else _foreign(value)
        case type():
            members = {k: part for k, part in vars(value).items() if k not in _NO_MEMBERS}
            return [_where(value), value.__qualname__, value.__bases__, members]
        case types.FunctionType():
            defaults = value.__defaults__, value.__kwdefaults__, vars(value)
            reached = [list(_reached(code, value.__globals__)) for code in _codes(value.__code__)]
            return [value.__code__, defaults, value.__closure__, reached]
        case types.BuiltinFunctionType():
            return [value.__name__, value.__self__]
        case property():
            return [value.fget, value.fset, value.fdel]
        case staticmethod() | classmethod():
            return [value.__func__]
        case functools.cached_property():
            return [value.func]
        case weakref.ReferenceType():
            return [value()]
        case nn.Module():
            return _network(value, exact=True)
    if _where(type(value)) == "kdlib.runs":
        # A run is its weights: whether it was stored, and when, changes nothing in it.
        return [value.recipe, sorted(value.weights.items())]
    # pickle knows a function with a cache by its name alone.
    return [value.__wrapped__] if hasattr(value, "__wrapped__") else NotImplemented


def _network(network: nn.Module, exact: bool) -> list[Any]:
    """A network's structure, and what its layers remember.

    exact: its weights too. Those of an untrained network may differ in the last digit from
    processor to processor, and show in its behaviour.
    """
    weights = [
        (name, tuple(weight.shape), str(weight.dtype), weight.requires_grad)
        for name, weight in network.named_parameters()
    ]
    layers = []
    for layer in network.modules():
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        own = {name: value for name, value in vars(layer).items() if name not in _TORCHS_OWN}
        layers.append((type(layer), hooks, own))
    state = dict(network.state_dict() if exact else network.named_buffers())
    return [repr(network), weights, state, layers]


def _where(value: Any) -> str:
    """The module that a class or function is from, or a module's own name."""
    name = value.__name__ if isinstance(value, types.ModuleType) else None
    return str(name or getattr(value, "__module__", None) or "builtins")


def _is_foreign(value: Any) -> bool:
    """Whether a class, function or module is Python's, kdlib's or an installed package's."""
    root = _where(value).partition(".")[0]
    origin = getattr(sys.modules.get(root), "__file__", None)
    # What a user types into IPython is in __main__, which may have an installed launcher's path.
    if root in _CORE or root == "__main__" or origin is None:
        return root in _CORE
    return any(Path(origin).is_relative_to(sysconfig.get_path(p)) for p in ("purelib", "platlib"))


def _foreign(value: Any) -> list[Any]:
    """A class or function of an installed package: its name, version, and what it encloses."""
    root = _where(value).partition(".")[0]
    # kdlib's code is in every key, see `keys.code_digest`; Python's and PyTorch's versions are in
    # a run's provenance.
    if root in _CORE:
        return [_where(value), value.__qualname__]
    version = getattr(sys.modules[root], "__version__", "")
    return [_where(value), value.__qualname__, version, getattr(value, "__closure__", None)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _constants(code: types.CodeType) -> list[Any]:
    """The constants of some code, without its docstring."""
    constants = list(code.co_consts)
    # Python 3.14 marks code that has a docstring. Before, a function's first constant was one, or
    # None. A lambda or comprehension has none.
    is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
    marked = code.co_flags & getattr(inspect, "CO_HAS_DOCSTRING", inspect.CO_OPTIMIZED)
    has_docstring = is_function and marked and constants and isinstance(constants[0], str)
    return constants[1:] if has_docstring else constants


def _reached(code: types.CodeType, namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that some code reads, by name, and what it reads from the user's modules."""
    for line in dis.get_instructions(code):
        if line.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            found = namespace.get(line.argval)
        elif line.opname == "IMPORT_NAME":
            package = namespace.get("__package__") or ""
            found = sys.modules.get(f"{package}.{line.argval}") or sys.modules.get(line.argval)
        else:
            continue
        yield line.argval, found
        yield from _members(found, code.co_names)


def _members(module: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What some code may read from a module of the user's, and from modules in it."""
    if isinstance(module, types.ModuleType) and not _is_foreign(module):
        for name in sorted(set(names) & vars(module).keys()):
            member = vars(module)[name]
            yield name, member
            # Downwards alone, so that two modules that import each other end.
            if _where(member).startswith(f"{module.__name__}."):
                yield from _members(member, names)


def _behaviour(build: Callable[[Any], nn.Module], recipe: Any, size: tuple[int, ...]) -> Any:
    """An untrained network's weights, and its logits and gradients for fixed images.

    Rounded to what processors agree on. None for a network that takes no such images: `group`
    refuses it, with the reason.
    """
    for dtype, digits in ((torch.float64, 6), (torch.float32, 3)):
        network = build(recipe).to(dtype).train()
        # A network with constants of its own may refuse float64, and take float32.
        with (
            contextlib.suppress(Exception),
            threads(1),
            default_dtype(torch.float32),
            torch.device("cpu"),
            torch.random.fork_rng([]),
        ):
            torch.default_generator.manual_seed(0)
            images = torch.arange(4 * math.prod(size), dtype=dtype) * 0.618 % 1
            weights = [weight for weight in network.parameters() if weight.requires_grad]
            before = [_rounded(weight, digits) for weight in weights]
            logits = network(images.view(4, 1, *size))
            gradients = torch.autograd.grad(
                logits.square().sum(), weights, allow_unused=True, materialize_grads=True
            )
            return before, [_rounded(value, digits) for value in (logits, *gradients)]
    return None


def _rounded(value: Tensor, digits: int) -> tuple[str, list[float]]:
    """A tensor's length and direction in a few digits. Rounding the numbers one by one would not
    do: those near zero differ between processors by more."""
    flat = value.detach().double().flatten()
    length = float(flat.norm())
    waves = torch.cos(torch.arange(flat.numel() * 3, dtype=torch.float64)).view(3, -1)
    direction = (waves @ flat) / max(length, 1e-300)
    return f"{length:.{digits}g}", [round(x, digits - 1) + 0.0 for x in direction.tolist()]
