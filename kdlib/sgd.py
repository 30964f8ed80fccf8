"""How a step changes the weights: Nesterov's update, and the limit on their norms."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlib import fast
from kdlib.stack import Stack


def trainable(model: nn.Module, precision: str) -> list[Tensor]:
    """The weights to train, as float64 where that is the precision.

    Raises ValueError for a network without any.
    """
    if precision == "fp64":
        model.double()
    weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError(f"the {type(model).__name__} has no weights to train")
    return weights


def update_rule(
    weights: list[Tensor], velocity: list[Tensor], momenta: Tensor, constant: bool
) -> fast.Update:
    """Nesterov's step, in place: v <- μ v + g, then w <- w - (g + μ v).

    Called with the gradients g, which have the learning rate in them, and with each run's
    momentum μ. constant: whether μ stays `momenta` in all steps.
    """
    values = set(momenta.flatten().tolist())
    if constant and len(values) == 1 and 0 not in values:
        return fast.fused_update(weights, velocity, values.pop())

    def update(gradients: Sequence[Tensor], momentum: Tensor) -> None:
        # Each run's momentum, with as many dimensions as the weight that it multiplies.
        momenta = [
            momentum.view(*momentum.shape, *[1] * (w.dim() - momentum.dim())) for w in weights
        ]
        torch._foreach_mul_(velocity, momenta)
        torch._foreach_add_(velocity, list(gradients))
        torch._foreach_sub_(weights, list(gradients))
        torch._foreach_addcmul_(weights, velocity, momenta, value=-1)

    return update


def limit_norms(model: nn.Module, length: float) -> None:
    """Shorten the incoming weights of every hidden unit to a length (L2), in place."""
    # The weights of a stack have the run in front.
    first = 2 if isinstance(model, Stack) else 1
    matrices = [weight for weight in model.parameters() if weight.dim() > first]
    # The last matrix leads to the logits, which are no hidden units.
    for weight in matrices[:-1]:
        if not weight.requires_grad:
            continue
        norm = torch.linalg.vector_norm(weight, dim=tuple(range(first, weight.dim())), keepdim=True)
        weight.mul_((length / norm).clamp(max=1))
