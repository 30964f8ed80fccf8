"""The page on which a reader draws a digit: its networks in 8 bits, and what it does to a drawing.

`book/_static/draw.js` does the same in the browser; the tests compare the two.
"""

import base64
import json

import torch
from torch import Tensor, nn

import kdlib

# name in the page -> name of a network that comes with kdlib
NETWORKS = {
    "teacher": "mnist-teacher",
    "plain": "mnist-small-plain-student",
    "distilled": "mnist-small-distilled-student",
}
# MNIST's digits fit a box of 20 pixels, and their centre of mass is at (14, 14).
BOX, SIZE = 20, 28


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights (out, in) and one scale per row, so that weight ≈ scale · int8."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale[:, 0]


def network(name: str) -> nn.Module:
    """One of the page's networks as PyTorch computes it, with the page's 8-bit weights."""
    model = kdlib.pretrained(NETWORKS[name], "cpu").model()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            whole, scale = quantised(layer.weight.data)
            layer.weight.data = whole * scale[:, None]
    return model


def script() -> str:
    """A script that gives the page its networks: int8 weights and float32 numbers, in base64."""
    found = {}
    for name, file in NETWORKS.items():
        model = kdlib.pretrained(file, "cpu").model()
        found[name] = [_layer(m) for m in model.modules() if isinstance(m, nn.Linear)]
    return f"window.kdNetworks = {json.dumps(found)};\n"


def _layer(layer: nn.Linear) -> dict[str, object]:
    whole, scale = quantised(layer.weight.data)
    parts = {"weight": whole, "scale": scale, "bias": layer.bias.data}
    return {"inputs": layer.in_features} | {
        key: base64.b64encode(part.numpy().tobytes()).decode() for key, part in parts.items()
    }


def prepared(ink: Tensor) -> Tensor:
    """A drawing as MNIST would have it: (height, width) from 0 to 1 -> (28, 28) of the same range.

    The ink's bounding box is scaled to 20 pixels, each the mean of the area that it covers,
    and moved by whole pixels until its centre of mass is at (14, 14).
    Raises ValueError for a drawing without ink.
    """
    rows, columns = ((ink > 0).any(axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        raise ValueError("the drawing has no ink: draw something first")
    ends = [(int(part[0]), int(part[-1]) + 1) for part in (rows, columns)]
    longer = max(end - start for start, end in ends)
    down, across = (
        _means(len(line), start, end, max(1, round(BOX * (end - start) / longer)))
        for (start, end), line in zip(ends, (ink, ink[0]), strict=True)
    )
    small = down @ ink @ across.T
    placed = torch.zeros(SIZE, SIZE)
    top, left = (_start(small.sum(axis)) for axis in (1, 0))
    placed[top : top + small.shape[0], left : left + small.shape[1]] = small
    return placed


def _means(length: int, start: int, end: int, parts: int) -> Tensor:
    """(parts, length): each row takes the mean of an equal part of start … end."""
    edges = start + (end - start) * torch.arange(parts + 1) / parts
    places = torch.arange(length)
    covered = torch.minimum(edges[1:, None], places + 1) - torch.maximum(edges[:-1, None], places)
    return covered.clamp_min(0) * parts / (end - start)


def _start(line: Tensor) -> int:
    """Where a line of ink begins, so that its centre of mass is at 14 and all of it fits."""
    centre = float((line * torch.arange(len(line))).sum() / line.sum())
    # Half a pixel up, as JavaScript rounds.
    return min(max(int(SIZE / 2 - centre + 0.5), 0), SIZE - len(line))
