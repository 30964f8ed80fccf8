"""A registered network that changes is trained again; one that does not is trained once."""

import enum
import functools
import importlib
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import torchvision
from helpers import blobs
from torch import Tensor, nn

import kdlib
from kdlib import data, keys, models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of the test's own, and small data by name."""
    monkeypatch.setattr(data, "_registered", {})
    monkeypatch.setattr(models, "_registered", {})
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    data.register("blobs", blobs)


def recipe() -> kdlib.Recipe:
    return kdlib.Recipe("own", dataset="blobs", steps=2, batch_size=20)


def was_stored(factory: Callable[..., nn.Module]) -> bool:
    """Register a network, train it, and tell whether its run was there already."""
    models.register("own", factory)
    return kdlib.train(recipe(), "cpu").cached


def key(factory: Callable[..., nn.Module]) -> str:
    models.register("own", factory)
    return keys.key(recipe(), CPU)


class Net(nn.Module):
    def __init__(self, gain: float = 1.0, act: Any = torch.relu) -> None:
        super().__init__()
        self.gain, self.act = gain, act
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.act(images.flatten(-3))) * self.gain


# --- what changes a network


def by_closure(gain: float) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        return Net(gain)

    return factory


def by_default(gain: float) -> Callable[[], nn.Module]:
    def factory(gain: float = gain) -> nn.Module:
        return Net(gain)

    return factory


def by_keyword(gain: float) -> Callable[[], nn.Module]:
    def factory(*, gain: float = gain) -> nn.Module:
        return Net(gain)

    return factory


def by_list(gain: float) -> Callable[[], nn.Module]:
    settings = {"gains": [gain]}
    return lambda: Net(settings["gains"][0])


def by_tensor(gain: float) -> Callable[[], nn.Module]:
    enclosed = torch.tensor(gain)
    return lambda: Net(float(enclosed))


def by_instance(gain: float) -> Callable[[], nn.Module]:
    class Factory:
        def __init__(self) -> None:
            self.gain = gain

        def __call__(self) -> nn.Module:
            return Net(self.gain)

    return Factory()


def by_bound_method(gain: float) -> Callable[[], nn.Module]:
    return by_instance(gain).__call__


@dataclass
class Settings:
    gain: float


def by_dataclass(gain: float) -> Callable[[], nn.Module]:
    settings = Settings(gain)
    return lambda: Net(settings.gain)


def by_cached_helper(gain: float) -> Callable[[], nn.Module]:
    @functools.cache
    def helper() -> float:
        return gain

    return lambda: Net(helper())


def by_decorator(gain: float) -> Callable[[], nn.Module]:
    return torch.no_grad()(by_closure(gain))


