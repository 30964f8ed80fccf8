"""The losses against an independent float64 calculation, and against well-known mistakes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.nn import functional as F

from kdlib import losses

calm = settings(deadline=None, max_examples=60, derandomize=True)
temperatures = st.floats(0.25, 50)
weights = st.floats(0, 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student logits, teacher logits (samples, classes), targets (samples,)."""
    samples, classes = draw(st.integers(1, 5)), draw(st.integers(2, 10))
    logits = hnp.arrays(np.float64, (samples, classes), elements=st.floats(-20, 20))
    targets = hnp.arrays(np.int64, samples, elements=st.integers(0, classes - 1))
    return draw(logits), draw(logits), draw(targets)


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def expected_loss(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temperature: float, hard: float
) -> float:
    ours, theirs = log_softmax(student, temperature), log_softmax(teacher, temperature)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1).mean()
    entropy = -log_softmax(student)[np.arange(len(targets)), targets].mean()
    return float(hard * entropy + (1 - hard) * temperature**2 * divergence)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def random_logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


@calm
@given(batches(), temperatures)
def test_softening_sums_to_one_and_keeps_the_order(
    batch: tuple[np.ndarray, ...], temperature: float
) -> None:
    logits = torch.from_numpy(batch[0])
    soft = losses.soften(logits, temperature)
    assert soft.shape == logits.shape
    torch.testing.assert_close(soft.sum(-1), torch.ones(len(logits), dtype=torch.float64))
    higher = logits[:, :, None] > logits[:, None, :]
    assert (soft[:, :, None] >= soft[:, None, :])[higher].all()
    np.testing.assert_allclose(soft, np.exp(log_softmax(batch[0], temperature)), atol=1e-14)
    torch.testing.assert_close(losses.log_soften(logits, temperature).exp(), soft)


@calm
@given(batches())
def test_a_hot_softmax_is_uniform_and_at_one_it_is_the_softmax(
    batch: tuple[np.ndarray, ...],
) -> None:
    logits = torch.from_numpy(batch[0])
    uniform = torch.full_like(logits, 1 / logits.shape[-1])
    torch.testing.assert_close(losses.soften(logits, 1e9), uniform, atol=1e-7, rtol=0)
    torch.testing.assert_close(losses.soften(logits, 1), logits.softmax(-1))


@calm
@given(batches(), temperatures, weights)
def test_the_loss_and_its_gradient_agree_with_numpy(
    batch: tuple[np.ndarray, ...], temperature: float, hard: float
) -> None:
    student, teacher, targets = batch
    mine = losses.distillation_loss(
        *map(torch.from_numpy, batch), temperature=temperature, hard_weight=hard
    )
    assert mine.dtype == torch.float64
    assert mine.shape == ()
    expected = expected_loss(student, teacher, targets, temperature, hard)
    assert mine.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def loss(logits: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, *map(torch.from_numpy, batch[1:]), temperature=temperature, hard_weight=hard
        )

    ours, theirs = (np.exp(log_softmax(z, temperature)) for z in (student, teacher))
    one_hot = np.eye(student.shape[1])[targets]
    slope = hard * (np.exp(log_softmax(student)) - one_hot)
    slope = slope + (1 - hard) * temperature * (ours - theirs)
    got = gradient(loss, torch.from_numpy(student))
    np.testing.assert_allclose(got, slope / len(targets), rtol=1e-8, atol=1e-10)


@calm
@given(batches(), temperatures)
def test_the_soft_term_and_its_gradient_vanish_at_equal_logits(
    batch: tuple[np.ndarray, ...], temperature: float
) -> None:
    teacher = torch.from_numpy(batch[1])
    student = teacher + 3.0  # logits mean the same up to a constant

    def loss(logits: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, teacher, None, temperature=temperature, hard_weight=0
        )

    assert abs(loss(student).item()) < 1e-9
    assert gradient(loss, student).abs().max() < 1e-10
    assert loss(torch.from_numpy(batch[0])).item() > -1e-9  # a KL divergence is not negative


@calm
@given(batches())
def test_hot_soft_targets_are_logit_matching(batch: tuple[np.ndarray, ...]) -> None:
    student, teacher = map(torch.from_numpy, batch[:2])
    matching = gradient(lambda z: losses.logit_matching_loss(z, teacher), student)
    gap = batch[0] - batch[1]
    gap = gap - gap.mean(-1, keepdims=True)
    np.testing.assert_allclose(matching, gap / gap.size, atol=1e-12)
    assert losses.logit_matching_loss(student, teacher).item() == pytest.approx(
        (gap**2).mean() / 2, abs=1e-12
    )

    def error(temperature: float) -> float:
        hot = gradient(lambda z: losses.soft_loss(z, teacher, temperature), student)
        return (hot - matching).abs().max().item()

    assert error(1e4) <= 0.01 * matching.abs().max().item() + 1e-6
    assert error(1e4) <= 0.11 * error(1e3) + 1e-9  # of the order of spread / T


