"""Softened softmax and the losses of distillation.

Every loss is a mean over the batch. Leading dimensions are free: logits (..., batch,
classes) give a loss of shape (...), so a stack of runs is one call. The dtype is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Number = float | Tensor  # a tensor holds one value a run, of the loss's shape (...)


def soften(logits: Tensor, temperature: Number) -> Tensor:
    """Class probabilities at a temperature: softmax(logits / T).

    logits: (..., classes), any real numbers. Returns the same shape, rows summing to 1.
    Raises ValueError unless temperature is finite and positive.
    Hinton et al. 2015, eq. 1; introduced in chapter 3.
    """
    return log_soften(logits, temperature).exp()


def log_soften(logits: Tensor, temperature: Number) -> Tensor:
    """The logarithm of `soften`, exact where probabilities underflow."""
    scale = _checked(temperature)
    if isinstance(scale, Tensor):
        scale = scale[..., None, None]
    return torch.log_softmax(logits / scale, dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with hard targets: -log softmax(logits)[target], mean over the batch.

    logits: (..., batch, classes), targets: int64 (..., batch). Returns (...), in nats.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: "
            "expected one class number for each row of logits"
        )
    return -torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None]).mean((-2, -1))


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Number) -> Tensor:
    """T² KL(teacher || student) of the softened probabilities, mean over the batch.

    Both logits: (..., batch, classes). Returns (...), in nats, zero where the logits agree
    up to a constant. Its gradient is that of the cross-entropy with the soft targets; T²
    keeps the gradient's size as T grows. Hinton et al. 2015, section 2; chapter 4.
    """
    teacher = log_soften(teacher_logits, temperature)
    student = log_soften(student_logits, temperature)
    divergence = (teacher.exp() * (teacher - student)).sum((-2, -1))
    return divergence * (temperature**2 / student.shape[-2])


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    *,
    temperature: Number,
    hard_weight: Number,
) -> Tensor:
    """hard_weight · CE(student, targets) + (1 - hard_weight) · T² · KL(teacher || student at T).

    student_logits, teacher_logits: (..., batch, classes); targets: int64 (..., batch), or
    None where hard_weight is 0. Returns the mean over the batch, shape (...), in nats.
    Raises ValueError for a temperature that is not finite and positive, a hard_weight
    outside [0, 1], or shapes that differ. Hinton et al. 2015, section 2; chapter 4.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ in shape: score the same batch with both"
        )
    if not isinstance(hard_weight, Tensor) and not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight is {hard_weight}: expected a number in [0, 1]")
    soft = soft_loss(student_logits, teacher_logits, temperature)
    if targets is None:
        if isinstance(hard_weight, Tensor) or hard_weight != 0:
            raise ValueError(f"hard_weight is {hard_weight} but there are no targets: use 0")
        return soft
    hard = cross_entropy(student_logits, targets)
    return hard_weight * hard + (1 - hard_weight) * soft


def logit_matching_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the mean squared difference of zero-meaned logits, over classes and batch.

    Both logits: (..., batch, classes). Returns (...). The limit of `soft_loss` for T much
    larger than the logits. Hinton et al. 2015, section 2.1, after Bucila et al. 2006.
    """
    gap = student_logits - teacher_logits
    gap = gap - gap.mean(-1, keepdim=True)
    return gap.square().mean(-1).mean(-1) / 2


def ensemble_soft_targets(
    logits: Sequence[Tensor] | Tensor, temperature: Number, mean: str = "arithmetic"
) -> Tensor:
    """Soft targets of an ensemble: the mean of its members' softened probabilities.

    logits: members x (..., classes). mean: "arithmetic", or "geometric", which is the
    softmax of the mean logits. Returns (..., classes), rows summing to 1.
    Raises ValueError for another mean. Hinton et al. 2015, sections 2 and 4.
    """
    members = torch.stack(tuple(logits))
    if mean == "geometric":
        return soften(members.mean(0), temperature)
    if mean == "arithmetic":
        return soften(members, temperature).mean(0)
    raise ValueError(f"mean is {mean!r}: expected 'arithmetic' or 'geometric'")


def _checked(temperature: Number) -> Number:
    if isinstance(temperature, Tensor):  # one per run, checked where the recipe was made
        return temperature
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0")
    return temperature
