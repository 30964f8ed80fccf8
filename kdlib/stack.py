"""Networks of one architecture as one module, so that one loop trains them together."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from kdlib import fast

# What autocast computes in its lower precision. vmap takes these layers apart before autocast sees
# them: it would convert a product, but not the bias that is added, so that all activations were
# float32. A stack therefore converts their weights and inputs itself.
_LOWERED = nn.Linear, nn.modules.conv._ConvNd, nn.PReLU


def _with_dtype_of_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].to(layer.weight.dtype), *inputs[1:]


class Stack(nn.Module):
    """Networks of one architecture as one module: weights (runs, …), inputs (runs, N, …).

    forward gives (runs, N, classes). With shared=True all runs see the same inputs (N, …).
    Under autocast, linear and convolutional layers compute as they do alone; what follows them
    takes their outputs as they are (alone, a softmax or a normalisation may convert them).
    Raises ValueError for networks with buffers, such as batch normalisation has, with parameters
    that are views of one another, or frozen in some networks only: a stack would mix these up.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = len(networks)
        frozen = {tuple(w.requires_grad for w in network.parameters()) for network in networks}
        if len(frozen) > 1:
            raise ValueError(
                f"some {type(networks[0]).__name__} have frozen weights that others train: freeze "
                "the same ones in all (.requires_grad_(False) on a teacher), or use stack=1"
            )
        weights, buffers = stack_module_state(list(networks))
        memory = {weight.untyped_storage().data_ptr() for weight in networks[0].parameters()}
        if buffers or len(memory) < len(weights):
            raise ValueError(
                f"{type(networks[0]).__name__} has buffers or parameters that are views of one "
                f"another ({', '.join(buffers) or 'the latter'}), which a stack would mix up: "
                "train such networks one at a time (stack=1)"
            )
        self.weights = nn.ParameterList(
            nn.Parameter(fast.transposed_in_memory(weight.detach()), weight.requires_grad)
            for weight in weights.values()
        )
        # A tied weight has several names, and is one weight.
        place = {id(weight): at for at, weight in enumerate(networks[0].parameters())}
        every = networks[0].named_parameters(remove_duplicate=False)
        self._places = {name: place[id(weight)] for name, weight in every}
        # In a tuple, so that it is no submodule: its parameters are not the stack's.
        self._skeleton = (copy.deepcopy(networks[0]).to("meta"),)
        self._lowered: list[str] = []
        for path, layer in self._skeleton[0].named_modules():
            if isinstance(layer, _LOWERED):
                layer.register_forward_pre_hook(_with_dtype_of_weight)
                own = dict(layer.named_parameters(recurse=False))
                self._lowered += [f"{path}.{name}".lstrip(".") for name in own]

    def _named(self) -> dict[str, Tensor]:
        return {name: self.weights[at] for name, at in self._places.items()}

    def forward(self, inputs: Tensor, shared: bool = False) -> Tensor:
        (skeleton,) = self._skeleton
        skeleton.train(self.training)
        weights, device = self._named(), inputs.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            for name in self._lowered:
                if weights[name].dtype == torch.float32:
                    weights[name] = weights[name].to(dtype)

        def one(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
            return functional_call(skeleton, weights, (batch,))  # type: ignore[no-any-return]

        # "different": each run draws dropout of its own.
        every = torch.vmap(one, in_dims=(0, None if shared else 0), randomness="different")
        return every(weights, inputs)

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state_dict of each network, in order."""
        named = self._named()
        return [
            {name: weight[run].detach().clone() for name, weight in named.items()}
            for run in range(self.runs)
        ]