def test_soft_targets_that_are_not_hot_are_no_logit_matching() -> None:
    student, teacher = random_logits(8, 10, scale=5), random_logits(8, 10, seed=1, scale=5)
    matching = gradient(lambda z: losses.logit_matching_loss(z, teacher), student)
    cool = gradient(lambda z: losses.soft_loss(z, teacher, 2.0), student)
    assert (cool - matching).norm() > 0.5 * matching.norm()


@calm
@given(batches(), temperatures, weights, st.integers(2, 3))
def test_a_batch_that_is_repeated_has_the_same_loss(
    batch: tuple[np.ndarray, ...], temperature: float, hard: float, times: int
) -> None:
    once = list(map(torch.from_numpy, batch))
    more = [torch.cat([part] * times) for part in once]
    kind = {"temperature": temperature, "hard_weight": hard}
    torch.testing.assert_close(
        losses.distillation_loss(*more, **kind), losses.distillation_loss(*once, **kind)
    )
    torch.testing.assert_close(
        losses.logit_matching_loss(*more[:2]), losses.logit_matching_loss(*once[:2])
    )
    torch.testing.assert_close(
        losses.cross_entropy(more[0], more[2]), losses.cross_entropy(once[0], once[2])
    )


@calm
@given(
    hnp.arrays(np.float32, (2, 4, 10), elements=st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4])),
    st.sampled_from([0.5, 1, 4, 20, 100]),
)
def test_extreme_logits_stay_finite(logits: np.ndarray, temperature: float) -> None:
    student, teacher = map(torch.from_numpy, logits)
    targets = torch.tensor([0, 3, 6, 9])

    def loss(z: Tensor) -> Tensor:
        return losses.distillation_loss(
            z, teacher, targets, temperature=temperature, hard_weight=0.5
        )

    assert loss(student).isfinite()
    assert gradient(loss, student).isfinite().all()
    assert gradient(lambda z: losses.logit_matching_loss(z, teacher), student).isfinite().all()
    assert losses.soften(student, temperature).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    student, teacher = (random_logits(4, 10, seed=seed).to(dtype) for seed in (0, 1))
    targets = torch.arange(4)
    values = [
        losses.soften(student, 4),
        losses.cross_entropy(student, targets),
        losses.logit_matching_loss(student, teacher),
        losses.ensemble_soft_targets([student, teacher], 4),
        losses.distillation_loss(student, teacher, targets, temperature=4, hard_weight=0.3),
    ]
    assert {value.dtype for value in values} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_keeps_its_digits_in_half_precision(dtype: torch.dtype) -> None:
    student, teacher = (random_logits(64, 10, seed=seed).to(dtype) for seed in (0, 1))
    exact = losses.soft_loss(student.double(), teacher.double(), 20).item()
    found = losses.soft_loss(student, teacher, 20)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(exact, rel=0.01)
    # A teacher's logits may be stored in less than a student's.
    assert losses.soft_loss(student.float(), teacher, 20).item() == pytest.approx(exact, rel=1e-4)


def test_a_stack_of_runs_is_one_call() -> None:
    student, teacher = random_logits(3, 5, 10), random_logits(3, 5, 10, seed=1)
    targets = torch.arange(15).view(3, 5) % 10
    temperature, hard = torch.tensor([1.0, 4.0, 20.0]), torch.tensor([0.0, 0.3, 1.0])
    together = losses.distillation_loss(
        student, teacher, targets, temperature=temperature, hard_weight=hard
    )
    one_by_one = [
        losses.distillation_loss(
            student[run], teacher[run], targets[run],
            temperature=temperature[run].item(), hard_weight=hard[run].item(),
        )
        for run in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-6, atol=0)
    assert losses.logit_matching_loss(student, teacher).shape == (3,)


@calm
@given(hnp.arrays(np.float64, (3, 4, 6), elements=st.floats(-20, 20)), temperatures)
def test_ensembles_average_probabilities_or_logits(logits: np.ndarray, temperature: float) -> None:
    members = list(torch.from_numpy(logits))
    soft = np.exp(log_softmax(logits, temperature))
    arithmetic = losses.ensemble_soft_targets(members, temperature)
    np.testing.assert_allclose(arithmetic, soft.mean(0), atol=1e-12)
    product = np.exp(log_softmax(logits, temperature).mean(0))
    geometric = losses.ensemble_soft_targets(torch.stack(members), temperature, "geometric")
    np.testing.assert_allclose(geometric, product / product.sum(-1, keepdims=True), atol=1e-12)
    alone = losses.ensemble_soft_targets(members[:1], temperature)
    np.testing.assert_allclose(alone, soft[0], atol=1e-12)


