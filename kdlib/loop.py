"""The one training loop. It knows tensors, modules and a loss; neither recipes nor disks.

`fit` draws batches, asks a schedule for the learning rate, takes a step, and reports now and
then. A `Stack` of networks trains in the same loop as one network: its weights, its batches and
its losses have one more dimension in front, the run.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import check, fast, sgd
from kdlib.batches import Batches, as_inputs, mixed_seed
from kdlib.precision import PRECISIONS, autocast, effective, settings
from kdlib.stack import Stack as Stack

Loss = Callable[..., Tensor]
# "step" and, report by report, a value (for a Stack a list).
Curves = dict[str, list[Any]]
# At most, unless asked for: testing a small network takes as long as training it.
REPORTS = 10


class Diverged(UserWarning):
    """Training has stopped early, because no run has a finite loss any more."""


@dataclass
class State:
    """A training in progress, as `on_report` gets it: to read, to save, to change."""

    model: nn.Module
    velocity: list[Tensor]
    step: int
    steps: int
    curves: Curves

    def snapshot(self) -> dict[str, Any]:
        """What `fit(resume=…)` needs to go on from here. Its tensors are those in use: copy them
        before the training goes on."""
        weights, velocity = self.model.state_dict(), self.velocity
        return {"weights": weights, "velocity": velocity, "step": self.step, "curves": self.curves}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot, in place."""
        self.model.load_state_dict(snapshot["weights"])
        for velocity, saved in zip(self.velocity, snapshot["velocity"], strict=True):
            velocity.copy_(saved)
        self.step = snapshot["step"]
        self.curves = {name: list(values) for name, values in snapshot["curves"].items()}


