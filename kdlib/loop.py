"""The one training loop. It knows tensors, modules and a loss; neither recipes nor disks.

A `Stack` of networks trains in the same loop as one network: its weights, its batches and
its losses have one more dimension, the run, in front.

Randomness is a function of a seed and a position, never of what was drawn before: the order
of pass p, its jitter, the dropout from step s on. So an interrupted training goes on from
its weights and its step alone.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from kdlib.data import to_input, translate

Loss = Callable[..., Tensor]
Curves = dict[str, list[Any]]  # "step" and, report by report, a value (for a Stack a list)
PRECISIONS = ("fp32", "bf16", "tf32", "fp64")
BLOCK = 512  # steps whose samples are drawn at once
REPORTS = 10  # at most, unless asked for: testing a small network takes as long as training it


class Stack(nn.Module):
    """Networks of one architecture as one module: weights (runs, …), inputs (runs, N, …).

    forward gives (runs, N, classes). With shared=True all runs see the same inputs (N, …).
    Raises ValueError for networks with buffers, such as batch normalisation has.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = len(networks)
        weights, buffers = stack_module_state(list(networks))
        if buffers:
            raise ValueError(
                f"{type(networks[0]).__name__} has buffers ({', '.join(buffers)}), which a "
                "stack would mix up: train such networks one at a time (stack=1)"
            )
        self.names = list(weights)
        self.weights = nn.ParameterList(_as_gradients_lie(weight) for weight in weights.values())
        self._skeleton = (copy.deepcopy(networks[0]).to("meta"),)  # a tuple: no submodule

    def forward(self, inputs: Tensor, shared: bool = False) -> Tensor:
        (skeleton,) = self._skeleton
        skeleton.train(self.training)

        def one(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
            return functional_call(skeleton, weights, (batch,))  # type: ignore[no-any-return]

        every = torch.vmap(one, in_dims=(0, None if shared else 0), randomness="different")
        weights = dict(zip(self.names, self.weights, strict=True))
        return every(weights, inputs)

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state_dict of each network, in order."""
        named = list(zip(self.names, self.weights, strict=True))
        return [
            {name: weight[run].detach().clone() for name, weight in named}
            for run in range(self.runs)
        ]


@dataclass
class State:
    """A training in progress, as `on_report` gets it: to read, to save, to change."""

    model: nn.Module
    velocity: list[Tensor]
    step: int
    steps: int
    curves: Curves

    def snapshot(self) -> dict[str, Any]:
        """What `fit(resume=…)` needs to go on from here."""
        return {
            "weights": self.model.state_dict(),
            "velocity": self.velocity,
            "step": self.step,
            "curves": self.curves,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot, in place."""
        self.model.load_state_dict(snapshot["weights"])
        for mine, saved in zip(self.velocity, snapshot["velocity"], strict=True):
            mine.copy_(saved)
        self.step, self.curves = snapshot["step"], snapshot["curves"]


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
    images become `to_input` of themselves. For a Stack, a list of tensors is one a run.
    loss: loss(logits, *targets of the batch) -> scalar, or (runs,) for a Stack. A teacher's
    logits among the data thus arrive with their own samples. teacher: a network whose
    logits on the batch come last among the loss's arguments, for inputs that change.
    rows: int64, the samples to train on. learning_rate, momentum, jitter, rows and seed may
    be sequences, one value a run. evaluate: name -> (inputs, labels), counted at each
    report, by default after each epoch, or 10 times where there are more.
    precision: one of `PRECISIONS`; bf16 is fp32 on a processor that is slow at it.
    Returns the curves: "step", "train_loss", "train_accuracy" where the first target is
    labels, "<name>_errors". Ends early once no run has a finite loss.
    Raises ValueError for tensors that do not fit together and for unknown settings.
    """
    _known("precision", precision, PRECISIONS)
    _known("schedule", schedule, SCHEDULES)
    _above("epochs", epochs)
    _above("max_norm", max_norm)
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("report_every", report_every),
    ):
        _above(name, value, whole=True)
    if precision == "fp64":
        model.double()
    precision = effective(precision, next(model.parameters()).device)
    source = _Source(model, data, rows, seed, jitter, batch_size)
    steps = steps or max(1, round(epochs * source.sizes[0] / batch_size))
    epoch = math.ceil(source.sizes[0] / batch_size)
    report_every = report_every or max(epoch, math.ceil(steps / REPORTS))
    weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
    state = State(model, [torch.zeros_like(weight) for weight in weights], 0, steps, {})
    rates, masses = source.per_run(learning_rate=learning_rate, momentum=momentum)
    descend = _descent(weights, state.velocity, masses, schedule)
    if teacher is not None:
        teacher.eval()

    def step(index: Tensor, shifts: Tensor | None, rate: Tensor, mass: Tensor) -> list[Tensor]:
        inputs, targets = source.batch(index, shifts)
        with _autocast(precision, index.device):
            if teacher is not None:
                with torch.no_grad():
                    targets = [*targets, teacher(inputs)]
            logits = model(inputs)
        logits = logits.to(inputs.dtype)
        losses = loss(logits, *targets)
        if getattr(losses, "shape", None) != rate.shape or not losses.requires_grad:
            got = losses if not isinstance(losses, Tensor) else f"shape {tuple(losses.shape)}"
            raise ValueError(
                f"the loss gave {got}: expected a tensor of shape {tuple(rate.shape)}, a mean "
                "over the batch that has a gradient"
            )
        gradients = torch.autograd.grad(
            losses, weights, rate, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            descend(gradients, mass)
            if max_norm is not None:
                _limit(model, max_norm)
            return [losses.detach(), _hits(logits, targets)]

    _keep_memory()
    with settings(precision, source.device):
        model.train()
        advance = (
            _captured(step, source, rates, masses, state) if source.device.type == "cuda" else step
        )
        if resume is not None:
            state.restore(resume)
        while state.step < steps:
            model.train()
            first, last = state.step, min(state.step + report_every, steps)
            torch.manual_seed(_mix(seed, "dropout", first))
            sums = [torch.zeros_like(rates), torch.zeros_like(rates)]
            for at, index, shifts in source.batches(first, last):
                rate, mass = SCHEDULES[schedule](at / steps, rates, masses)
                torch._foreach_add_(sums, advance(index, shifts, rate, mass))
            state.step = last
            if source.device.type == "cpu":
                _settle(state.velocity)
            model.eval()
            _report(state, source, *(total / (last - first) for total in sums))
            for name, (inputs, labels) in (evaluate or {}).items():
                with _autocast(precision, source.device):
                    errors = count_errors(model, inputs, labels)
                state.curves.setdefault(f"{name}_errors", []).append(errors)
            if on_report is not None:
                on_report(state)
            if not torch.isfinite(sums[0]).any():
                break
    model.eval()
    return state.curves


class _Source:
    """Where batches come from: samples by index, in an order that the seed decides."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        rows: Tensor | Sequence[Tensor] | None,
        seed: int | Sequence[int],
        jitter: int | Sequence[int],
        batch_size: int,
    ) -> None:
        self.runs = model.runs if isinstance(model, Stack) else None
        if isinstance(data, Tensor) or not all(isinstance(p, Tensor | list | tuple) for p in data):
            kinds = [type(part).__name__ for part in data[:9]]
            raise ValueError(f"data hold {kinds}: expected tensors, (inputs, *targets)")
        self.tensors = [
            torch.stack(list(part)) if isinstance(part, list | tuple) else part for part in data
        ]
        self.shared = [isinstance(part, Tensor) for part in data]
        weight = next((w for w in model.parameters() if w.requires_grad), None)
        if weight is None:
            raise ValueError(f"the {type(model).__name__} has no weights to train")
        self.device, self.dtype = weight.device, weight.dtype
        sizes = [
            tensor.shape[0 if shared else 1]
            for tensor, shared in zip(self.tensors, self.shared, strict=True)
        ]
        if len(set(sizes)) != 1 or not sizes[0]:
            raise ValueError(f"data have {sizes} samples: expected equal numbers, above 0")
        wrong = {str(tensor.device) for tensor in self.tensors} - {str(self.device)}
        if wrong:
            raise ValueError(
                f"data are on {wrong.pop()}, the model on {self.device}: "
                "expected one device, move either with .to()"
            )
        count = self.runs or 1
        self.rows = [rows] * count if rows is None or isinstance(rows, Tensor) else list(rows)
        self.sizes = [sizes[0] if chosen is None else len(chosen) for chosen in self.rows]
        if not all(self.sizes):
            raise ValueError("rows are empty: expected the numbers of some samples")
        for chosen in self.rows:
            if chosen is not None and (
                chosen.dtype != torch.int64
                or int(chosen.min()) < 0
                or int(chosen.max()) >= sizes[0]
            ):
                raise ValueError(
                    f"rows are {chosen.dtype} from {chosen.min()} to {chosen.max()}: expected "
                    f"int64, the numbers of samples from 0 to {sizes[0] - 1}"
                )
        self.seeds = [seed] * count if isinstance(seed, int) else list(seed)
        self.jitters = [jitter] * count if isinstance(jitter, int) else list(jitter)
        lengths = {"rows": self.rows, "seed": self.seeds, "jitter": self.jitters}
        for name, values in lengths.items():
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} values: expected {count}, one a run")
        tall = self.tensors[0].shape[-2:] if self.tensors[0].dtype == torch.uint8 else (1,)
        if not all(0 <= reach < min(tall) for reach in self.jitters):
            raise ValueError(
                f"jitter is {jitter}: expected pixels from 0, fewer than the uint8 images have"
            )
        self.batch_size = batch_size
        self.labelled = len(data) > 1 and self.tensors[1].dtype == torch.int64

    def per_run(self, **settings: float | Sequence[float]) -> list[Tensor]:
        """Settings as tensors on the device: () for one network, (runs,) for a Stack."""
        shape = () if self.runs is None else (self.runs,)
        tensors = []
        for name, value in settings.items():
            tensor = torch.as_tensor(value, dtype=self.dtype, device=self.device)
            if tensor.shape not in ((), shape):
                raise ValueError(f"{name} has {tensor.numel()} values: expected {self.runs or 1}")
            if not (tensor.min() >= 0 and tensor.max() < (1 if name == "momentum" else math.inf)):
                most = "[0, 1)" if name == "momentum" else "[0, ∞)"
                raise ValueError(f"{name} is {value}: expected numbers in {most}")
            tensors.append(tensor.expand(shape).clone())
        return tensors

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Step by step: the step, sample indices (…, batch), shifts (…, batch, 2) if any."""
        size = self.batch_size
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            drawn = [self._draw(run, start * size, stop * size) for run in range(self.runs or 1)]
            index = torch.stack([samples for samples, _ in drawn])
            moved = torch.stack([shifts for _, shifts in drawn]) if any(self.jitters) else None
            if self.runs is None:
                index, moved = index[0], None if moved is None else moved[0]
            for at in range(start, stop):
                here = slice((at - start) * size, (at - start + 1) * size)
                yield at, index[..., here], None if moved is None else moved[..., here, :]

    def _draw(self, run: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positions start to stop of a run's endless stream of shuffled passes."""
        size, reach = self.sizes[run], self.jitters[run]
        samples, shifts = [], []
        generator = torch.Generator(self.device)
        for number in range(start // size, (stop - 1) // size + 1):
            part = slice(max(start - number * size, 0), stop - number * size)
            generator.manual_seed(_mix(self.seeds[run], "pass", number))
            order = torch.randperm(size, generator=generator, device=self.device)[part]
            samples.append(order)
            if any(self.jitters):
                moves = torch.randint(
                    -reach, reach + 1, (size, 2), generator=generator, device=self.device
                )
                shifts.append(moves[part])
        index = torch.cat(samples)
        chosen = self.rows[run]
        moved = torch.cat(shifts) if shifts else index
        return (index if chosen is None else chosen[index]), moved

    def batch(self, index: Tensor, shifts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The inputs, as the network takes them, and the targets of some samples."""
        run = None if self.runs is None else torch.arange(self.runs, device=self.device)[:, None]
        inputs, *targets = (
            _rows(tensor, index) if shared else tensor[run, index]
            for tensor, shared in zip(self.tensors, self.shared, strict=True)
        )
        if shifts is not None:
            flat = translate(inputs.flatten(0, index.dim() - 1), shifts.flatten(0, -2))
            inputs = flat.view_as(inputs)
        cast = [part.to(self.dtype) if part.is_floating_point() else part for part in targets]
        return _prepared(inputs, self.dtype), cast


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[index]; for images of uint8 on a CPU in a tenth of the time."""
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])


