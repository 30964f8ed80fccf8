"""What a registered network is: a digest that changes whenever the network would.

A name is registered with a function or class of the user's, often in a notebook, where it changes
from one run of a cell to the next. The digest covers its code, as compiled, so that classes
without a source file count too; the values that this code reaches, through closures, defaults and
globals; and how the untrained network behaves.
"""

import contextlib
import dis
import hashlib
import math
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import models
from kdlib.fast import threads

DECIDES_NOTHING = "a change here gives other keys, and never another run"

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device,
          torch.Size, np.generic, range, slice, Path)  # fmt: skip


def of_model(
    name: str, build: Callable[[Any], nn.Module], recipe: Any, size: tuple[int, ...]
) -> str:
    """The digest of a registered model.

    build(recipe): its untrained network. size: height and width of an image. Raises ValueError
    for a value in it that cannot be read.
    """
    parts = _Parts(name)
    parts.add(models.registered(name))
    parts.add(build(recipe))
    parts.add(_behaviour(build, recipe, size))
    return parts.total.hexdigest()


class _Parts:
    """Feeds all that a value consists of into one digest."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = hashlib.sha256()
        # The values themselves are kept, so that no id is given to another value.
        self.seen: dict[int, tuple[int, Any]] = {}

    def note(self, *parts: object) -> None:
        """Feed plain values in."""
        self.total.update(repr(parts).encode())

    def add(self, value: Any) -> None:
        """Feed a value in, and whatever it reaches."""
        if isinstance(value, _PLAIN):
            return self.note(type(value).__name__, value)
        if id(value) in self.seen:
            return self.note("again", self.seen[id(value)][0])
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, Tensor | np.ndarray):
            return self._array(torch.as_tensor(value))
        if isinstance(value, types.BuiltinFunctionType | types.ModuleType) or _is_foreign(value):
            return self.note(_where(value), getattr(value, "__qualname__", ""))
        if isinstance(value, dict | list | tuple | set | frozenset):
            return self._container(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, nn.Module):
            return self._network(value)
        return self._object(value)

    def _array(self, value: Tensor) -> None:
        content = value.detach().cpu().contiguous().flatten()
        self.note(value.dtype, tuple(value.shape), content.view(torch.uint8).numpy().tobytes())

    def _container(self, value: Any) -> None:
        self.note(type(value).__name__, len(value))
        if isinstance(value, dict):
            value = value.items()
        elif isinstance(value, set | frozenset):
            # A set of strings has another order in each process.
            value = sorted(value, key=repr)
        for item in value:
            self.add(tuple(item) if isinstance(item, tuple) else item)

    def _class(self, value: type) -> None:
        self.note(value.__qualname__)
        self.add(value.__bases__)
        for name, member in sorted(vars(value).items()):
            if name not in _NO_MEMBERS:
                self.note(name)
                # What a property, a static method and the like were made of.
                made_of = [
                    getattr(member, part)
                    for part in ("fget", "fset", "__func__", "func")
                    if hasattr(member, part)
                ]
                self.add(made_of or member)

    def _function(self, value: types.FunctionType) -> None:
        self.add((value.__defaults__, value.__kwdefaults__, vars(value)))
        for cell in value.__closure__ or ():
            self.add(_content(cell))
        for code in _codes(value.__code__):
            self.note(code.co_code, code.co_names, code.co_varnames, code.co_freevars)
            self.add(_constants(code))
            for name in _globals_of(code):
                found = value.__globals__.get(name)
                self.note(name)
                self.add(found)
                if isinstance(found, types.ModuleType) and not _is_foreign(found):
                    members = sorted(set(code.co_names) & vars(found).keys())
                    self.add([getattr(found, member) for member in members])

    def _network(self, value: nn.Module) -> None:
        self.note(repr(value))
        for name, weight in value.named_parameters():
            self.note(name, tuple(weight.shape), weight.dtype, weight.requires_grad)
        self.add(dict(value.named_buffers()))
        for layer in value.modules():
            self.add(type(layer))
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                self.add(list(getattr(layer, hooks).values()))
            own = {name: member for name, member in vars(layer).items() if name not in _TORCHS_OWN}
            self.add(own)

    def _object(self, value: Any) -> None:
        # How pickle would take the value apart: its class, and its state.
        try:
            taken_apart = value.__reduce_ex__(4)
        except Exception as error:
            raise ValueError(
                f"the model {self.name!r} uses {value!r}, whose content cannot be read ({error}): "
                "a change in it would go unnoticed; make it inside the factory, or use numbers, "
                "strings, tensors, functions or classes"
            ) from error
        if isinstance(taken_apart, str):
            return self.note(_where(value), taken_apart)
        for part in taken_apart:
            self.add(list(part) if isinstance(part, Iterator) else part)
        return None


_NO_MEMBERS = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__annotate_func__",
    "__annotations_cache__", "__abstractmethods__", "_abc_impl",
}  # fmt: skip
_TORCHS_OWN = set(vars(nn.Module()))


def _where(value: Any) -> str:
    """The module that a class or function is from, or a module's own name."""
    name = value.__name__ if isinstance(value, types.ModuleType) else None
    return str(name or getattr(value, "__module__", None) or "builtins")