def fit(
    model: nn.Module,
    data: Sequence[Any],
    loss: Loss,
    *,
    epochs: float = 10,
    steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float | Sequence[float] = 0.1,
    momentum: float | Sequence[float] = 0.9,
    schedule: str = "one-cycle",
    max_norm: float | None = None,
    jitter: int | Sequence[int] = 0,
    rows: Tensor | Sequence[Tensor] | None = None,
    teacher: nn.Module | None = None,
    precision: str = "fp32",
    seed: int | Sequence[int] = 0,
    evaluate: dict[str, tuple[Tensor, Tensor]] | None = None,
    report_every: int | None = None,
    on_report: Callable[[State], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> Curves:
    """Train a network, or a `Stack` of them, in place by SGD with Nesterov momentum.

    data: (inputs, *targets), tensors of equal first dimension on the model's device; uint8
    images (N, H, W) or (N, C, H, W) are scaled to [0, 1]. For a Stack, a list of tensors is one
    per run. A teacher's logits, computed beforehand, can be one of the targets.
    loss: loss(logits, *targets of the batch) -> scalar, or (runs,) for a Stack. On a GPU the
    Python code of loss and model runs for the first step only and is replayed from then on: what
    changes from step to step must be a tensor that is changed in place.
    teacher: a network for inputs that change; its logits on the batch come last among the
    loss's arguments. For a Stack it is a Stack too.
    schedule: how the rate changes, one of `SCHEDULES`. max_norm: the greatest length of a hidden
    unit's incoming weights. jitter: translate each uint8 image by up to so many pixels.
    rows: int64, the samples to train on; an epoch is as long as the first run's. learning_rate,
    momentum, jitter, rows and seed may be sequences, one value per run.
    evaluate: name -> (inputs, labels), counted at each report, by default after each epoch, or
    10 times where there are more. Dropout is drawn by all runs' seeds and the last report's step.
    on_report: called with the `State` after each report. resume: a `State.snapshot()`.
    precision: one of `PRECISIONS`; bf16 falls back to fp32 on a processor that is slow at it.
    Returns the curves: "step", "train_loss", "train_accuracy" where the first target is
    labels, "<name>_errors". Stops early, with the warning `Diverged`, once no run has a finite
    loss. Raises ValueError for tensors that do not fit together and for unknown settings.
    """
    check.values(
        _RULES, epochs=epochs, steps=steps, batch_size=batch_size, schedule=schedule,
        max_norm=max_norm, precision=precision, report_every=report_every,
    )  # fmt: skip
    weights = sgd.trainable(model, precision)
    precision = effective(precision, weights[0].device)
    batches = Batches(model, data, batch_size, rows, seed, jitter)
    steps_per_epoch = batches.sizes[0] / batch_size
    steps = steps or max(1, round(epochs * steps_per_epoch))
    report_every = report_every or max(math.ceil(steps_per_epoch), math.ceil(steps / REPORTS))
    rates = batches.per_run("learning_rate", learning_rate, check.number(0))
    momenta = batches.per_run("momentum", momentum, check.number(0, 1, ends="[)"))
    state = State(model, [torch.zeros_like(weight) for weight in weights], 0, steps, {})
    update = sgd.update_rule(weights, state.velocity, momenta, schedule != "classic")
    one_step = _Step(model, teacher, batches, loss, weights, update, max_norm, precision)
    with settings(precision, batches.device):
        train_step = fast.prepared(one_step, batches, rates, momenta, state)
        if resume is not None:
            state.restore(resume)
        while state.step < steps:
            model.train()
            first, stop = state.step, min(state.step + report_every, steps)
            # A resumed training starts at a report: dropout depends on nothing before it.
            torch.manual_seed(mixed_seed(batches.seed, "dropout", first))
            totals = [torch.zeros_like(rates), torch.zeros_like(rates)]
            for number, index, shifts in batches.between(first, stop):
                rate, momentum_now = SCHEDULES[schedule](number / steps, rates, momenta)
                torch._foreach_add_(totals, train_step(index, shifts, rate, momentum_now))
            state.step = stop
            fast.without_denormals(state.velocity)
            _report(state, batches, totals, stop - first, evaluate or {}, precision)
            if on_report is not None:
                on_report(state)
            # A stack goes on for the runs that are still sound.
            if not torch.isfinite(totals[0]).any():
                _warn_of_divergence(stop, steps)
                break
    model.eval()
    return state.curves


@dataclass
class _Step:
    """One step of training: `step(index, shifts, rate, momentum)` -> [losses, right answers].

    index, shifts: the samples of the batch and their translations; rate, momentum: those of this
    step, one per run. Losses are means over the batch, right answers are counts; one per run.
    """

    model: nn.Module
    teacher: nn.Module | None
    batches: Batches
    loss: Loss
    weights: list[Tensor]
    update: fast.Update
    max_norm: float | None
    precision: str

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self.teacher.eval()

    def __call__(
        self, index: Tensor, shifts: Tensor | None, rate: Tensor, momentum: Tensor
    ) -> list[Tensor]:
        inputs, targets = self.batches.samples(index, shifts)
        if self.teacher is not None:
            with torch.no_grad():
                targets = [*targets, self._logits(self.teacher, inputs)]
        logits = self._logits(self.model, inputs)
        with check.in_a_step():
            losses = self.loss(logits, *targets)
        # A loss per sample, or without a gradient, would train something else or nothing.
        _check_losses(losses, rate)
        # The gradient of Σ rate · loss over the runs. No run's loss depends on another's weights,
        # so each run's gradient is multiplied by its own learning rate, which is a tensor, so
        # that a step recorded as a CUDA graph reads a new one each time.
        gradients = torch.autograd.grad(
            losses, self.weights, grad_outputs=rate, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            self.update(gradients, momentum)
            if self.max_norm is not None:
                sgd.limit_norms(self.model, self.max_norm)
            if not self.batches.labelled:
                return [losses.detach(), torch.zeros_like(losses)]
            right = logits.argmax(-1) == targets[0]
            return [losses.detach(), right.sum(-1).to(logits.dtype)]

    def _logits(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """A network's logits in the dtype of the training, which a teacher need not have."""
        if network is self.teacher and inputs.is_floating_point():
            inputs = inputs.to(next(network.parameters()).dtype)
        with autocast(self.precision, inputs.device):
            logits = network(inputs)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the {type(network).__name__} returns a {type(logits).__name__}: expected a "
                "tensor of logits; wrap it in a module whose forward returns that part alone"
            )
        return logits.to(self.batches.dtype)


def _one_cycle(done: float, rate: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Up in a line over the first fifth, then down along a cosine to 0."""
    if done < 0.2:
        return rate * (done / 0.2 + 0.01), momentum
    return rate * (0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8)), momentum


def _cosine(done: float, rate: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Down along half a cosine."""
    return rate * (0.5 + 0.5 * math.cos(math.pi * done)), momentum


def _classic(done: float, rate: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """That of arXiv 1207.0580 over 3,000 epochs, scaled to any length: momentum rises over the
    first sixth from half its value, the rate falls by 0.2 % per epoch (of 3,000) and is multiplied
    by 1 - momentum."""
    momentum = momentum * min(1.0, 0.5 + 3 * done)
    return rate * (0.998 ** (3000 * done)) * (1 - momentum), momentum


# name -> (share of the steps done, peak learning rate, last momentum) -> those of this step
SCHEDULES: dict[str, Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one-cycle": _one_cycle,
    "cosine": _cosine,
    "constant": lambda done, rate, momentum: (rate, momentum),
    "classic": _classic,
}


def predict(model: nn.Module, inputs: Tensor, batch: int = 2000) -> Tensor:
    """Logits (…, N, classes) of a network or a Stack, without gradients, batch by batch.

    The model stays in the mode it is in: call .eval() first where it has dropout.
    """
    # The runs of a stack have the same samples here, not samples each of their own.
    dtype, dims = next(model.parameters()).dtype, inputs.dim() - 1
    shared = {"shared": True} if isinstance(model, Stack) else {}
    with torch.no_grad():
        parts = [model(as_inputs(part, dims, dtype), **shared) for part in inputs.split(batch)]
    return torch.cat(parts, dim=-2)


def count_errors(model: nn.Module, inputs: Tensor, labels: Tensor) -> Any:
    """How many samples a network gets wrong: an int, or for a Stack a list, one per run."""
    return (predict(model, inputs).argmax(-1) != labels).sum(-1).tolist()


def _report(
    state: State,
    batches: Batches,
    totals: list[Tensor],
    interval: int,
    evaluate: dict[str, tuple[Tensor, Tensor]],
    precision: str,
) -> None:
    """Add the means since the last report, and the errors on held-out data, to the curves."""
    # Held-out samples are counted without dropout; `fit` goes back to training.
    state.model.eval()
    loss, right = (total / interval for total in totals)
    report: dict[str, Any] = {"step": state.step, "train_loss": loss.tolist()}
    if batches.labelled:
        report["train_accuracy"] = (right / batches.batch_size).tolist()
    for name, (inputs, labels) in evaluate.items():
        with autocast(precision, batches.device):
            report[f"{name}_errors"] = count_errors(state.model, inputs, labels)
    for name, value in report.items():
        state.curves.setdefault(name, []).append(value)


def _check_losses(losses: Any, rate: Tensor) -> None:
    if not isinstance(losses, Tensor) or losses.shape != rate.shape or not losses.requires_grad:
        raise ValueError(
            f"the loss gave {getattr(losses, 'shape', losses)}: expected a tensor of shape "
            f"{tuple(rate.shape)}, a mean over the batch that has a gradient"
        )


def _warn_of_divergence(step: int, steps: int) -> None:
    stopped = f"the training stopped after {step} of {steps} steps: its loss is not finite"
    advice = "use a smaller learning rate, or look for infinite values in the data"
    warnings.warn(f"{stopped}; {advice}", Diverged, stacklevel=3)


_RULES = {
    "epochs": check.POSITIVE,
    "steps": check.optional(check.COUNT),
    "batch_size": check.COUNT,
    "schedule": check.one_of(*SCHEDULES),
    "max_norm": check.optional(check.POSITIVE),
    "precision": check.one_of(*PRECISIONS),
    "report_every": check.optional(check.COUNT),
}
