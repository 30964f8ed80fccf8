"""The networks: their shapes, their names, and the mistakes that public code makes in them."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import kdlib
from kdlib import group, losses, models

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("mlp-1200x1200", 785 * 1200 + 1201 * 1200 + 1201 * 10),
        ("mlp-800x800", 785 * 800 + 801 * 800 + 801 * 10),
        ("mlp-30x30", 785 * 30 + 31 * 30 + 31 * 10),
        ("mlp-7", 785 * 7 + 8 * 10),
        ("mlp-5x6x7", 785 * 5 + 6 * 6 + 7 * 7 + 8 * 10),
        ("lenet", 26 * 6 + (25 * 6 + 1) * 16 + 257 * 120 + 121 * 84 + 85 * 10),
        ("lenet-half", 26 * 3 + 433 * 10),
        ("lenet-half-relu", 26 * 3 + 433 * 10),
    ],
)
def test_a_network_by_name(name: str, numbers: int) -> None:
    network = models.build(name)
    assert sum(weight.numel() for weight in network.parameters()) == numbers
    logits = network(IMAGES)
    assert logits.shape == (6, 10)
    assert logits.dtype == torch.float32
    alone = network.eval()(IMAGES[:1])
    torch.testing.assert_close(alone, network(IMAGES)[:1], atol=1e-5, rtol=1e-4)


def test_an_mlp_computes_what_its_name_says() -> None:
    network = models.build("mlp-20x15").double()
    (w1, b1), (w2, b2), (w3, b3) = (
        (layer.weight, layer.bias) for layer in network.modules() if isinstance(layer, nn.Linear)
    )
    pixels = IMAGES.double().flatten(1)
    hidden = (((pixels @ w1.T + b1).clamp(min=0)) @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(network(IMAGES.double()), hidden @ w3.T + b3)


def test_the_lenets_compute_what_the_article_describes() -> None:
    for name, kernels in (("lenet", 2), ("lenet-half", 1)):
        network = models.build(name).double()
        values = iter(network.parameters())
        x = IMAGES.double()
        for _ in range(kernels):
            x = nn.functional.conv2d(x, next(values), next(values)).relu()
            x = nn.functional.max_pool2d(x, 2)
        x, rest = x.flatten(1), list(values)
        for number in range(0, len(rest), 2):
            x = x @ rest[number].T + rest[number + 1]
            x = x.relu() if number + 2 < len(rest) else x
        torch.testing.assert_close(network(IMAGES.double()), x)


@pytest.mark.parametrize(
    "name", ["mlp-", "mlp-0", "mlp-08", "mlp-8x", "mlp-8x-8", "mlp-8.5", "MLP-8", "lenet-", ""]
)
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{name}': expected .*lenet-half-relu"):
        models.build(name)


def test_widths_are_read_from_the_name() -> None:
    assert models.widths("mlp-1200x1200") == (1200, 1200)
    assert models.widths("mlp-3") == (3,)
    assert models.widths("lenet") is None


def test_options_go_to_the_network() -> None:
    assert models.build("mlp-8", classes=4)(IMAGES).shape == (6, 4)
    assert models.build("lenet", classes=4)(IMAGES).shape == (6, 4)
    with pytest.raises(TypeError, match="depth"):
        models.build("mlp-8", depth=3)


def test_registered_networks_are_built_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_registered", {})

    def linear(classes: int = 10) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))

    models.register("linear", linear)
    assert "linear" in models.names()
    assert models.registered("linear") is linear
    assert models.build("linear", classes=3)(IMAGES).shape == (6, 3)
    assert kdlib.Recipe("linear").model == "linear"
    for name in ("lenet", "mlp-9", "mlp-mine"):
        with pytest.raises(ValueError, match=f"'{name}' is built in"):
            models.register(name, linear)


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    recipe = kdlib.Recipe("mlp-8", seed=3)
    before = torch.get_rng_state()
    first, second = group.build(recipe), group.build(recipe)
    other = group.build(recipe.replace(seed=4))
    assert torch.equal(before, torch.get_rng_state())
    for mine, same, another in zip(
        first.parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, another)


def test_fp64_doubles_the_network() -> None:
    network = group.build(kdlib.Recipe("mlp-8", precision="fp64"))
    assert {weight.dtype for weight in network.parameters()} == {torch.float64}


def kept(layer: nn.Module) -> float:
    """The share of a million ones that a dropout lets through."""
    torch.manual_seed(0)
    return (layer.train()(torch.ones(10**6)) > 0).float().mean().item()


def test_bug_dropout_of_eight_tenths_where_two_tenths_were_meant() -> None:
    network = group.build(kdlib.Recipe("mlp-20x20", dropout=(0.2, 0.5)))
    kinds = [type(layer).__name__ for layer in network.layers]
    hidden = ["Linear", "ReLU", "Dropout"]
    assert kinds == ["Flatten", "Dropout", *hidden, *hidden, "Linear"]
    drops = [layer for layer in network.layers if isinstance(layer, nn.Dropout)]
    assert [round(kept(layer), 2) for layer in drops] == [0.8, 0.5, 0.5]
    assert round(kept(nn.Dropout(0.8)), 2) == 0.2  # keeping 0.8 written as dropping 0.8
    assert not any(isinstance(layer, nn.Dropout) for layer in models.build("mlp-20x20").modules())


def test_bug_a_relu_on_the_logits() -> None:
    for name in ("mlp-30x30", "lenet", "lenet-half"):
        logits = group.build(kdlib.Recipe(name))(IMAGES)
        assert (logits < 0).any()  # so neither a ReLU nor a softmax is last
        assert (logits.sum(-1) - 1).abs().max() > 1e-3
    article, plain = models.build("lenet-half-relu"), models.build("lenet-half")
    plain.load_state_dict(article.state_dict())
    torch.testing.assert_close(article(IMAGES), plain(IMAGES).relu())
    for network, learns in ((article, False), (plain, True)):
        with torch.no_grad():
            network.classifier[1].bias[3] = -100.0  # the logit of class 3 is below zero
        network.zero_grad()
        losses.cross_entropy(network(IMAGES), torch.full((6,), 3)).backward()
        assert bool(network.classifier[1].weight.grad[3].any()) is learns  # dead is dead


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_spin_for_a_short_while_unless_told_otherwise(given: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": given} if given else {}
    code = "import os, kdlib; print(os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (given or "20000")