def _is_foreign(value: Any) -> bool:
    """Whether a class, function or module is Python's, kdlib's or an installed package's."""
    if not isinstance(value, type | types.FunctionType | types.ModuleType):
        return False
    root = _where(value).partition(".")[0]
    # kdlib's own code is in every key, see `keys.code_digest`.
    if root in {"builtins", "kdlib", "torch", "numpy"} | sys.stdlib_module_names - {"__main__"}:
        return True
    origin = getattr(sys.modules.get(root), "__file__", None)
    installed = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return origin is not None and any(Path(origin).is_relative_to(path) for path in installed)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that its function has not assigned yet
        return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _constants(code: types.CodeType) -> list[Any]:
    """The constants of some code, without its docstring."""
    constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    has_docstring = constants and isinstance(constants[0], str) and not code.co_name.startswith("<")
    return constants[1:] if has_docstring else constants


def _globals_of(code: types.CodeType) -> list[str]:
    """The global names that some code reads."""
    read = ("LOAD_GLOBAL", "LOAD_NAME")
    return sorted({i.argval for i in dis.get_instructions(code) if i.opname in read})


def _behaviour(build: Callable[[Any], nn.Module], recipe: Any, size: tuple[int, ...]) -> Any:
    """A network's answers and gradients for fixed images, rounded to what processors agree on.

    None for a network that takes no such images: `group` refuses it, with the reason.
    """
    for dtype, digits in ((torch.float64, 6), (torch.float32, 3)):
        network = build(recipe).to(dtype)
        images = torch.arange(4 * math.prod(size), dtype=dtype) * 0.618 % 1
        # Networks with constants of their own may refuse float64, and take float32.
        with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            with threads(1), torch.random.fork_rng([]):
                torch.default_generator.manual_seed(0)
                logits = network.train()(images.view(4, 1, *size))
                weights = [w for w in network.parameters() if w.requires_grad]
                gradients = torch.autograd.grad(
                    logits.square().sum(), weights, allow_unused=True, materialize_grads=True
                )
            return [_rounded(value, digits) for value in (logits, *gradients)]
    return None


def _rounded(value: Tensor, digits: int) -> tuple[str, list[float]]:
    """A tensor's length and direction in a few digits. Rounding the numbers one by one would not
    do: those near zero differ between processors by more."""
    flat = value.detach().double().flatten()
    length = float(flat.norm())
    waves = torch.cos(torch.arange(flat.numel() * 3, dtype=torch.float64)).view(3, -1)
    direction = (waves @ flat) / max(length, 1e-300)
    return f"{length:.{digits}g}", [round(x, digits - 1) + 0.0 for x in direction.tolist()]
