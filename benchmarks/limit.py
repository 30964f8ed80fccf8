"""The physical limit of a step: operations over the measured matmul rate, bytes over the
measured copy rate; the larger of the two times binds."""

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.systems import Job, network
from kdlib.precision import settings

TURNS = 7


@functools.cache
def matmul_rate(device: torch.device, precision: str, size: int) -> float:
    """Operations a second of a product of square matrices, at its best."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    with settings(precision, device):
        return 2 * size**3 / _seconds(device, lambda: left @ right)


@functools.cache
def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written a second, by a copy that touches `size` bytes, at its best."""
    source = torch.ones(max(size, 2**20) // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(device, lambda: target.copy_(source))


def operations(job: Job) -> int:
    """Multiplications and additions of a step, from the shapes, for all runs of a stack."""
    task = job.task
    inputs = torch.zeros(task.batch_size, 1, 28, 28)
    student, teacher = (network(name, 0) for name in (task.student, task.teacher))
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        student(inputs).sum().backward()
        if not job.cached:
            stack.enter_context(torch.no_grad())
            teacher(inputs)
    return counter.get_total_flops() * job.runs


def touched(job: Job) -> tuple[int, int]:
    """(bytes moved, bytes that live) in a step at the least, for all runs of a stack.

    A weight: read forward and backward, its gradient written and read, velocity and weight
    read and written: 8 times 4 bytes. An activation: written, read forward and backward, its
    gradient written and read: 5 times 4 bytes, or 2 in bf16. A pixel: a byte read, a float
    written and read twice. A teacher asked on every batch: weights read, activations written
    and read.
    """
    task = job.task
    weights, outputs = _sizes(task.student)
    width = 2 if job.precision == "bf16" else 4
    batch = task.batch_size
    moved = 32 * weights + batch * (5 * width * outputs + 784 * (1 + 3 * width))
    live = 12 * weights + batch * (2 * width * outputs + 784 * (1 + width))
    if not job.cached:
        weights, outputs = _sizes(task.teacher)
        moved += 4 * weights + batch * 2 * width * outputs
        live += 4 * weights + batch * width * outputs
    return moved * job.runs, live * job.runs


def _sizes(name: str) -> tuple[int, int]:
    """Weights of a network, and numbers that its layers put out for one sample."""
    made, outputs = network(name, 0), 0

    def count(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output[0].numel()

    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ReLU | nn.MaxPool2d):
            layer.register_forward_hook(count)
    made(torch.zeros(1, 1, 28, 28))
    return sum(weight.numel() for weight in made.parameters()), outputs


def _seconds(device: torch.device, act: Callable[[], object]) -> float:
    """The shortest time of an act, repeated so that one timing takes about 20 ms."""
    repeats = 1
    while (taken := _timed(device, act, repeats)) < 0.02:
        repeats *= 2
    return min(taken, *(_timed(device, act, repeats) for _ in range(TURNS))) / repeats


def _timed(device: torch.device, act: Callable[[], object], repeats: int) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        act()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
