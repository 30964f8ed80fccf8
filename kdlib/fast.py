"""What makes a step fast and changes no result beyond rounding.

`fit` trains the same network, only slower, with each of these left out.
"""

import contextlib
import copy
import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kdlib.precision import changed

# What `fit` calls per step: sample indices, shifts, learning rate and momentum in; per run the
# loss and the number of right answers out.
Step = Callable[[Tensor, Tensor | None, Tensor, Tensor], list[Tensor]]
Update = Callable[[Sequence[Tensor], Tensor], None]


def threads(count: int) -> contextlib.AbstractContextManager[None]:
    """Compute with so many threads, and with as many as before afterwards.

    Small networks gain little from a second thread, and lose a factor of four where another
    process needs the core: the threads of one operation wait for each other.
    """
    return changed(torch.get_num_threads, torch.set_num_threads, count)


def fused_update(weights: list[Tensor], velocity: list[Tensor], momentum: float) -> Update:
    """Nesterov's step with one constant momentum, as the kernel of PyTorch's fused SGD.

    Called without its optimiser, which takes 0.1 ms per step. The gradients that it gets have
    the learning rate in them.
    """

    def update(gradients: Sequence[Tensor], _: Tensor) -> None:
        alike = [_with_strides_of(w, g) for w, g in zip(weights, gradients, strict=True)]
        torch._fused_sgd_(
            _as_in_memory(weights),
            _as_in_memory(alike),
            _as_in_memory(velocity),
            lr=1.0,
            momentum=momentum,
            nesterov=True,
            dampening=0.0,
            weight_decay=0.0,
            maximize=False,
            is_first_step=False,
        )

    return update


def _with_strides_of(weight: Tensor, gradient: Tensor) -> Tensor:
    # The fused kernel walks through both in memory order and takes equal strides for granted.
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _as_in_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    # A stack's matrices, seen as they lie in memory: on a CPU the fused kernel copies gradients
    # that are not contiguous.
    return [t.mT if t.dim() == 3 and not t.is_contiguous() else t for t in tensors]


def transposed_in_memory(weight: Tensor) -> Tensor:
    """A stack's matrices (runs, out, in) with their columns first in memory.

    Their gradients come so: with other strides each step would copy all of these.
    """
    return weight.mT.contiguous().mT if weight.dim() == 3 else weight


def without_denormals(velocity: list[Tensor]) -> None:
    """Zero the velocities that are nearly so, of weights that get no gradient any more.

    They would end as denormal numbers, at which a CPU is slow, and stay there. Measured: 18 % of
    all, and 2.6 instead of 1.1 ms per step, for 2 x 100 units at a rate of 0.4 after 2,000 steps.
    """
    for tensor in velocity:
        if tensor.device.type == "cpu":
            tensor.masked_fill_(tensor.abs() < 1e-30, 0)


@functools.cache
def keep_memory() -> None:
    """Let glibc keep freed blocks: giving them back costs each step a thousand page faults.

    Measured: a third less time per step of 2 x 800 units on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # M_MMAP_THRESHOLD: blocks of up to 32 MiB come from the heap.
        mallopt(-3, 1 << 25)
        # M_TRIM_THRESHOLD: what is above 1 GiB is given back.
        mallopt(-1, 1 << 30)


def prepared(step: Step, batches: Any, rates: Tensor, momenta: Tensor, state: Any) -> Step:
    """The step as this device takes it fastest."""
    keep_memory()
    # On a CPU there is no launch to save: a step as it stands is the fastest.
    if rates.device.type != "cuda":
        return step
    _, index, shifts = next(batches.between(0, 1))
    state.model.train()
    return captured(step, [index, shifts, rates, momenta], state)


def captured(step: Step, arguments: Sequence[Tensor | None], state: Any) -> Step:
    """The step recorded as a CUDA graph; in eager mode, with a warning, where that fails.

    arguments: those of any one call. The warm-up that a capture needs changes the weights:
    `state` has snapshot() and restore(snapshot), which put them back.
    """
    before = copy.deepcopy(state.snapshot())
    # A graph reads its inputs from fixed addresses, into which each call copies its own.
    static_inputs = [None if tensor is None else tensor.clone() for tensor in arguments]
    device = next(tensor.device for tensor in static_inputs if tensor is not None)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side), _waiting_is_an_error():
            for _ in range(3):
                step(*static_inputs)  # type: ignore[arg-type]
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # On the weights' own device, which need not be the current one.
        with torch.cuda.graph(graph, stream=side):
            results = step(*static_inputs)  # type: ignore[arg-type]
    except RuntimeError as error:
        warnings.warn(f"training step by step, without a CUDA graph: {error}", stacklevel=3)
        torch.cuda.synchronize(device)
        state.restore(before)
        return step
    state.restore(before)

    def replay(*inputs: Tensor | None) -> list[Tensor]:
        for static, new in zip(static_inputs, inputs, strict=True):
            if static is not None and new is not None:
                static.copy_(new)
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """RuntimeError where the host waits for the GPU, which a graph cannot hold.

    A capture that fails at it would leave PyTorch's generators in their capturing state.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
