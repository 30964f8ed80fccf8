"""Registered networks that change between calls: never another one's run."""

import functools
import os
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import blobs
from torch import nn

import kdlib
from kdlib import data, models
from torture import ordeal
from torture.ordeal import Lost, Tally, Wrong

VALUES = [0.5, 1.0, 1.25]
# What stands in braces is written into the source; the rest is changed from outside.
SOURCE = """
import os
import torch
from torch import nn
NUMBER = 1.0
LISTED = [1.0]
def helper(x, by=1.0, *, more=1.0):
    return x * by * more * {in_a_function}
def unused():
    return (lambda: {in_a_lambda})()
class Base(nn.Module):
    factor = 1.0
    @property
    def doubled(self):
        return 2 * {in_a_property}
class Own(Base):
    scale = 1.0
    def __init__(self, given):
        super().__init__()
        self.layer, self.given, self.calls = nn.Linear(784, 10), given, 0
        self.register_buffer("kept", torch.tensor(float(os.environ["TORTURE_BUFFER"])))
    def forward(self, images):
        self.calls += 1
        logits = self.layer(images.flatten(-3))
        # A change that shows only after {after} steps has to be seen in the code.
        if self.calls <= {after}:
            return logits
        logits = helper(logits) * NUMBER * sum(LISTED[n] for n in range(1)) * unused()
        return logits * self.factor * self.doubled * self.scale * self.given() * self.kept
"""
IN_SOURCE = ["in_a_function", "in_a_lambda", "in_a_property"]


class Variant:
    """A network that is registered once per source, and whose other parts change in place."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.knobs = dict.fromkeys([*IN_SOURCE, *self.outside()], 1.0)
        self.register()

    def register(self) -> None:
        """Write the source anew, as a cell that is run again, and give the rest its values."""
        self.space: dict[str, Any] = {"__name__": "__main__"}
        exec(SOURCE.format(**self.knobs, after=self.after), self.space)
        self.listed, self.nested = [1.0], {"a": {"b": [1.0]}}
        self.tensor, self.array = torch.tensor(1.0), torch.ones(3).numpy()
        self.object = types.SimpleNamespace(gain=1.0)
        # Not the whole name space: its globals are to be found by what reads them.
        own, listed, nested, tensor = self.space["Own"], self.listed, self.nested, self.tensor
        array, thing = self.array, self.object
        number = 1.0

        def inner() -> float:
            return listed[0] * float(array[1]) * number * nested["a"]["b"][0]

        def rebind(value: float) -> None:
            nonlocal number
            number = value

        def factory(gain: float = 1.0) -> nn.Module:
            # Read as late as the rest: a value of the network's own would be seen at once.
            made: nn.Module = own(lambda: inner() * float(tensor) * thing.gain * gain)
            return made

        self.rebind, self.factory = rebind, factory
        for name, change in self.outside().items():
            change(self.knobs[name])
        models.register("own", functools.partial(factory, gain=1.0))

    def outside(self) -> dict[str, Callable[[float], None]]:
        """The parts that can be changed without registering again."""
        return {
            "global number": lambda value: self.space.update(NUMBER=value),
            "global list": lambda value: self.space["LISTED"].__setitem__(0, value),
            "global default": lambda value: setattr(self.space["helper"], "__defaults__", (value,)),
            "global keyword": lambda value: self.space["helper"].__kwdefaults__.update(more=value),
            "attribute of the class": lambda value: setattr(self.space["Own"], "scale", value),
            "attribute of its base": lambda value: setattr(self.space["Base"], "factor", value),
            "closure's number": lambda value: self.rebind(value),
            "closure's list": lambda value: self.listed.__setitem__(0, value),
            "closure's dictionary": lambda value: self.nested["a"]["b"].__setitem__(0, value),
            "closure's tensor": lambda value: self.tensor.fill_(value) and None,
            "closure's array": lambda value: self.array.__setitem__(1, value),
            # What no code shows: the buffer itself has to be read.
            "buffer": lambda value: os.environ.update(TORTURE_BUFFER=str(value)),
            "closure's object": lambda value: setattr(self.object, "gain", value),
        }

    def turn(self, rng: random.Random) -> str:
        """Change one part; its name."""
        name = rng.choice([*self.knobs])
        self.knobs[name] = rng.choice([value for value in VALUES if value != self.knobs[name]])
        if name in IN_SOURCE or rng.random() < 0.2:
            self.register()
        else:
            self.outside()[name](self.knobs[name])
        return name


def that_change(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Networks whose source, closure, globals or buffer change between calls."""
    data.register("blobs", blobs)
    return ordeal.repeat(a_network, rng, folder, ordeal.times(300, budget))


def a_network(rng: random.Random, folder: Path) -> int:
    """Train a network again and again, changed in one part each time, sometimes back."""
    variant = Variant(after=rng.choice([0, 10**6, 10**6, 10**6]))
    recipe = kdlib.Recipe("own", dataset="blobs", steps=2, batch_size=20, seed=rng.randrange(9))
    known: dict[str, str] = {}
    calls, name = 15, "nothing"
    for _ in range(calls):
        run, state = kdlib.train(recipe, "cpu"), repr(variant.knobs)
        if run.cached and state not in known:
            raise Wrong(f"a stale run after a change of: {name}")
        if run.cached and known[state] != ordeal.bits(run):
            raise Wrong(f"another network's run after a change of: {name}")
        if not run.cached and state in known:
            raise Lost(f"trained again, though nothing but {name} had changed, and back")
        known.setdefault(state, ordeal.bits(run))
        name = variant.turn(rng)
    return calls
