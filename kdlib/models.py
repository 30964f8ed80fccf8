"""The networks of the paper and of the article, by name."""

import functools
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

_registered: dict[str, Callable[..., nn.Module]] = {}


class MLP(nn.Sequential):
    """Fully connected ReLU network: inputs -> widths -> classes, with dropout if any.

    Input (..., 1, 28, 28), output logits (..., classes). dropout: the probabilities of dropping
    an input pixel and a hidden unit. Hinton et al. 2015, section 3; rates: arXiv 1207.0580.
    """

    def __init__(
        self, widths: tuple[int, ...], classes: int = 10, dropout: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten(-3), *_dropout(dropout[0])]
        sizes = 784, *widths
        for fan_in, width in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, width), nn.ReLU(), *_dropout(dropout[1])]
        # Parts have names, which are in those of the weights, so in every stored run.
        layers.append(nn.Linear(sizes[-1], classes))
        super().__init__(OrderedDict(layers=nn.Sequential(*layers)))


class _PlaneByPlane(nn.Module):
    """Copies the convolution's output, whose channels are last in memory, to channels first.

    On a CPU, max pooling and its gradient then take half the time.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous()


class LeNet(nn.Sequential):
    """The article's teacher: two 5 x 5 convolutions (6, 16), then 120, 84, classes.

    Input (N, 1, 28, 28), output logits (N, classes). After LeCun et al. 1998, with ReLU and
    max pooling.
    """

    def __init__(self, classes: int = 10) -> None:
        features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, classes),
        )  # fmt: skip
        super().__init__(OrderedDict(features=features, classifier=classifier))


class LeNetHalf(nn.Sequential):
    """The article's student: one 5 x 5 convolution with 3 channels, then the logits.

    Input (N, 1, 28, 28), output logits (N, classes). relu_logits: end in a ReLU, as the article's
    code does, which kills classes (chapter 5); that network has a name of its own.
    """

    def __init__(self, classes: int = 10, relu_logits: bool = False) -> None:
        features = nn.Sequential(nn.Conv2d(1, 3, 5), _PlaneByPlane(), nn.ReLU(), nn.MaxPool2d(2))
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(432, classes))
        # Last in the classifier, so that both networks have weights of the same names.
        if relu_logits:
            classifier.append(nn.ReLU())
        super().__init__(OrderedDict(features=features, classifier=classifier))


_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "lenet-half": LeNetHalf,
    # A name of its own, not an option: a recipe names a network and nothing else.
    "lenet-half-relu": functools.partial(LeNetHalf, relu_logits=True),
}


def _dropout(chance: float) -> list[nn.Module]:
    return [nn.Dropout(chance)] if chance else []


def names() -> list[str]:
    """The names that `build` knows, apart from mlp-W, mlp-WxW… for any widths."""
    return [*_BUILT_IN, *_registered]


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Give your own network a name for recipes: factory() -> nn.Module.

    The network takes images as `data.to_input` makes them and returns logits. A name that is
    registered again stands for the new network. Raises ValueError for a built-in name.
    """
    # Else a recipe of the book would mean one network here and another elsewhere.
    if name in _BUILT_IN or name.startswith("mlp-"):
        raise ValueError(f"model name {name!r} is built in: choose another name")
    _registered[name] = factory


def registered(name: str) -> Callable[..., nn.Module] | None:
    """The factory that was registered under a name, or None for a built-in one."""
    return _registered.get(name)


def widths(name: str) -> tuple[int, ...] | None:
    """The hidden widths in an mlp- name, or None: "mlp-800x800" -> (800, 800)."""
    match = re.fullmatch(r"mlp-([1-9]\d*(?:x[1-9]\d*)*)", name)
    return tuple(map(int, match[1].split("x"))) if match else None


def build(name: str, **options: object) -> nn.Module:
    """A network by name, freshly initialised from PyTorch's global generator.

    name: "mlp-1200x1200" and any other widths, "lenet", "lenet-half", "lenet-half-relu", or
    a registered one. options go to the network (MLP: dropout=(input, hidden), classes).
    Raises ValueError for an unknown name, TypeError for an option that the network lacks.
    """
    hidden = widths(name)
    if hidden is not None:
        return MLP(hidden, **options)  # type: ignore[arg-type]
    factory = (_BUILT_IN | _registered).get(name)
    if factory is None:
        raise ValueError(
            f"unknown model {name!r}: expected mlp-WxW (such as mlp-800x800), {', '.join(names())}"
        )
    return factory(**options)