@pytest.mark.parametrize("temperature", [0, -1, -0.0, math.nan, math.inf])
def test_a_temperature_that_is_not_finite_and_positive_is_refused(temperature: float) -> None:
    logits = torch.zeros(2, 3)
    match = f"temperature is {temperature}: expected a finite number above 0"
    with pytest.raises(ValueError, match=match):
        losses.soften(logits, temperature)
    with pytest.raises(ValueError, match=match):
        losses.soft_loss(logits, logits, temperature)
    with pytest.raises(ValueError, match=match):
        losses.ensemble_soft_targets([logits], temperature)


@pytest.mark.parametrize("hard", [-0.1, 1.1, math.nan, 15])
def test_a_hard_weight_outside_its_range_is_refused(hard: float) -> None:
    with pytest.raises(ValueError, match=rf"hard_weight is {hard}: expected a number in \[0, 1\]"):
        losses.distillation_loss(
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64),
            temperature=1,
            hard_weight=hard,
        )


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    student, kind = torch.zeros(4, 3), {"temperature": 2.0, "hard_weight": 0.5}
    with pytest.raises(ValueError, match=r"\(4, 3\) and teacher logits \(2, 3\)"):
        losses.distillation_loss(student, torch.zeros(2, 3), None, **kind)
    with pytest.raises(ValueError, match=r"hard_weight is 0.5 but there are no targets"):
        losses.distillation_loss(student, student, None, **kind)
    with pytest.raises(ValueError, match="'harmonic': expected 'arithmetic' or 'geometric'"):
        losses.ensemble_soft_targets([student], 2, "harmonic")


def test_fewer_targets_than_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets \(3,\)"):
        losses.cross_entropy(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))


# --- tensors of one value per run, extreme temperatures, probabilities of zero

RUNS = random_logits(2, 6, 10), random_logits(2, 6, 10, seed=1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_tensor_with_a_temperature_that_is_not_positive_is_refused(bad: float) -> None:
    temperatures = torch.tensor([4.0, bad])
    for loss in (losses.soften, lambda z, t: losses.soft_loss(z, z, t)):
        with pytest.raises(ValueError, match=r"temperature is \[4.0, .*\]: expected a finite"):
            loss(RUNS[0], temperatures)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_a_tensor_with_a_hard_weight_outside_its_range_is_refused(bad: float) -> None:
    labels = torch.zeros(2, 6, dtype=torch.int64)
    weights = torch.tensor([0.5, bad])
    with pytest.raises(ValueError, match=r"hard_weight is \[0.5, .*\]: expected a number in"):
        losses.distillation_loss(*RUNS, labels, temperature=2.0, hard_weight=weights)


@pytest.mark.parametrize(
    "loss", [losses.logit_matching_loss, lambda a, b: losses.soft_loss(a, b, 2)]
)
def test_shapes_that_only_broadcast_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(6, 10\) and teacher logits \(1, 10\) differ"):
        loss(torch.zeros(6, 10), torch.zeros(1, 10))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teachers_logit_of_minus_infinity_is_a_probability_of_zero(temperature: float) -> None:
    """PyTorch's kl_div on probabilities is the oracle."""
    student, teacher = random_logits(5, 4), random_logits(5, 4, seed=1)
    teacher[:, 2] = -math.inf
    logs, targets = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    expected = F.kl_div(logs, targets, reduction="batchmean") * temperature**2
    torch.testing.assert_close(losses.soft_loss(student, teacher, temperature), expected)
    slope = gradient(lambda z: losses.soft_loss(z, teacher, temperature), student)
    assert slope.isfinite().all()


@pytest.mark.parametrize("temperature", [50.0, 101.0, 1e4, 1e6])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_hot_soft_targets_keep_their_digits_in_float32(temperature: float, as_tensor: bool) -> None:
    """The oracle: with so high a temperature the loss is half the variance of the gap."""
    student, teacher = (logits.float() for logits in RUNS)
    given = torch.full((2,), temperature) if as_tensor else temperature
    loss = losses.soft_loss(student, teacher, given)
    assert loss.dtype == torch.float32
    expected = losses.logit_matching_loss(*RUNS)
    torch.testing.assert_close(loss.double(), expected, rtol=3 / temperature + 1e-4, atol=0)


def test_a_temperature_beyond_all_digits_is_refused_with_the_reason() -> None:
    for temperature in (2e6, torch.tensor([1.0, 2e6])):
        with pytest.raises(ValueError, match=r"at most 1e\+06, .* use logit_matching_loss"):
            losses.soft_loss(*RUNS, temperature)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_labels_are_pytorchs(smoothing: float) -> None:
    logits, labels = RUNS[0], torch.arange(12).view(2, 6) % 10
    given = torch.tensor([smoothing, 0.3], dtype=torch.float64)
    expected = [
        F.cross_entropy(run, target, label_smoothing=share)
        for run, target, share in zip(logits, labels, given.tolist(), strict=True)
    ]
    torch.testing.assert_close(losses.cross_entropy(logits, labels, given), torch.stack(expected))
    alone = losses.cross_entropy(logits[0], labels[0], smoothing)
    torch.testing.assert_close(alone, expected[0])
