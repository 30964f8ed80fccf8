"""What tests of data, training and the store share: small data, and processes of their own."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kdlib import data

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kdlib", "torchvision.datasets", "hypothesis.extra.numpy"])


def blobs(train: int = 240, test: int = 60, noise: float = 60) -> data.Arrays:
    """Ten classes of noisy images; a corner's 4 bytes number the samples, so rows are known."""
    generator = torch.Generator().manual_seed(7)
    prototypes = torch.rand(10, 28, 28, generator=generator) * 150
    labels = torch.arange(train + test) % 10
    spread = torch.randn(train + test, 28, 28, generator=generator) * noise
    images = (prototypes[labels] + spread).clamp(0, 255).to(torch.uint8)
    numbers = torch.arange(train + test)
    for byte in range(4):
        images[:, 0, byte] = ((numbers >> (8 * byte)) & 255).to(torch.uint8)
    return images[:train], labels[:train], images[train:], labels[train:]


def numbers(images: torch.Tensor) -> torch.Tensor:
    """Which samples of `blobs` these are."""
    corner = images[:, 0, :4].long()
    return (corner << torch.tensor([0, 8, 16, 24])).sum(1)


def process(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process, started, that does some work in this one's environment."""
    started = FORKS.Process(target=_there, args=(dict(os.environ), work, arguments))
    started.start()
    return started


def exit_codes(*processes: BaseProcess) -> list[int | None]:
    """How processes ended, once they have."""
    for one in processes:
        one.join()
    return [one.exitcode for one in processes]


def _there(environment: dict[str, str], work: Callable[..., Any], arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)