def _prepared(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as the networks take them; other inputs as they are."""
    inputs = to_input(inputs) if inputs.dtype == torch.uint8 else inputs
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def predict(model: nn.Module, inputs: Tensor, batch: int = 2000) -> Tensor:
    """Logits (…, N, classes) of a network or a Stack, without gradients, batch by batch."""
    weight = next(model.parameters())
    shared = {"shared": True} if isinstance(model, Stack) else {}
    with torch.no_grad():
        parts = [model(_prepared(part, weight.dtype), **shared) for part in inputs.split(batch)]
    return torch.cat(parts, dim=-2)


def count_errors(model: nn.Module, inputs: Tensor, labels: Tensor) -> Any:
    """How many samples a network gets wrong: an int, or for a Stack a list, one a run."""
    return (predict(model, inputs).argmax(-1) != labels).sum(-1).tolist()


def _report(state: State, source: _Source, loss: Tensor, hits: Tensor) -> None:
    report = {"step": state.step, "train_loss": loss.tolist()}
    if source.labelled:
        report["train_accuracy"] = (hits / source.batch_size).tolist()
    for name, value in report.items():
        state.curves.setdefault(name, []).append(value)


def _hits(logits: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """How many of a batch are right, where the first target is labels; else zero."""
    if targets and targets[0].dtype == torch.int64:
        return (logits.argmax(-1) == targets[0]).sum(-1).to(logits.dtype)
    return logits.new_zeros(logits.shape[:-2])


def _descent(
    weights: list[Tensor], velocity: list[Tensor], masses: Tensor, schedule: str
) -> Callable[[Sequence[Tensor], Tensor], None]:
    """Nesterov's step: v <- μ v + g, w <- w - (g + μ v); g has the learning rate in it.

    With one constant momentum that is the kernel of PyTorch's fused SGD, called without its
    optimiser (0.1 ms a step); else each run has its own.
    """
    values = set(masses.flatten().tolist())
    if schedule != "classic" and len(values) == 1 and (momentum := values.pop()) > 0:

        def fused(gradients: Sequence[Tensor], mass: Tensor) -> None:
            torch._fused_sgd_(
                weights,
                [_laid_out_as(w, g) for w, g in zip(weights, gradients, strict=True)],
                velocity,
                lr=1.0,
                momentum=momentum,
                nesterov=True,
                dampening=0.0,
                weight_decay=0.0,
                maximize=False,
                is_first_step=False,
            )

        return fused

    def each(gradients: Sequence[Tensor], mass: Tensor) -> None:
        masses = [mass.view(*mass.shape, *[1] * (w.dim() - mass.dim())) for w in weights]
        torch._foreach_mul_(velocity, masses)
        torch._foreach_add_(velocity, list(gradients))
        torch._foreach_sub_(weights, list(gradients))
        torch._foreach_addcmul_(weights, velocity, masses, value=-1)

    return each


def _as_gradients_lie(weight: Tensor) -> Tensor:
    """A stack's matrices (runs, out, in) as they lie in memory in their gradients, columns
    first: else each step copies all of these."""
    return weight.detach().mT.contiguous().mT if weight.dim() == 3 else weight.detach()


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with its weight's strides, which the fused kernel takes for granted."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _captured(
    step: Callable[..., list[Tensor]],
    source: "_Source",
    rates: Tensor,
    masses: Tensor,
    state: State,
) -> Callable[..., list[Tensor]]:
    """The step as one CUDA graph, so that the host only says «again»; else the step as it is.

    The warm-up that a capture needs changes the weights: they are put back.
    """
    before = copy.deepcopy(state.snapshot())
    _, index, shifts = next(source.batches(0, 1))
    mine = [x if x is None else x.clone() for x in (index, shifts, rates, masses)]
    side = torch.cuda.Stream(source.device)
    side.wait_stream(torch.cuda.current_stream(source.device))
    try:
        with torch.cuda.stream(side), _nobody_waits():
            for _ in range(3):
                step(*mine)
        torch.cuda.current_stream(source.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(*mine)
    except RuntimeError as error:
        warnings.warn(f"training step by step, without a CUDA graph: {error}", stacklevel=3)
        torch.cuda.synchronize(source.device)
        state.restore(before)
        return step
    state.restore(before)

    def replay(*theirs: Tensor | None) -> list[Tensor]:
        for static, fresh in zip(mine, theirs, strict=True):
            if static is not None and fresh is not None:
                static.copy_(fresh)
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def _nobody_waits() -> Iterator[None]:
    """RuntimeError where the host waits for the GPU, which a graph cannot hold: a capture
    that fails at it would leave PyTorch's generators behind as they are in a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _limit(model: nn.Module, length: float) -> None:
    """Shorten the incoming weights of every hidden unit to a length (L2), in place."""
    first = 2 if isinstance(model, Stack) else 1
    matrices = [weight for weight in model.parameters() if weight.dim() > first]
    for weight in matrices[:-1]:  # the last ones lead to the logits: no hidden units
        incoming = tuple(range(first, weight.dim()))
        norm = torch.linalg.vector_norm(weight, dim=incoming, keepdim=True)
        weight.mul_((length / norm).clamp(max=1))


def _one_cycle(at: float, rate: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Up in a line over the first fifth, then down along a cosine to 0."""
    if at < 0.2:
        return rate * (at / 0.2 + 0.01), mass
    return rate * (0.5 + 0.5 * math.cos(math.pi * (at - 0.2) / 0.8)), mass


def _classic(at: float, rate: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Of arXiv 1207.0580, for 3,000 epochs: momentum rises over the first sixth from half its
    value, the rate falls by 0.2 % an epoch and is multiplied by 1 - momentum."""
    mass = mass * min(1.0, 0.5 + 3 * at)
    return rate * (0.998 ** (3000 * at)) * (1 - mass), mass


SCHEDULES: dict[str, Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one-cycle": _one_cycle,
    "cosine": lambda at, rate, mass: (rate * (0.5 + 0.5 * math.cos(math.pi * at)), mass),
    "constant": lambda at, rate, mass: (rate, mass),
    "classic": _classic,
}


@contextlib.contextmanager
def settings(precision: str, device: torch.device) -> Iterator[None]:
    """The precision and PyTorch's own generators for one training, as they were afterwards."""
    before = torch.get_float32_matmul_precision()
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32, deterministic=True),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def effective(precision: str, device: torch.device) -> str:
    """The precision that is used: bf16 on a processor that is slow at it is fp32."""
    if precision == "bf16" and device.type == "cpu":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return precision


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _settle(velocity: list[Tensor]) -> None:
    """Zero the velocities that are nearly so, of weights that get no gradient any more.

    They would end as denormal numbers, at which a CPU is slow, and stay there. Measured: 18 % of
    all, and 2.6 instead of 1.1 ms a step, for 2 x 100 units at a rate of 0.4 after 2,000 steps.
    """
    for mine in velocity:
        mine.masked_fill_(mine.abs() < 1e-30, 0)


@functools.cache
def _keep_memory() -> None:
    """Let glibc keep freed blocks: giving them back costs each step a thousand page faults.

    Measured: a third less time for a step of 2 x 800 units on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks of up to 32 MiB come from the heap
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: what is above 1 GiB is given back


def _mix(*parts: object) -> int:
    """A seed of 63 bits from whatever decides it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def _above(name: str, value: float | None, whole: bool = False) -> None:
    kind = "a whole number, 1 or more" if whole else "a finite number above 0"
    real = isinstance(value, numbers.Integral if whole else numbers.Real)
    if value is not None and not (real and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}: expected {kind}")


def _known(name: str, value: str, values: Any) -> None:
    if value not in values:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(values)}")
