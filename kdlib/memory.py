"""How many runs a device holds, and recipes cut into groups of no more than that."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdlib import check, data, group
from kdlib.batches import BLOCK
from kdlib.recipe import Recipe

DECIDES_NOTHING = "how many runs share a stack changes only their rounding and their dropout's draw"

# What runs must have in common to be one stack: all else may differ from run to run.
_SHAPE = (
    "model", "dataset", "dropout", "batch_size", "schedule", "max_norm", "precision", "validation",
)  # fmt: skip
# Bytes for cuBLAS's workspaces, 32 MiB per stream on an H200, and a teacher.
_WORKSPACE = 2**27
# Runs in a group at most: each holds a lock file, and Linux lets a process open 1,024 files.
_MOST = 256


def cut(
    recipes: Sequence[Recipe], device: torch.device, stack: int | None = None
) -> list[list[Recipe]]:
    """Recipes in groups of one shape, each no larger than the device holds.

    stack: the most runs per group. By default what fits into memory on a GPU, and one on a
    CPU, where a stack is slower than its runs side by side (see the benchmark page). The same
    recipes on the same device are cut in the same way. Raises MemoryError for a recipe that
    does not fit even alone, ValueError for a network that does not fit its dataset.
    """
    stack = check.value("stack", stack, check.optional(check.COUNT))
    shapes: dict[Any, list[Recipe]] = {}
    for recipe in recipes:
        shape = [getattr(recipe, field) for field in _SHAPE]
        # With jitter the teachers see each batch, as a stack of their own; without it their
        # logits are data.
        teachers = [(t.model, t.dropout, t.precision) for t in recipe.teacher if recipe.jitter]
        shape += bool(recipe.teacher), tuple(teachers)
        shape += bool(recipe.label_smoothing), group.steps(recipe, device)
        shapes.setdefault(tuple(shape), []).append(recipe)
    groups = []
    for members in shapes.values():
        most = min(capacity(members[0], device), _MOST)
        size = min(most, stack or (most if device.type == "cuda" else 1))
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def needed(recipe: Recipe, device: torch.device) -> int:
    """Bytes that one more run of a stack takes at most, its data left out."""
    # In eval mode: dropout would draw from the generator that the caller's code draws from.
    network, samples = group.build(recipe).eval(), group.training(recipe, device)
    parameters = list(network.parameters())
    if not parameters:
        raise ValueError(f"the model {recipe.model!r} has no weights to train")
    weights, kind = sum(weight.numel() for weight in parameters), parameters[0].dtype
    inputs = data.to_input(samples.images[:2].cpu()).to(kind)
    outputs = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output[0].numel()

    # Only layers without layers in them: a container's output is that of its last one.
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    classes = group.classes(network, inputs, recipe, device)
    # Training or evaluation, whichever has more samples at once.
    batch = max(recipe.batch_size, 2000)
    # Numbers of samples of 8 bytes, and two shifts with each.
    drawn = BLOCK * recipe.batch_size * 8 * (3 if recipe.jitter else 1)
    # Weights, velocity, gradients and their copies; activations with gradients, and inputs.
    numbers = 6 * weights + 3 * batch * (outputs + inputs[0].numel())
    # With jitter each run has its teachers on the device: built, stacked and laid out.
    taught = 0
    for teacher in recipe.teacher if recipe.jitter else ():
        taught += 3 * sum(weight.nbytes for weight in group.build(teacher).parameters())
    size: int = kind.itemsize
    return size * numbers + taught + 2 * drawn + len(samples) * classes * 4


def planned(recipe: Recipe, runs: int, device: torch.device) -> int:
    """Bytes that a group takes at most, with its data and what PyTorch keeps for its work."""
    dataset = data.load(recipe.dataset, device)
    images = dataset.full.images.numel() + dataset.test.images.numel()
    return runs * needed(recipe, device) + 2 * images + _WORKSPACE


def capacity(recipe: Recipe, device: torch.device) -> int:
    """How many runs of a recipe's shape the device holds, leaving a third of it free."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows has no such call
        total = 8 * 2**30
    one = needed(recipe, device)
    most = int((total * 2 / 3 - planned(recipe, 0, device)) // one)
    if most < 1:
        raise MemoryError(
            f"one run of {recipe.model!r} at batch_size={recipe.batch_size} needs about "
            f"{one / 2**30:.1f} GiB, more than {device} can give "
            f"({total / 2**30:.1f} GiB): use a smaller batch_size or model"
        )
    return most
