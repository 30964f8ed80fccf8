"""Softened softmax and the losses of distillation.

Every loss is a mean over the batch. Leading dimensions are free: logits (..., batch,
classes) give a loss of shape (...), so a stack of runs is one call. The dtype is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlib import check

# A tensor holds one value per run, of the loss's shape (...).
Number = float | Tensor

# The highest temperatures at which each dtype holds the digits of the divergence.
HIGHEST_IN_FLOAT32 = 100.0
HIGHEST_IN_FLOAT64 = 1e6


def soften(logits: Tensor, temperature: Number) -> Tensor:
    """Class probabilities at a temperature: softmax(logits / T).

    logits: (..., classes), any real numbers. temperature: a number, or a tensor of one value
    per run for logits (..., batch, classes). Returns the same shape, rows summing to 1.
    Raises ValueError unless the temperature is finite and positive.
    Hinton et al. 2015, eq. 1; introduced in chapter 3.
    """
    return log_soften(logits, temperature).exp()


def log_soften(logits: Tensor, temperature: Number) -> Tensor:
    """The logarithm of `soften`, exact where probabilities underflow."""
    check.per_run("temperature", temperature, check.POSITIVE)
    return _log_soften(logits, temperature)


def _log_soften(logits: Tensor, temperature: Number) -> Tensor:
    # One temperature for all samples and classes of a run.
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None, None]
    return torch.log_softmax(logits / temperature, dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: Number = 0.0) -> Tensor:
    """Cross-entropy with hard targets: -log softmax(logits)[target], mean over the batch.

    logits: (..., batch, classes), targets: int64 (..., batch). label_smoothing: the share of
    each target that is spread evenly over all classes, in [0, 1). Returns (...), in nats.
    Raises ValueError for targets that do not fit. Szegedy et al. 2016, section 7.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: "
            "expected one class number for each row of logits"
        )
    logs = torch.log_softmax(logits, dim=-1)
    hard = -logs.gather(-1, targets[..., None]).mean((-2, -1))
    # The common case costs no second mean.
    if not isinstance(label_smoothing, Tensor) and label_smoothing == 0:
        return hard
    return (1 - label_smoothing) * hard - label_smoothing * logs.mean((-2, -1))


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Number) -> Tensor:
    """T² KL(teacher || student) of the softened probabilities, mean over the batch.

    Both logits: (..., batch, classes). Returns (...), in nats, zero where the logits agree
    up to a constant. Its gradient is T² times that of the cross-entropy with
    the soft targets, which keeps its size as T grows. A teacher's logit of -inf gives a
    probability of 0; those of the student must be finite. bf16 and fp16 are computed in float32.
    Raises ValueError for shapes that differ and temperatures that are not in (0, 1e6].
    Hinton et al. 2015, section 2; introduced in chapter 4.
    """
    _same_shape(student_logits, teacher_logits)
    check.per_run("temperature", temperature, check.POSITIVE)
    kind = student_logits.dtype
    if _needs_float64(temperature):
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    elif {kind, teacher_logits.dtype} & {torch.bfloat16, torch.float16}:
        # The divergence is a difference of nearly equal terms: they need more digits.
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    teacher = _log_soften(teacher_logits, temperature)
    student = _log_soften(student_logits, temperature)
    # A probability of 0 contributes 0: without the bound, 0 · -inf would be NaN.
    teacher = teacher.clamp(min=torch.finfo(teacher.dtype).min / 4)
    divergence = (teacher.exp() * (teacher - student)).sum((-2, -1))
    return (divergence * (temperature**2 / student.shape[-2])).to(kind)


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
    Raises ValueError for a temperature outside (0, 1e6], a hard_weight outside [0, 1], or
    shapes that differ. Tensors on a GPU are not checked inside `fit`.
    Hinton et al. 2015, section 2; introduced in chapter 4.
    """
    check.per_run("hard_weight", hard_weight, check.number(0, 1))
    soft = soft_loss(student_logits, teacher_logits, temperature)
    if targets is None:
        if isinstance(hard_weight, Tensor) or hard_weight != 0:
            raise ValueError(f"hard_weight is {hard_weight} but there are no targets: use 0")
        return soft
    hard = cross_entropy(student_logits, targets)
    return hard_weight * hard + (1 - hard_weight) * soft


def logit_matching_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the mean squared difference of centred logits, over classes and batch.

    Both logits: (..., batch, classes). Returns (...). The limit of `soft_loss` for T much
    larger than the logits. Raises ValueError for shapes that differ.
    Ba and Caruana 2014; Hinton et al. 2015, section 2.1; introduced in chapter 3.
    """
    _same_shape(student_logits, teacher_logits)
    gap = student_logits - teacher_logits
    # Logits mean the same up to a constant, so a difference that all classes share is none.
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


def _same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    # Shapes that only broadcast would compare each sample with every other one.
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ in shape: score the same batch with both"
        )


def _needs_float64(temperature: Number) -> bool:
    """Whether float32 would lose the divergence, which falls as 1 / T² while its terms do not.

    A tensor on a GPU is not read inside `fit`; give it as float64 where it is above 100.
    """
    if isinstance(temperature, Tensor):
        if not check.may_read(temperature):
            return temperature.dtype == torch.float64
        temperature = float(temperature.max())
    if temperature > HIGHEST_IN_FLOAT64:
        raise ValueError(
            f"temperature is {temperature:g}: expected at most {HIGHEST_IN_FLOAT64:g}, "
            "beyond which no digit of the divergence is left; use logit_matching_loss, its limit"
        )
    return temperature > HIGHEST_IN_FLOAT32
