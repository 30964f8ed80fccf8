"""What only a GPU can show: the captured step, its bits, its memory. Skipped without one."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import kdlib
from kdlib import data, fast, group, loop, losses, memory, models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NETS = ("mlp-32x32", "lenet-half")


@pytest.fixture(scope="module")
def digits() -> data.Split:
    """Made-up digits on the GPU: blobs whose place is their class, with noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (600,), generator=draw)
    images = torch.randint(0, 120, (600, 28, 28), generator=draw)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[4 + 2 * label : 8 + 2 * label, 8:20] += 120
    return data.Split(images.to(torch.uint8).cuda(), labels.cuda())


def network(name: str, runs: int = 1, **options: Any) -> torch.nn.Module:
    """One network, or a stack of equal ones with weights of their own."""
    torch.manual_seed(0)
    nets = [models.build(name, **options).cuda() for _ in range(runs)]
    return nets[0] if runs == 1 else loop.Stack(nets)


def train(model: torch.nn.Module, digits: data.Split, **settings: Any) -> list[Tensor]:
    """The weights after a training in which a warning is an error."""
    usual: dict[str, Any] = {"steps": 40, "batch_size": 50, "jitter": 2, "report_every": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.fit(model, [digits.images, digits.labels], losses.cross_entropy, **usual | settings)
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_captured_step_computes_what_the_step_does(
    name: str, runs: int, precision: str, digits: data.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = train(network(name, runs), digits, precision=precision)
    monkeypatch.setattr(fast, "captured", lambda step, *_: step)
    plain = train(network(name, runs), digits, precision=precision)
    assert all(map(torch.equal, captured, plain))


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_equal_calls_give_equal_bits_with_dropout_too(
    name: str, runs: int, digits: data.Split
) -> None:
    settings: dict[str, Any] = {"max_norm": 2.0, "schedule": "classic"}
    options = {"dropout": (0.2, 0.5)} if name.startswith("mlp") else {}
    first, again = (train(network(name, runs, **options), digits, **settings) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.2, 0.5)])
def test_a_resumed_training_ends_with_the_same_bits(
    dropout: tuple[float, float], digits: data.Split
) -> None:
    kept: list[dict[str, Any]] = []

    def keep(state: loop.State) -> None:
        copy = state.snapshot()
        weights = {name: weight.clone() for name, weight in copy["weights"].items()}
        velocity = [v.clone() for v in copy["velocity"]]
        curves = {name: list(values) for name, values in copy["curves"].items()}
        kept.append(copy | {"weights": weights, "velocity": velocity, "curves": curves})

    whole = train(network("mlp-32x32", dropout=dropout), digits, on_report=keep)
    resumed = train(network("mlp-32x32", dropout=dropout), digits, resume=kept[0])
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("name", NETS)
def test_stack_and_single_agree_in_float64(name: str, digits: data.Split) -> None:
    stack = network(name, 3)
    assert isinstance(stack, loop.Stack)
    singles = [network(name) for _ in range(3)]
    for single, weights in zip(singles, stack.unstack(), strict=True):
        single.load_state_dict(weights)
    train(stack, digits, precision="fp64", seed=[0, 1, 2])
    for number, (single, weights) in enumerate(zip(singles, stack.unstack(), strict=True)):
        train(single, digits, precision="fp64", seed=number)
        for key, value in single.state_dict().items():
            assert torch.allclose(value, weights[key], rtol=0, atol=1e-9)


def test_the_host_waits_for_no_step(digits: data.Split) -> None:
    def waits(steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                pair = [digits.images, digits.labels]
                settings: dict[str, Any] = {"steps": steps, "report_every": steps, "jitter": 1}
                loop.fit(network("mlp-32x32", 2), pair, losses.cross_entropy, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in said)

    assert waits(5) > 0  # reports do
    assert waits(500) == waits(5)


def test_a_step_that_cannot_be_captured_trains_without_a_graph(digits: data.Split) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert losses.cross_entropy(logits, labels).item() > 0  # waits for the GPU
        return losses.cross_entropy(logits, labels)

    model = network("mlp-32x32")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        loop.fit(model, [digits.images, digits.labels], loss, steps=40, batch_size=50)
    assert loop.count_errors(model, digits.images, digits.labels) < 300
    train(network("mlp-32x32"), digits)  # the next one is captured as ever


def test_a_loss_with_tensors_of_temperatures_is_captured_and_checked_outside_fit(
    digits: data.Split,
) -> None:
    settings = {
        "temperature": torch.tensor([2.0, 8.0]).cuda(),
        "hard_weight": torch.zeros(2).cuda(),
    }
    soft = torch.randn(2, 600, 10).cuda()

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        return losses.distillation_loss(logits, taught, labels, **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that no graph was captured
        pair = [digits.images, digits.labels, list(soft)]
        loop.fit(network("mlp-32x32", 2), pair, loss, steps=5, batch_size=50)
    settings["temperature"][1] = -1
    with pytest.raises(ValueError, match="temperature is"):
        loss(soft, digits.labels.expand(2, -1), soft)


@pytest.mark.parametrize("runs", [1, 32])
@pytest.mark.parametrize("jitter", [0, 2])
@pytest.mark.parametrize("name", ["mlp-300x300", "lenet"])
def test_a_group_takes_no_more_memory_than_planned(name: str, jitter: int, runs: int) -> None:
    device = torch.device("cuda")
    recipe = kdlib.Recipe(name, dataset="mnist-5k", steps=60, jitter=jitter, batch_size=250)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    group.train([recipe.replace(seed=seed) for seed in range(runs)], device, {})
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= memory.planned(recipe, runs, device)


def test_a_sweep_with_teachers_of_its_own_trains_on_the_gpu() -> None:
    teacher = kdlib.Recipe("mlp-64x64", dataset="mnist-5k", epochs=4, precision="bf16")
    student = kdlib.Recipe("mlp-32x32", dataset="mnist-5k", epochs=4)
    recipes = [
        student.replace(seed=seed, jitter=jitter).distil(
            teacher.replace(seed=seed), temperature=temperature
        )
        for seed in range(2)
        for temperature in (1.0, 4.0)
        for jitter in (0, 1)
    ]
    runs = kdlib.train_all(recipes, "cuda")
    assert all(run.metrics["status"] == "ok" for run in runs)
    assert all(run.metrics["test_accuracy"] > 0.6 for run in runs)
    assert all(torch.cuda.get_device_name() == run.provenance["device"] for run in runs)
