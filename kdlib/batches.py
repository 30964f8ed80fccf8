"""Which samples come when: a function of a seed and a position, never of what was drawn before.

Each run sees an endless stream of epochs, each a new order of all its samples; step s takes the
positions s · batch_size up to (s + 1) · batch_size. So an interrupted training goes on from its
step alone, and the runs of a `Stack` see what each would see by itself.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import check
from kdlib.data import to_input, translate

# Steps whose samples are drawn at once: drawing has a cost per call, and takes memory.
BLOCK = 512


class Batches:
    """The samples of one training: of one network, or of a `Stack`'s runs.

    model: decides device, dtype and the number of runs. data: (inputs, *targets), tensors (N, …)
    on that device; for a stack, a list of tensors is one per run. rows, seed and jitter are one
    value for all runs, or one per run. In a stack, indices and shifts have the run as their
    leading dimension. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        batch_size: int,
        rows: Tensor | Sequence[Tensor] | None = None,
        seed: int | Sequence[int] = 0,
        jitter: int | Sequence[int] = 0,
    ) -> None:
        weight = next(model.parameters())
        self.device, self.dtype, self.batch_size = weight.device, weight.dtype, batch_size
        self.runs: int | None = getattr(model, "runs", None)
        parts = _parts(data, self.device, self.runs)
        count = len(parts[0][0])
        # A part of which each run has its own is one tensor too, run after run.
        self.tensors = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        self.shared = [len(part) == 1 for part in parts]
        self.first_rows = torch.arange(self.runs or 1, device=self.device)[:, None] * count
        every = torch.arange(count, device=self.device)
        self.rows = _rows_per_run(every if rows is None else rows, self.runs or 1, count)
        self.sizes = [len(chosen) for chosen in self.rows]
        self.seeds = _values("seed", seed, self.runs, check.whole())
        self.seed = self.seeds[0] if self.runs is None else self.seeds
        self.jitters = _values("jitter", jitter, self.runs, check.whole())
        # Only images can be moved, and an image moved by its whole size is empty.
        is_image = self.tensors[0].dtype == torch.uint8
        side = min(self.tensors[0].shape[-2:]) if is_image else 1
        if max(self.jitters) >= side:
            check.refuse("jitter", jitter, "pixels from 0, fewer than the uint8 images have")
        first_target = self.tensors[1] if len(self.tensors) > 1 else None
        self.labelled = (
            first_target is not None
            and first_target.dtype == torch.int64
            and first_target.dim() == 1
        )

    def per_run(self, name: str, given: Any, rule: check.Rule) -> Tensor:
        """A setting as a tensor: () for one network, (runs,) for a stack."""
        values = _values(name, given, self.runs, rule)
        plain = values[0] if self.runs is None else values
        return torch.tensor(plain, dtype=self.dtype, device=self.device)

    def between(self, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Step by step: its number, sample indices (…, batch), shifts (…, batch, 2) if any."""
        size = self.batch_size
        # A block begins anywhere in a run's stream, so its length changes no sample.
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            drawn = [self._draw(run, start * size, stop * size) for run in range(self.runs or 1)]
            if self.runs is None:
                index, shifts = drawn[0]
            else:
                index, shifts = map(torch.stack, zip(*drawn, strict=True))
            for step in range(start, stop):
                here = slice((step - start) * size, (step - start + 1) * size)
                moved = shifts[..., here, :] if any(self.jitters) else None
                yield step, index[..., here], moved

    def _draw(self, run: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Samples and shifts at the positions start to stop of a run's stream."""
        size, most = self.sizes[run], self.jitters[run]
        samples, shifts = [], [torch.zeros(0, 2, dtype=torch.int64, device=self.device)]
        generator = torch.Generator(self.device)
        # Each epoch has a generator state of its own: none depends on those before it.
        for epoch in range(start // size, (stop - 1) // size + 1):
            part = slice(max(start - epoch * size, 0), stop - epoch * size)
            generator.manual_seed(mixed_seed(self.seeds[run], "pass", epoch))
            order = torch.randperm(size, generator=generator, device=self.device)
            samples.append(order[part])
            # One run's jitter makes the whole stack's: a run without gets shifts of 0.
            if any(self.jitters):
                moves = torch.randint(
                    -most, most + 1, (size, 2), generator=generator, device=self.device
                )
                shifts.append(moves[part])
        return self.rows[run][torch.cat(samples)], torch.cat(shifts)

    def samples(self, index: Tensor, shifts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Some samples' inputs, as the network takes them, and their targets."""
        inputs, *targets = (
            _take(tensor, index if shared else self.first_rows + index)
            for tensor, shared in zip(self.tensors, self.shared, strict=True)
        )
        if shifts is not None:
            images = inputs.flatten(0, index.dim() - 1)
            inputs = translate(images, shifts.flatten(0, -2)).view_as(inputs)
        # Labels stay int64; what is measured, such as logits, has the network's dtype.
        cast = [part.to(self.dtype) if part.is_floating_point() else part for part in targets]
        return as_inputs(inputs, self.tensors[0].dim() - 1, self.dtype), cast


def as_inputs(samples: Tensor, sample_dims: int, dtype: torch.dtype) -> Tensor:
    """uint8 images as the networks take them, scaled to [0, 1]; other inputs as they are.

    sample_dims: 2 for images (height, width), which get a channel, 3 for (channels, height,
    width). Integers, such as an embedding's, stay integers.
    """
    if samples.dtype == torch.uint8:
        samples = to_input(samples) if sample_dims == 2 else samples.float().div_(255)
    return samples.to(dtype) if samples.is_floating_point() else samples


def _values(name: str, given: Any, runs: int | None, rule: check.Rule) -> list[Any]:
    """A setting as a list, one value per run; a single value is that of all runs."""
    values = list(given) if np.ndim(given) else [given] * (runs or 1)
    if len(values) != (runs or 1):
        raise ValueError(f"{name} has {len(values)} values: expected {runs or 1}, one per run")
    plain = [value.item() if isinstance(value, Tensor) else value for value in values]
    return [check.value(name, value, rule) for value in plain]


def mixed_seed(*parts: object) -> int:
    """A 63-bit seed, hashed from what decides it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[index], whatever the shape of the index."""
    # For uint8 images on a CPU this takes a tenth of the time of an index in brackets.
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])


def _refuse(part: Any) -> NoReturn:
    raise ValueError(
        f"data hold a {type(part).__name__}: expected (inputs, *targets), tensors on the model's "
        "device, or for a Stack lists of one tensor per run; for a DataLoader, pass the tensors "
        "of its dataset"
    )


def _parts(data: Any, device: torch.device, runs: int | None) -> list[list[Tensor]]:
    """The data, each part as a list: of one tensor for all runs, or of one per run."""
    if not isinstance(data, list | tuple):
        _refuse(data)
    parts = [list(part) if isinstance(part, list | tuple) else [part] for part in data]
    # A list of another length is a mistake, and would be taken for samples if it were stacked.
    for given, part in zip(data, parts, strict=True):
        if len(part) not in (1, runs) or not all(isinstance(one, Tensor) for one in part):
            _refuse(given)
    sizes = [len(tensor) for part in parts for tensor in part]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(f"data have {sizes} samples: expected equal numbers, above 0")
    # PyTorch would name neither the tensor nor the way out, and that only in the first step.
    elsewhere = {str(tensor.device) for part in parts for tensor in part} - {str(device)}
    if elsewhere:
        raise ValueError(
            f"data are on {elsewhere.pop()}, the model on {device}: "
            "expected one device, move either with .to()"
        )
    return parts


def _rows_per_run(rows: Tensor | Sequence[Tensor], runs: int, count: int) -> list[Tensor]:
    """The samples that each run trains on."""
    chosen = [rows] * runs if isinstance(rows, Tensor) else list(rows)
    if len(chosen) != runs:
        raise ValueError(f"rows has {len(chosen)} values: expected {runs}, one per run")
    # A set, since rows that several runs share need to be looked at only once.
    for part in set(chosen):
        if not len(part):
            raise ValueError("rows are empty: expected the numbers of some samples")
        if part.dtype != torch.int64 or int(part.min()) < 0 or int(part.max()) >= count:
            raise ValueError(
                f"rows are {part.dtype} from {part.min()} to {part.max()}: expected "
                f"int64, the numbers of samples from 0 to {count - 1}"
            )
    return chosen
