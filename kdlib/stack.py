"""Networks of one architecture as one module, so that one loop trains them together."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from kdlib import fast


class Stack(nn.Module):
    """Networks of one architecture as one module: weights (runs, …), inputs (runs, N, …).

    forward gives (runs, N, classes). With shared=True all runs see the same inputs (N, …).
    Raises ValueError for networks with buffers, such as batch normalisation has, or with
    parameters that are views of one another: a stack would mix these up.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = len(networks)
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
        linear = [name for name, part in networks[0].named_modules() if isinstance(part, nn.Linear)]
        self._linear_biases = {f"{name}.bias".lstrip(".") for name in linear} & weights.keys()
        # In a tuple, so that it is no submodule: its parameters are not the stack's.
        self._skeleton = (copy.deepcopy(networks[0]).to("meta"),)

    def _named(self) -> dict[str, Tensor]:
        return {name: self.weights[at] for name, at in self._places.items()}

    def forward(self, inputs: Tensor, shared: bool = False) -> Tensor:
        (skeleton,) = self._skeleton
        skeleton.train(self.training)
        weights, device = self._named(), inputs.device.type
        if torch.is_autocast_enabled(device):
            # vmap takes a linear layer apart, and autocast then converts its product only: with a
            # float32 bias, the sum and every later activation would be float32.
            dtype = torch.get_autocast_dtype(device)
            weights |= {name: weights[name].to(dtype) for name in self._linear_biases}

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
