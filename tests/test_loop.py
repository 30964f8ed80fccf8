"""The one training loop against float64 NumPy, alone and stacked, cut short and resumed."""

import copy
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from helpers import blobs, numbers
from torch import Tensor, nn

import kdlib
from kdlib import batches, fast, loop, losses, models, sgd
from kdlib.precision import settings

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = blobs(train=120, test=40)
CE = losses.cross_entropy


def network(name: str = "mlp-16", seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(name, **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


class Watch:
    """A loss that also takes the samples' numbers, and notes them batch by batch."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        self.batches.append(ids.clone())
        value = CE(logits, labels)
        self.values.append(value.detach())
        return value

    @property
    def stream(self) -> list[int]:
        return torch.cat(self.batches).tolist()


# --- the mathematics


def rate_and_mass(schedule: str, at: float, rate: float, mass: float) -> tuple[float, float]:
    """Learning rate and momentum after a share `at` of the steps, written anew."""
    if schedule == "constant":
        return rate, mass
    if schedule == "cosine":
        return rate * (1 + math.cos(math.pi * at)) / 2, mass
    if schedule == "one-cycle":
        rising = 5 * at + 0.01
        falling = (1 + math.cos(math.pi * (at / 0.8 - 0.25))) / 2
        return rate * (rising if at < 0.2 else falling), mass
    mass = mass * (0.5 + 3 * at if at < 1 / 6 else 1)
    return rate * math.exp(3000 * at * math.log(0.998)) * (1 - mass), mass


def softmax_regression(
    inputs: np.ndarray,
    labels: np.ndarray,
    start: np.ndarray,
    batches: list[np.ndarray],
    setting: tuple[str, float, float],
    forget_every: int | None = None,
) -> np.ndarray:
    """Nesterov's method by hand; forget_every: lose the velocity after so many steps."""
    value, velocity = start.copy(), np.zeros_like(start)
    for step, ids in enumerate(batches):
        if forget_every and step % forget_every == 0:
            velocity[:] = 0
        rate, mass = rate_and_mass(setting[0], step / len(batches), *setting[1:])
        logits = inputs[ids] @ value.T
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        share[np.arange(len(ids)), labels[ids]] -= 1
        slope = share.T @ inputs[ids] / len(ids)
        velocity = mass * velocity + rate * slope
        value = value - rate * slope - mass * velocity
    return value


def regression(
    schedule: str, rate: float, mass: float, forget_every: int | None = None
) -> tuple[float, float]:
    """The gap between the loop and NumPy after four epochs, and how far the weights moved."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(30) % 3
    model = nn.Linear(5, 3, bias=False).double()
    start = model.weight.detach().numpy().copy()
    watch = Watch()
    loop.fit(
        model,
        (inputs, labels, torch.arange(30)),
        watch,
        epochs=4,
        batch_size=6,
        learning_rate=rate,
        momentum=mass,
        schedule=schedule,
        precision="fp64",
    )
    batches = [ids.numpy() for ids in watch.batches]
    expected = softmax_regression(
        inputs.numpy(), labels.numpy(), start, batches, (schedule, rate, mass), forget_every
    )
    end = model.weight.detach().numpy()
    return np.abs(end - expected).max(), np.abs(end - start).max()


@pytest.mark.parametrize("mass", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle", "classic"])
def test_the_loop_is_nesterovs_method(schedule: str, mass: float) -> None:
    difference, moved = regression(schedule, 0.2, mass)
    assert difference < 1e-13
    assert moved > 0.01


def test_bug_the_optimiser_made_anew_each_epoch_loses_its_momentum() -> None:
    assert regression("constant", 0.2, 0.9)[0] < 1e-13
    assert regression("constant", 0.2, 0.9, forget_every=5)[0] > 0.01  # each epoch
    assert regression("constant", 0.2, 0.9, forget_every=1)[0] > 0.01  # each batch


def test_per_run_momentum_is_nesterovs_method_too() -> None:
    """Runs with momenta of their own leave PyTorch's fused SGD for another path."""
    stack = kdlib.Stack([network(seed=run).double() for run in range(2)])
    loop.fit(stack, (IMAGES, LABELS), CE, epochs=2, batch_size=16, momentum=[0.9, 0.5],
             precision="fp64")  # fmt: skip
    for run, momentum in enumerate([0.9, 0.5]):
        alone = network(seed=run).double()
        loop.fit(alone, (IMAGES, LABELS), CE, epochs=2, batch_size=16, momentum=momentum,
                 precision="fp64")  # fmt: skip
        assert gap(weights(alone), list(stack.unstack()[run].values())) < 1e-12


def test_any_network_any_tensors_any_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 4, generator=generator)
    slope = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    model = nn.Linear(4, 1)
    curves = kdlib.fit(
        model,
        (inputs, inputs @ slope.T + 1),
        lambda outputs, targets: (outputs - targets).square().mean(),
        epochs=30,
        batch_size=20,
        learning_rate=0.05,
    )
    torch.testing.assert_close(model.weight, slope, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.bias, torch.ones(1), atol=1e-3, rtol=0)
    assert set(curves) == {"step", "train_loss"}  # no labels, no accuracy
    assert not model.training


# --- which samples, in which order


@pytest.mark.parametrize("batch_size", [7, 30, 64])
def test_each_pass_sees_each_sample_once_in_a_new_order(batch_size: int) -> None:
    watch = Watch()
    inputs, ids = torch.randn(30, 4), torch.arange(30)
    loop.fit(nn.Linear(4, 2), (inputs, ids % 2, ids), watch, epochs=6, batch_size=batch_size)
    assert len(watch.batches) == round(6 * 30 / batch_size)
    assert {len(batch) for batch in watch.batches} == {batch_size}
    passes = [watch.stream[start : start + 30] for start in range(0, len(watch.stream) - 29, 30)]
    assert all(sorted(samples) == list(range(30)) for samples in passes)
    assert len({tuple(samples) for samples in passes}) == len(passes) > 1


def stream(**settings: Any) -> list[int]:
    watch, ids = Watch(), torch.arange(30)
    loop.fit(nn.Linear(4, 2), (torch.ones(30, 4), ids % 2, ids), watch, batch_size=6, **settings)
    return watch.stream


def test_the_seed_decides_the_order() -> None:
    assert stream(steps=9, seed=1) == stream(steps=9, seed=1)
    assert stream(steps=9, seed=1) != stream(steps=9, seed=2)
    assert stream(steps=9, seed=1) == stream(steps=9, seed=1, report_every=2)
    assert stream(steps=20, seed=1)[:54] == stream(steps=9, seed=1)


def test_only_the_rows_asked_for_are_seen() -> None:
    rows = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    seen = stream(epochs=3, rows=rows)
    assert len(seen) == 30  # an epoch is a pass over the rows
    assert sorted(seen[:10]) == rows.tolist()


def test_long_trainings_are_drawn_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream(steps=23)
    monkeypatch.setattr(batches, "BLOCK", 4)
    assert stream(steps=23) == whole


def test_the_curves_are_means_over_what_was_trained() -> None:
    watch, model = Watch(), network()
    seen: list[tuple[int, int]] = []
    curves = loop.fit(
        model,
        (IMAGES, LABELS, torch.arange(120)),
        watch,
        steps=10,
        batch_size=16,
        report_every=4,
        evaluate={"test": (TEST_IMAGES, TEST_LABELS), "train": (IMAGES, LABELS)},
        on_report=lambda state: seen.append((state.step, state.steps)),
    )
    assert curves["step"] == [4, 8, 10]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    values = torch.stack(watch.values)
    means = [values[0:4].mean(), values[4:8].mean(), values[8:10].mean()]
    torch.testing.assert_close(torch.tensor(curves["train_loss"]), torch.stack(means))
    with torch.no_grad():
        answers = model(kdlib.data.to_input(TEST_IMAGES)).argmax(-1)
    assert curves["test_errors"][-1] == int((answers != TEST_LABELS).sum())
    assert set(curves) == {"step", "train_loss", "train_accuracy", "test_errors", "train_errors"}
    assert all(0 <= share <= 1 for share in curves["train_accuracy"])


def test_train_accuracy_counts_right_answers() -> None:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    inputs = torch.eye(3)[[0, 1, 2, 0]] * 9
    wrong_once = torch.tensor([0, 1, 2, 1])
    curves = loop.fit(
        model, (inputs, wrong_once), CE, steps=3, batch_size=4, learning_rate=1e-9, momentum=0
    )
    assert curves["train_accuracy"] == [0.75] * 3


# --- bits


def trained(seed: int = 0, **settings: Any) -> list[Tensor]:
    model = network(dropout=(0.2, 0.5))
    kind = {"epochs": 2, "batch_size": 16, "jitter": 2, "max_norm": 1.0, "seed": seed}
    loop.fit(model, (IMAGES, LABELS), CE, **kind | settings)
    return weights(model)


def test_the_same_call_gives_the_same_bits() -> None:
    first = trained()
    torch.manual_seed(99)
    torch.rand(7)
    assert same(first, trained())
    assert not same(first, trained(seed=1))


def test_a_training_leaves_pytorch_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        before = torch.get_rng_state()
        trained(precision="tf32", steps=2)
        trained(precision="fp32", steps=2)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32", "fp64"])
def test_each_precision_trains(precision: str) -> None:
    model = network()
    curves = loop.fit(model, (IMAGES, LABELS), CE, epochs=4, batch_size=8, precision=precision)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert curves["train_loss"][-1] < 0.5 * curves["train_loss"][0]


def snapshots(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    loop.fit(
        model,
        (IMAGES, LABELS),
        CE,
        steps=20,
        batch_size=16,
        report_every=6,
        on_report=lambda state: taken.append(copy.deepcopy(state.snapshot())),
        **settings,
    )
    return taken


@pytest.mark.parametrize("momentum", [0.9, [0.9, 0.5, 0.0]])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_training_resumed_has_the_bits_of_one_that_was_not(
    stacked: bool, momentum: float | list[float]
) -> None:
    if not stacked and isinstance(momentum, list):
        momentum = 0.5

    def fresh() -> nn.Module:
        runs = [network(dropout=(0.2, 0.5), seed=seed) for seed in range(3)]
        return kdlib.Stack(runs) if stacked else runs[0]

    settings: dict[str, Any] = {
        "momentum": momentum, "jitter": [2, 0, 1] if stacked else 2, "max_norm": 1.0,
        "learning_rate": [0.1, 0.2, 0.05] if stacked else 0.1,
        "seed": [4, 5, 6] if stacked else 4, "evaluate": {"test": (TEST_IMAGES, TEST_LABELS)},
    }  # fmt: skip
    model = fresh()
    taken = snapshots(model, **settings)
    assert [snapshot["step"] for snapshot in taken] == [6, 12, 18, 20]
    for snapshot in taken[:3]:
        again = fresh()
        left = snapshots(again, resume=copy.deepcopy(snapshot), **settings)
        assert same(weights(model), weights(again))
        assert left[-1]["curves"] == taken[-1]["curves"]
        assert [one["step"] for one in left] == [s for s in (12, 18, 20) if s > snapshot["step"]]


def test_a_velocity_without_gradients_comes_to_rest() -> None:
    """It would end as a denormal number, at which a CPU is slow; the others are left alone."""
    model = network()
    unit = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        unit.bias[0] = -1e3  # never active
    faint = snapshots(model, momentum=0.5)[0]
    faint["velocity"][0][0] = 1e-29
    *_, last = snapshots(network(), momentum=0.5, resume=faint)
    assert (last["velocity"][0][0] == 0).all()
    assert (last["velocity"][0][1:] != 0).any()


# --- stacks


def test_a_stack_is_its_networks() -> None:
    for name in ("mlp-16", "lenet", "lenet-half-relu"):
        runs = [network(name, seed=seed).eval() for seed in range(3)]
        stack = kdlib.Stack(runs).eval()
        inputs = torch.rand(3, 5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            stack(inputs), torch.stack([run(x) for run, x in zip(runs, inputs, strict=True)])
        )
        torch.testing.assert_close(
            stack(inputs[0], shared=True), torch.stack([run(inputs[0]) for run in runs])
        )
        for run, back in zip(runs, stack.unstack(), strict=True):
            assert list(back) == list(run.state_dict())
            assert same(list(run.state_dict().values()), list(back.values()))


def kinds() -> dict[str, list[Any]]:
    """What three runs of a stack have of their own."""
    halves = torch.arange(120)
    return {
        "learning_rate": [0.1, 0.03, 0.2],
        "momentum": [0.9, 0.5, 0.0],
        "rows": [halves[::2], halves[1::2], halves[60:]],
        "seed": [3, 14, 15],
        "jitter": [0, 2, 1],
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_norm": 0.8},
        {"schedule": "classic", "learning_rate": [1.0, 2.0, 0.5]},
        {"momentum": 0.9},
        {"learning_rate": 0.1, "momentum": 0.9, "rows": None, "seed": 5, "jitter": 0},
    ],
)
@pytest.mark.parametrize("name", ["mlp-16x12", "lenet-half"])
def test_stack_and_single_agree_in_float64(name: str, settings: dict[str, Any]) -> None:
    own = kinds() | settings
    taught = [torch.randn(120, 10, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    temperature, hard = torch.tensor([[1.1, 4, 20], [0, 0.3, 1]], dtype=torch.float64)

    def loss(t: Any, h: Any) -> Callable[..., Tensor]:
        return lambda logits, labels, soft: losses.distillation_loss(
            logits, soft, labels, temperature=t, hard_weight=h
        )

    def fit(model: nn.Module, soft: Any, of: Callable[..., Tensor], its: dict[str, Any]) -> Any:
        return loop.fit(
            model, (IMAGES, LABELS, soft), of, steps=15, batch_size=20, precision="fp64",
            evaluate={"test": (TEST_IMAGES, TEST_LABELS)}, **its,
        )  # fmt: skip

    stack = kdlib.Stack([network(name, seed=seed).double() for seed in range(3)])
    together = fit(stack, taught, loss(temperature, hard), own)
    for run, state in enumerate(stack.unstack()):
        alone = network(name, seed=run).double()
        start = weights(alone)
        its = {key: v[run] if isinstance(v, list) else v for key, v in own.items()}
        curves = fit(alone, taught[run], loss(*(float(v[run]) for v in (temperature, hard))), its)
        assert gap(weights(alone), list(state.values())) < 1e-10
        assert gap(weights(alone), start) > 1e-3
        for key, values in curves.items():
            mine = [v if key == "step" else v[run] for v in together[key]]
            np.testing.assert_allclose(mine, values, rtol=1e-9)


def test_dropout_differs_from_run_to_run() -> None:
    """Three times one network, one seed, one order: only dropout can tell the runs apart."""

    def spread(chance: float) -> float:
        stack = kdlib.Stack([network(dropout=(0.0, chance)).double() for _ in range(3)])
        loop.fit(stack, (IMAGES, LABELS), CE, epochs=1, batch_size=20, precision="fp64")
        first, second, third = (list(state.values()) for state in stack.unstack())
        return min(gap(first, second), gap(second, third), gap(first, third))

    assert spread(0.5) > 1e-3
    assert spread(0.0) == 0


def test_dropout_is_drawn_anew_after_each_report() -> None:
    masks: list[Tensor] = []
    model = Seen(drop=0.5)
    model.drop.register_forward_hook(
        lambda drop, _, out: masks.append(out == 0) if drop.training else None
    )
    white = torch.full((40, 28, 28), 255, dtype=torch.uint8)
    loop.fit(model, (white, LABELS[:40]), CE, steps=8, batch_size=4, report_every=2)
    assert len(masks) == len({mask.numpy().tobytes() for mask in masks}) == 8


def test_a_run_that_diverges_spoils_no_other() -> None:
    def train(*rates: float) -> tuple[list[list[Tensor]], kdlib.loop.Curves]:
        stack = kdlib.Stack([network(seed=run).double() for run in range(len(rates))])
        curves = loop.fit(
            stack, (IMAGES, LABELS), CE, epochs=3, batch_size=20, learning_rate=rates,
            seed=list(range(len(rates))), max_norm=2.0, precision="fp64",
        )  # fmt: skip
        return [list(state.values()) for state in stack.unstack()], curves

    ruined, curves = train(0.1, 0.05, 1e200)
    whole, _ = train(0.1, 0.05, 0.1)
    without, _ = train(0.1, 0.05)
    assert not all(weight.isfinite().all() for weight in ruined[2])
    assert not math.isfinite(curves["train_loss"][-1][2])
    assert curves["step"][-1] == 18  # the others went on
    for run in range(2):
        assert all(math.isfinite(values[run]) for values in curves["train_loss"])
        assert same(ruined[run], whole[run])
        assert gap(ruined[run], without[run]) < 1e-12


def test_a_training_that_diverged_ends_early() -> None:
    curves = loop.fit(network(), (IMAGES, LABELS), CE, epochs=50, batch_size=20, learning_rate=1e30)
    assert curves["step"][-1] < 50 * 6 / 2
    assert not math.isfinite(curves["train_loss"][-1])


def test_a_training_that_stops_early_warns() -> None:
    images = torch.full((120, 1, 28, 28), math.nan)
    with pytest.warns(loop.Diverged, match="stopped after 6 of 300 steps: its loss is not finite"):
        loop.fit(network(), (images, LABELS), CE, epochs=50, batch_size=20, report_every=6)


def test_without_what_makes_it_fast_the_loop_trains_the_same_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(stacked: bool) -> list[Tensor]:
        runs = [network("mlp-12x12", seed=seed).double() for seed in range(2)]
        model = kdlib.Stack(runs) if stacked else runs[0]
        loop.fit(model, (IMAGES, LABELS), CE, epochs=4, batch_size=20, jitter=1, precision="fp64")
        return weights(model)

    quick = train(False), train(True)
    plain: dict[str, Any] = {
        "prepared": lambda step, *_: step,
        "fused_update": lambda w, v, momentum: sgd.update_rule(w, v, torch.tensor(momentum), False),
        "transposed_in_memory": lambda weight: weight,
        "without_denormals": lambda velocity: None,
    }
    calls = dict.fromkeys(plain, 0)

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return plain[name](*arguments)

        return call

    for name in plain:
        monkeypatch.setattr(fast, name, counted(name))
    for one, other in zip(quick, (train(False), train(True)), strict=True):
        assert gap(one, other) < 1e-12
    assert all(calls.values())


def test_a_trainings_settings_leave_cudnn_on() -> None:
    """PyTorch's own context manager switches it off unless it is told not to."""
    with settings("fp32", torch.device("cpu")):
        assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("name", ["mlp-8x8", "lenet-half"])
def test_a_stacks_weights_lie_as_their_gradients_do(name: str) -> None:
    """Else each step would copy all of them, a third of its time on a GPU."""
    stack = loop.Stack([models.build(name) for _ in range(3)])
    logits = stack(torch.rand(3, 5, 1, 28, 28))
    weights = list(stack.parameters())
    for weight, gradient in zip(
        weights, torch.autograd.grad(logits.square().sum(), weights), strict=True
    ):
        assert weight.stride() == gradient.stride()


def test_the_fused_update_copies_none_of_a_stacks_weights() -> None:
    runs = [network("mlp-12x12", seed=seed) for seed in range(2)]
    profiler = torch.profiler.profile()

    def on_report(state: loop.State) -> None:
        if state.step < state.steps:
            profiler.start()
        else:
            profiler.stop()

    stack = kdlib.Stack(runs)
    loop.fit(
        stack, (IMAGES, LABELS), CE, steps=4, batch_size=20, report_every=2, on_report=on_report
    )
    updates = [event for event in profiler.events() or [] if event.name == "aten::_fused_sgd_"]
    assert [update.cpu_children for update in updates] == [[], []]


MIXED = {
    "mlp": lambda: (network("mlp-12x12"), (1, 28, 28)),
    "lenet": lambda: (network("lenet"), (1, 28, 28)),
    "a layer alone": lambda: (nn.Linear(8, 4), (8,)),  # its parameters have no other name
    "PReLU": lambda: (nn.Sequential(nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 4)), (8,)),
    "convolution": lambda: (
        nn.Sequential(
            nn.Linear(8, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3),
            nn.ConvTranspose2d(2, 1, 3), nn.Flatten(), nn.Linear(16, 4),
        ),
        (8,),
    ),
    "tied": lambda: (Tied(), (1, 28, 28)),
    "float64": lambda: (network("mlp-12x12").double(), (1, 28, 28)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_a_stack_in_bf16_computes_what_its_networks_do(name: str) -> None:
    """Each layer in the same precision: vmap hides from autocast what it would convert."""
    torch.manual_seed(0)
    alone, shape = MIXED[name]()
    stack = kdlib.Stack([alone, alone])
    inputs = torch.rand(2, 5, *shape, dtype=next(alone.parameters()).dtype)

    def outputs(model: nn.Module, watched: nn.Module) -> tuple[Tensor, list[torch.dtype]]:
        seen: list[torch.dtype] = []
        layers = [layer for layer in watched.modules() if not list(layer.children())]
        hooks = [
            layer.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
            for layer in layers
        ]
        with torch.autocast("cpu", torch.bfloat16):
            if model is stack:
                logits = stack(inputs)
            else:
                logits = torch.stack([model(batch) for batch in inputs])
        for hook in hooks:
            hook.remove()
        return logits, seen[: len(layers)]

    expected, of_layers = outputs(alone, alone)
    logits, of_stack = outputs(stack, stack._skeleton[0])
    assert of_stack == of_layers
    logits.double().sum().backward()
    # A stack rounds twice, a layer's product and its sum with the bias.
    exact = expected.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12 if exact else 2**-7)


@pytest.mark.parametrize("stacked", [False, True])
def test_frozen_weights_stay_as_they_are(stacked: bool) -> None:
    runs = [network("mlp-12x12", seed=seed) for seed in range(2)]
    for run in runs:
        next(run.parameters()).requires_grad_(False)
    model = kdlib.Stack(runs) if stacked else runs[0]
    before = weights(model)
    loop.fit(model, (IMAGES, LABELS), CE, steps=5, batch_size=20, max_norm=0.1)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert moved == [False, *[True] * 5]


def test_targets_that_are_no_labels_are_not_counted() -> None:
    """One token per place, say: int64, and no label of a sample."""
    tokens = LABELS[:, None].repeat(1, 3)

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return CE(logits, tokens[:, 0])

    curves = loop.fit(network(), (IMAGES, tokens), loss, steps=3, batch_size=20)
    assert "train_accuracy" not in curves


@pytest.mark.parametrize("part", ["cuda.matmul", "cudnn.conv"])
def test_tf32_that_cannot_be_put_back_is_refused(part: str) -> None:
    operation = attrgetter(part)(torch.backends)
    operation.fp32_precision = "ieee" if part == "cudnn.conv" else "tf32"
    with pytest.raises(RuntimeError, match=r'cannot put back.*precision\("highest"\)'):
        loop.fit(network(), (IMAGES, LABELS), CE, steps=3, batch_size=20)
    # What the message says:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    loop.fit(network(), (IMAGES, LABELS), CE, steps=3, batch_size=20)


def test_networks_that_are_frozen_differently_make_no_stack() -> None:
    runs = [network(), network()]
    next(runs[0].parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"some MLP have frozen weights .* the same ones in all"):
        kdlib.Stack(runs)


def test_networks_with_buffers_make_no_stack() -> None:
    runs = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"has buffers or .* \(1.running_mean.*one at a time"):
        kdlib.Stack(runs)
    loop.fit(runs[0], (IMAGES, LABELS), CE, steps=2, batch_size=8)  # alone it trains


class Tied(nn.Module):
    """Two layers that share their weights, and optionally a view of them."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.inputs, self.first, self.second = (nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.second.weight = self.first.weight
        self.view = nn.Parameter(self.first.weight.data[:1]) if view else None

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(self.inputs(images.flatten(-3))).relu())


def test_tied_weights_train_in_a_stack_as_they_do_alone() -> None:
    labels = LABELS % 8
    torch.manual_seed(0)
    runs = [Tied().double() for _ in range(2)]
    stack = kdlib.Stack(runs)
    loop.fit(stack, (IMAGES, labels), CE, epochs=2, batch_size=20, precision="fp64", seed=[0, 1])
    for seed, (alone, state) in enumerate(zip(runs, stack.unstack(), strict=True)):
        loop.fit(alone, (IMAGES, labels), CE, epochs=2, batch_size=20, precision="fp64", seed=seed)
        assert alone.state_dict().keys() == state.keys()
        assert gap(list(alone.state_dict().values()), list(state.values())) < 1e-12


def test_parameters_that_are_views_make_no_stack() -> None:
    with pytest.raises(ValueError, match="Tied has buffers or parameters that are views"):
        kdlib.Stack([Tied(view=True) for _ in range(2)])


# --- max-norm and jitter


@pytest.mark.parametrize("name", ["mlp-16x12", "lenet"])
@pytest.mark.parametrize("stacked", [False, True])
def test_bug_max_norm_limits_the_length_of_each_hidden_units_weights(
    name: str, stacked: bool
) -> None:
    runs = [network(name, seed=seed) for seed in range(2)]
    model = kdlib.Stack(runs) if stacked else runs[0]
    loop.fit(model, (IMAGES, LABELS), CE, epochs=3, batch_size=20, max_norm=0.5)
    states = model.unstack() if isinstance(model, kdlib.Stack) else [model.state_dict()]
    for state in states:
        *hidden, last = [weight for weight in state.values() if weight.dim() > 1]
        lengths = torch.cat([weight.flatten(1).norm(dim=1) for weight in hidden])
        assert lengths.max() <= 0.5 + 1e-6
        assert (lengths > 0.4999).sum() > 3  # reached, so 0.5 bounds the length, not its square
        assert (lengths.square() > 0.2499).any()
        assert last.norm(dim=1).max() > 0.5  # the logits' own weights are free


class Seen(nn.Module):
    """A network that notes the images it is shown, and whether to train."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.drop = nn.Dropout(drop)
        self.images: list[Tensor] = []
        self.modes: list[tuple[bool, bool]] = []  # in train mode, with gradients

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        if self.training:
            self.images.append(images.detach().clone())
        return self.layer(self.drop(images.flatten(1)))


def test_jitter_moves_each_sample_anew_by_up_to_n_pixels() -> None:
    dots = torch.zeros(50, 28, 28, dtype=torch.uint8)
    dots[:, 14, 10] = 255
    model, ids, watch = Seen(), torch.arange(50), Watch()
    loop.fit(model, (dots, ids % 2, ids), watch, epochs=40, batch_size=25, jitter=2)
    images = torch.cat(model.images).squeeze(1)
    place = images.flatten(1).argmax(1)
    shifts = torch.stack([place // 28 - 14, place % 28 - 10], 1)
    assert torch.equal(images.sum((1, 2)), torch.ones(2000))  # the dot is moved, nothing else
    assert shifts.abs().max() == 2
    counts = torch.zeros(25).index_add_(0, (shifts + 2) @ torch.tensor([5, 1]), torch.ones(2000))
    assert (counts - 80).abs().max() < 45  # five deviations of a fair draw of 25 places
    of_one = shifts[torch.tensor(watch.stream) == 7]
    assert len(of_one.unique(dim=0)) > 10  # not one place a sample
    assert len(shifts[:25].unique(dim=0)) > 5  # nor one a batch


def test_without_jitter_images_stay() -> None:
    model, watch = Seen(), Watch()
    loop.fit(model, (IMAGES, LABELS, torch.arange(120)), watch, steps=4, batch_size=20)
    expected = kdlib.data.to_input(IMAGES[watch.stream])
    assert torch.equal(torch.cat(model.images), expected)


# --- mistakes that public loops make


def test_bug_teacher_logits_cached_by_batch_under_a_shuffle() -> None:
    """Each sample arrives with its own target, pass after pass, and in rows of a stack."""
    taught = torch.arange(120.0)[:, None].expand(120, 10)
    right: list[bool] = []
    by_batch: list[bool] = []

    def loss(logits: Tensor, labels: Tensor, soft: Tensor, images: Tensor) -> Tensor:
        own = numbers(images.flatten(0, -3))
        right.append(torch.equal(own, soft[..., 0].long().flatten()))
        number = len(right) % 6
        by_batch.append(torch.equal(own[:20], torch.arange(120)[number * 20 : number * 20 + 20]))
        return losses.distillation_loss(logits, soft, labels, temperature=4, hard_weight=0.5)

    for model in (network(), kdlib.Stack([network(seed=seed) for seed in range(2)])):
        right.clear()
        loop.fit(model, (IMAGES, LABELS, taught, IMAGES), loss, epochs=3, batch_size=20)
        assert len(right) == 18
        assert all(right)
        assert not any(by_batch)


def test_bug_the_teachers_dropout_left_on() -> None:
    teacher = network(dropout=(0.2, 0.5), seed=1).train()
    before = weights(teacher)
    noted: list[tuple[Tensor, Tensor]] = []

    def loss(logits: Tensor, labels: Tensor, images: Tensor, soft: Tensor) -> Tensor:
        noted.append((images, soft))
        return losses.soft_loss(logits, soft, 4)

    loop.fit(network(), (IMAGES, LABELS, IMAGES), loss, epochs=2, batch_size=20, teacher=teacher)
    teacher.eval()
    for images, soft in noted:
        assert torch.equal(soft, teacher(kdlib.data.to_input(images)))
        assert not soft.requires_grad
    teacher.train()
    assert not torch.equal(noted[0][1], teacher(kdlib.data.to_input(noted[0][0])))
    assert same(before, weights(teacher))


def test_the_teacher_sees_the_moved_images() -> None:
    """Targets of the translated image, not of the original."""
    student, teacher = Seen(), Seen()
    shown: list[Tensor] = []
    teacher.layer.register_forward_pre_hook(lambda _, images: shown.append(images[0]))
    settings: dict[str, Any] = {"steps": 5, "batch_size": 20, "jitter": 2, "teacher": teacher}
    loop.fit(student, (IMAGES, LABELS), lambda z, _, t: losses.soft_loss(z, t, 4), **settings)
    assert torch.equal(torch.cat(shown), torch.cat(student.images).flatten(1))


def test_bug_a_graph_through_the_teacher_trains_it() -> None:
    teacher = network(seed=1)
    before = weights(teacher)
    asked: list[bool] = []

    def loss(logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
        asked.append(soft.requires_grad)
        return losses.soft_loss(logits, soft, 4)

    loop.fit(network(), (IMAGES, LABELS), loss, steps=3, batch_size=20, teacher=teacher)
    assert asked == [False] * 3
    assert same(before, weights(teacher))
    assert all(weight.grad is None for weight in teacher.parameters())
    wrong = teacher(kdlib.data.to_input(IMAGES))
    losses.soft_loss(network()(kdlib.data.to_input(IMAGES)), wrong, 4).backward()
    assert all(weight.grad is not None for weight in teacher.parameters())  # it would learn


def test_bug_the_student_left_in_eval_mode_after_the_first_evaluation() -> None:
    model = Seen(drop=0.5)
    loop.fit(
        model, (IMAGES, LABELS), CE, steps=9, batch_size=20, report_every=3,
        evaluate={"test": (TEST_IMAGES, TEST_LABELS)},
    )  # fmt: skip
    assert model.modes == ([(True, True)] * 3 + [(False, False)]) * 3
    assert not model.training


# --- what users bring


class Outputs(nn.Module):
    """A network that does not return a tensor of logits."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Any:
        logits = self.layer(images.flatten(1))
        return {"logits": logits} if self.kind is dict else (logits, logits)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_network_that_returns_no_tensor_is_refused_in_a_line(kind: type) -> None:
    with pytest.raises(ValueError, match=rf"the Outputs returns a {kind.__name__}: expected a t"):
        loop.fit(Outputs(kind), (IMAGES, LABELS), CE, steps=1)
    with pytest.raises(ValueError, match=rf"the Outputs returns a {kind.__name__}"):
        loop.fit(network(), (IMAGES, LABELS), CE, steps=1, teacher=Outputs(kind))


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_teacher_of_another_precision_gives_the_students_its_logits(precision: str) -> None:
    teacher, seen = network(seed=1), []

    def loss(logits: Tensor, labels: Tensor, images: Tensor, taught: Tensor) -> Tensor:
        seen.append((images, taught))
        assert taught.dtype == logits.dtype
        return losses.soft_loss(logits, taught, 4.0)

    loop.fit(network(), (IMAGES, LABELS, IMAGES), loss, steps=2, batch_size=20,
             precision=precision, teacher=teacher)  # fmt: skip
    images, taught = seen[0]
    expected = loop.predict(teacher, images)
    torch.testing.assert_close(taught.float(), expected, atol=0.05, rtol=0.05)


def test_a_data_loader_is_refused_with_what_to_pass() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS))
    with pytest.raises(ValueError, match=r"data hold a .*pass the tensors of its dataset"):
        loop.fit(network(), loader, CE, steps=1)  # type: ignore[arg-type]


def test_integer_inputs_train_an_embedding() -> None:
    words = torch.randint(20, (200, 5), generator=torch.Generator().manual_seed(0))
    labels = (words == 3).any(1).long()
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2))
    curves = loop.fit(model, (words, labels), CE, epochs=60, batch_size=20, learning_rate=0.5)
    assert curves["train_accuracy"][-1] > 0.9
    assert loop.count_errors(model, words, labels) < 20


@pytest.mark.parametrize("runs", [None, 2])
def test_images_of_three_channels_train_and_are_translated_as_one(runs: int | None) -> None:
    torch.manual_seed(0)

    def colour() -> nn.Module:
        return nn.Sequential(nn.Flatten(-3), nn.Linear(3 * 28 * 28, 10))

    images = IMAGES[:, None].repeat(1, 3, 1, 1)
    model = kdlib.Stack([colour(), colour()]) if runs else colour()
    shown: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor, pictures: Tensor) -> Tensor:
        shown.append(pictures)
        return CE(logits, labels)

    settings: dict[str, Any] = {"batch_size": 20, "jitter": 2, "learning_rate": 0.01}
    curves = loop.fit(model, (images, LABELS, images), loss, epochs=20, **settings)
    assert np.all(np.array(curves["train_loss"][-1]) < 2)
    assert shown[0].shape[-3:] == (3, 28, 28)
    assert loop.predict(model, images).shape[-2:] == (120, 10)


def test_numpys_numbers_are_numbers() -> None:
    settings: dict[str, Any] = {
        "steps": np.int64(3), "batch_size": np.int32(8), "learning_rate": np.float32(0.5),
        "seed": np.int64(4), "jitter": np.int64(1), "momentum": np.float64(0.5),
    }  # fmt: skip
    plain = {name: value.item() for name, value in settings.items()}
    first, second = network(), network()
    loop.fit(first, (IMAGES, LABELS), CE, **settings)
    loop.fit(second, (IMAGES, LABELS), CE, **plain)
    assert same(weights(first), weights(second))


# --- predictions


def test_predictions_come_batch_by_batch_and_without_gradients() -> None:
    model = network().eval()
    whole = loop.predict(model, IMAGES)
    torch.testing.assert_close(loop.predict(model, IMAGES, batch=7), whole)
    assert not whole.requires_grad
    stack = kdlib.Stack([network(seed=seed) for seed in range(2)]).eval()
    both = loop.predict(stack, IMAGES, batch=50)
    assert both.shape == (2, 120, 10)
    torch.testing.assert_close(both[0], whole)
    errors = [int((logits.argmax(-1) != LABELS).sum()) for logits in both]
    assert loop.count_errors(stack, IMAGES, LABELS) == errors
    assert loop.count_errors(model, IMAGES, LABELS) == errors[0]


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16': expected one of fp32, bf16, tf32, fp64"),
        ({"schedule": "step"}, "schedule is 'step': expected one of one-cycle, cosine, constant"),
        ({"learning_rate": [0.1, 0.2]}, "learning_rate has 2 values"),
        ({"momentum": [0.1, 0.2]}, "momentum has 2 values"),
        ({"seed": [0, 1]}, "seed has 2 values: expected 1, one per run"),
        ({"jitter": [0, 1, 2]}, "jitter has 3 values: expected 1, one per run"),
        ({"learning_rate": -0.1}, r"learning_rate is -0.1: expected a finite number from 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"momentum": 1.0}, r"momentum is 1.0: expected a number in \[0, 1\)"),
        ({"jitter": -1}, "jitter is -1: expected a whole number, 0 or more"),
        ({"jitter": 28}, "jitter is 28: expected pixels from 0"),
        ({"rows": torch.tensor([1, 120])}, "rows are .* to 120: expected int64, .* from 0 to 119"),
        ({"rows": LABELS == 0}, "rows are torch.bool .*: expected int64"),
        ({"rows": [torch.arange(3)] * 2}, "rows has 2 values: expected 1, one per run"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.fit(network(), (IMAGES, LABELS), CE, steps=1, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": -3},
        {"steps": 2.5},
        {"epochs": 0},
        {"epochs": math.nan},
        {"batch_size": 0},
        {"batch_size": -8},
        {"report_every": 0},
        {"report_every": -1},
        {"max_norm": 0},
        {"max_norm": -1.0},
    ],
)
def test_lengths_below_one_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is {settings[name]}: expected"):
        loop.fit(network(), (IMAGES, LABELS), CE, **{"steps": 1} | settings)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none"),
        lambda logits, labels: CE(logits.detach(), labels),
        lambda logits, labels: 1.0,
    ],
)
def test_a_loss_that_is_no_mean_with_a_gradient_is_refused(loss: loop.Loss) -> None:
    with pytest.raises(ValueError, match=r"the loss gave .*: expected a tensor of shape \(\)"):
        loop.fit(network(), (IMAGES, LABELS), loss, steps=1)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        loop.fit(network(), (IMAGES, LABELS), CE, rows=torch.arange(0))


def test_a_stack_wants_one_value_a_run() -> None:
    stack = kdlib.Stack([network(seed=seed) for seed in range(3)])
    for name in ("learning_rate", "momentum", "seed", "jitter"):
        with pytest.raises(ValueError, match=f"{name} has 2 values: expected 3"):
            loop.fit(stack, (IMAGES, LABELS), CE, steps=1, **{name: [0, 1]})


def test_data_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data have \[120, 119\] samples: expected equal numbers"):
        loop.fit(network(), (IMAGES, LABELS[1:]), CE)
    with pytest.raises(ValueError, match=r"data have \[0, 0\] samples: .* above 0"):
        loop.fit(network(), (IMAGES[:0], LABELS[:0]), CE)
    for wrong in (IMAGES, (IMAGES.numpy(), LABELS.numpy())):
        with pytest.raises(ValueError, match=r"data hold a .*: expected \(inputs, \*targ"):
            loop.fit(network(), wrong, CE)
    with pytest.raises(ValueError, match=r"data have \[\] samples"):
        loop.fit(network(), (), CE)
    with pytest.raises(ValueError, match="the MLP has no weights to train"):
        loop.fit(network().requires_grad_(False), (IMAGES, LABELS), CE)
    with pytest.raises(ValueError, match=r"data are on meta, the model on cpu: expected one dev"):
        loop.fit(network(), (IMAGES.to("meta"), LABELS), CE)