WAYS = [
    by_closure, by_default, by_keyword, by_list, by_tensor, by_instance, by_bound_method,
    by_dataclass, by_cached_helper, by_decorator, lambda gain: functools.partial(Net, gain),
    lambda gain: lambda: Net(gain),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_factory_with_another_value_is_trained_again(way: Callable[..., Any]) -> None:
    assert [was_stored(way(1.0)), was_stored(way(0.5))] == [False, False]
    assert [was_stored(way(1.0)), was_stored(way(0.5))] == [True, True]


def test_a_changed_value_that_the_untrained_network_does_not_show_counts() -> None:
    """Only after 1,000 steps would this gain change anything."""

    class Late(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.layer, self.gain, self.calls = nn.Linear(784, 10), gain, 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(images.flatten(-3)) * (self.gain if self.calls > 1000 else 1)

    assert key(lambda: Late(1.0)) != key(lambda: Late(0.5))
    assert key(functools.partial(Late, 1.0)) != key(functools.partial(Late, 0.5))


SOURCE = '''
"""Own networks."""
import enum
import functools
import torch
import helpers_of_mine
from torch import nn

GAIN = 1.0

class Kind(enum.Enum):
    SCALE = 3.0

def helper(images):
    return images * 4.0

class Base(nn.Module):
    """Docstring."""
    scale = functools.partial(torch.mul, other=5.0)

    def forward(self, images):
        images = helper(images) * GAIN * self.factor * self.doubled(6.0)
        images = helpers_of_mine.deeper.scale(images)
        return self.layer(self.scale(images).flatten(-3)) * Kind.SCALE.value  # comment

class Own(Base):
    def __init__(self):
        """Another."""
        super().__init__()
        self.layer = nn.Linear(784, 10)

    @property
    def factor(self):
        return 7.0

    @staticmethod
    def doubled(value):
        return [8.0 * value for _ in range(1)][0]

    def never_called(self):
        return sorted({"a", "b", "c"})

def make():
    return Own()
'''


def key_of(source: str, monkeypatch: pytest.MonkeyPatch, inner: float = 9.0) -> str:
    """The key of a network that is registered by some source, with a module of two levels."""
    package, deeper = (
        types.ModuleType("helpers_of_mine"),
        types.ModuleType("helpers_of_mine.deeper"),
    )
    exec(f"def scale(images):\n    return images * {inner}", vars(deeper))
    package.deeper = deeper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "helpers_of_mine", package)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(source, space)
    return key(space["make"])


@pytest.mark.parametrize("number", [*map(float, range(1, 9)), "make"])
def test_a_changed_number_anywhere_in_its_code_is_another_network(
    number: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (
        (f"{number}", "0.25") if number != "make" else ("return Own()", "return Own().eval()")
    )
    if number == 2.0:
        old, new = "range(1)", "range(2)"
    assert old in SOURCE
    assert key_of(SOURCE.replace(old, new), monkeypatch) != key_of(SOURCE, monkeypatch)


def test_a_changed_function_in_a_module_of_ones_own_is_another_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert key_of(SOURCE, monkeypatch, 9.0) == key_of(SOURCE, monkeypatch, 9.0)
    assert key_of(SOURCE, monkeypatch, 9.0) != key_of(SOURCE, monkeypatch, 9.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# comment", "# another comment"),
        ('"""Another."""', '"""Otherwise."""'),
        ('"""Docstring."""', ""),
        ("nn.Linear(784, 10)", "nn.Linear(784,10)"),
        ("GAIN = 1.0", "GAIN = 1.0\nUNUSED = 2.0"),
    ],
)
def test_what_changes_nothing_in_a_network_changes_no_key(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in SOURCE
    assert key_of(SOURCE.replace(old, new), monkeypatch) == key_of(SOURCE, monkeypatch)


def test_buffers_and_initial_weights_that_come_from_a_file_count(tmp_path: Path) -> None:
    file = tmp_path / "values.txt"

    def factory() -> nn.Module:
        unused, weight = map(float, file.read_text(encoding="utf-8").split())
        network = Net()
        network.register_buffer("unused", torch.tensor(unused))
        nn.init.constant_(network.layer.weight, weight)
        return network

    found = set()
    for values in ("1 1", "2 1", "1 2"):
        file.write_text(values, encoding="utf-8")
        found.add(key(factory))
    assert len(found) == 3


def test_a_trained_run_that_a_factory_uses_is_its_weights() -> None:
    small = kdlib.Recipe("mlp-8", dataset="blobs", steps=2, batch_size=20)

    def student_of(run: kdlib.Run) -> Callable[[], nn.Module]:
        return lambda: run.model()

    first = kdlib.train(small, "cpu")
    before = key(student_of(first))
    first.logits("test")
    assert key(student_of(first)) == before
    again = kdlib.train(small, "cpu")
    assert again.cached
    assert key(student_of(again)) == before
    assert key(student_of(kdlib.train(small.replace(seed=1), "cpu"))) != before


# --- the same network has one key in each process

SAME = """
import sys
sys.path[:0] = {paths}
import torch, kdlib
from helpers import blobs
kdlib.data.register("blobs", blobs)
from kdlib import keys, models
from torch import nn
NAMES = {{"one", "two", "three", "four"}}
class Own(nn.Module):
    kinds = frozenset({{"x", "y", "z"}})
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, images):
        assert self.kinds and NAMES
        return self.layer(images.flatten(-3))
models.register("own", Own)
print(keys.key(kdlib.Recipe("own", dataset="blobs"), torch.device("cpu")))
"""


def run(script: str, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, *flags], input=script, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_network_has_one_key_in_all_processes() -> None:
    script = SAME.format(paths=[str(Path(__file__).parent), str(Path(kdlib.__file__).parents[1])])
    assert run(script, "-") == run(script, "-")


# --- where networks are defined

DEFINED = """
import torch, kdlib
from torch import nn
from kdlib import models
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, images):
        return self.layer(images.flatten(-3))

def factory():
    return Own()

recipe = {}
for make in (Own, factory, lambda: Own().train()):
    models.register("own", make)
    print(kdlib.train(kdlib.Recipe("own", dataset="mnist-5k", steps=2), "cpu").cached)

"""


@pytest.mark.parametrize("flags", [["-"], ["-i"]])
def test_a_class_from_standard_input_or_a_repl_trains(flags: list[str]) -> None:
    script = f"import sys\nsys.path.insert(0, {str(Path(kdlib.__file__).parents[1])!r})\n{DEFINED}"
    assert run(script, *flags).split() == ["False"] * 3


def test_a_class_in_a_notebook_trains_and_a_changed_global_trains_it_again(tmp_path: Path) -> None:
    nbclient = importlib.import_module("nbclient")
    cells = [
        f"import sys\nsys.path.insert(0, {str(Path(kdlib.__file__).parents[1])!r})\n{DEFINED}",
        "gain = 1.0\n"
        "class Scaled(Own):\n"
        "    def forward(self, images):\n"
        "        return super().forward(images) * gain\n"
        "models.register('scaled', Scaled)\n"
        "scaled = kdlib.Recipe('scaled', dataset='mnist-5k', steps=2)\n"
        "print([kdlib.train(scaled, 'cpu').cached for _ in range(2)])",
        "gain = 0.5\nprint([kdlib.train(scaled, 'cpu').cached for _ in range(2)])",
        "gain = 1.0\nprint(kdlib.train(scaled, 'cpu').cached)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert [text.strip() for text in printed[1:]] == ["[False, True]", "[False, True]", "True"]


# --- what can be read


class Shade(enum.Enum):
    DARK = 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(28, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.squeeze(1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(28, 4, 16, batch_first=True)
        self.head, self.itself = nn.Linear(28, 10), [self]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.squeeze(1)).mean(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        layers = nn.Conv2d(1, 2, 5), nn.BatchNorm2d(2), nn.LazyLinear(3), nn.Flatten()
        super().__init__(*layers[:2], *layers[3:], nn.Linear(1152, 10))


def resnet() -> nn.Module:
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2)
    return network


@pytest.mark.parametrize("factory", [Recurrent, Attention, Convolutions, resnet])
def test_networks_of_all_kinds_have_one_key(factory: Callable[..., nn.Module]) -> None:
    assert key(factory) == key(factory)


def test_functions_that_call_each_other_and_values_of_all_kinds_can_be_read() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n > 0 and even(n - 1)

    lists: list[Any] = [Shade.DARK, {1, "a"}, Settings(1.0), torch.float32, slice(3), Path("x")]
    lists.append(lists)

    def factory() -> nn.Module:
        return Net(float(even(4)) if lists else 0.0)

    assert key(factory) == key(factory)


def test_what_cannot_be_read_is_refused_with_its_name() -> None:
    lock = threading.Lock()
    models.register("own", lambda: Net(1.0 if lock else 0.0))
    with pytest.raises(ValueError, match=r"'own' uses .*lock.*make it inside the factory"):
        kdlib.train(recipe(), "cpu")


def test_a_network_that_refuses_the_images_is_refused_with_its_reason() -> None:
    models.register("own", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 10)))
    with pytest.raises(ValueError, match=r"'own' does not fit the dataset 'blobs'"):
        kdlib.train(recipe(), "cpu")
