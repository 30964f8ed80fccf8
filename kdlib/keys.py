"""What a run is stored under: all that decides it, its code included.

The key is a digest of the recipe, the data, the kind of device, the code that trains, and the
registered networks. Two runs of one key have the same weights but for rounding, which differs
between processors, PyTorch's versions and sizes of stacks (with dropout, a stack's size changes
its draw too), and but for bf16, which is fp32 on a processor that is slow at it.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from kdlib import data, group, identity, models
from kdlib.recipe import Recipe

DECIDES_NOTHING = "a change here gives other keys, and never another run"

_PACKAGE = Path(__file__).parent
_START = "group"  # the module that trains
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def key(recipe: Recipe, device: torch.device) -> str:
    """The key of a recipe's run on a kind of device: 24 hexadecimal digits."""
    parts = [recipe.key, device.type, code_digest()]
    for used in family(recipe):
        dataset = data.load(used.dataset, device)
        parts.append(dataset.digest)
        # Networks that come with kdlib are part of its code.
        if models.registered(used.model) is not None:
            size = tuple(dataset.test.images.shape[1:])
            parts.append(identity.of_model(used.model, group.build, used, size))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


def family(recipe: Recipe) -> Iterator[Recipe]:
    """A recipe, its teachers, their teachers, and so on."""
    yield recipe
    for teacher in recipe.teacher:
        yield from family(teacher)


@functools.cache
def code_digest() -> str:
    """A digest of the code that decides a run."""
    return digest_of(_PACKAGE)


def digest_of(package: Path) -> str:
    """A digest of the modules of a copy of kdlib that decide a run.

    These are what `group` imports, directly or not, but for modules that declare that they
    decide nothing. Comments, docstrings and the texts of errors and warnings are left out.
    """
    code = {name: ast.unparse(_Plain().visit(tree)) for name, tree in deciding(package).items()}
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()


def deciding(package: Path = _PACKAGE) -> dict[str, ast.Module]:
    """The syntax trees of the modules that decide a run, by name."""
    found: dict[str, ast.Module] = {}
    waiting = [_START]
    while waiting:
        name = waiting.pop()
        path = package / f"{name}.py"
        if name in found or not path.is_file():
            continue
        # Read, not imported: a module may also be imported inside a function.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if reason(tree) is None:
            found[name] = tree
            waiting += _imported(tree)
    return found


def reason(tree: ast.Module) -> str | None:
    """Why a module decides nothing, as it declares with DECIDES_NOTHING, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DECIDES_NOTHING":
            return str(ast.literal_eval(node.value))
    return None


def _imported(tree: ast.Module) -> Iterator[str]:
    """The modules of kdlib that a module imports, inside functions too."""
    for node in ast.walk(tree):
        # A name that is no module, as in `from kdlib import train`, finds no file later.
        if isinstance(node, ast.ImportFrom) and node.module == "kdlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdlib."):
            yield str(node.module).removeprefix("kdlib.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("kdlib.") for alias in node.names)


class _Plain(ast.NodeTransformer):
    """Code without what no run depends on: docstrings, texts of errors and warnings."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return super().generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        # The kind of error counts, since another part may catch it.
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = ast.unparse(node.func)
        if called == "warnings.warn":
            return ast.Call(node.func, [], [])
        if called in ("check.value", "check.refuse"):
            # A name, and what is expected, in words.
            node.args = [part for part in node.args if not _is_text(part)]
        return self.generic_visit(node)


def _is_text(node: ast.expr) -> bool:
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, ast.JoinedStr)
