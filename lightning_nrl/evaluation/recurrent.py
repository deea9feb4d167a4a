"""Unrolls LSTM, GRU and RNN layers into time steps, with a Linear for each of their weights.

The unrolled layers can be repaired by code that handles Linears only. In each layer and direction,
the Linear of the input weights is called once, on the whole sequence, and the Linear of the hidden
weights at every time step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import replaced
from lightning_nrl.errors import ConfigurationError

Recurrent = nn.LSTM | nn.GRU | nn.RNN
"""Kinds of recurrent layer that can be repaired."""
States = tuple[Tensor, ...]
"""Hidden state, and cell state of an LSTM."""


class GateLinear(nn.Linear):
    """A Linear with parameters of a recurrent layer, such as `weight_ih_l0` if `end` is `ih_l0`."""

    owner: Recurrent

    def __init__(self, owner: Recurrent, end: str) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # set in this way, it does not become a submodule
        self.end = end
        self.out_features, self.in_features = self.weight.shape
        self.train(owner.training)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self.owner._parameters[f"weight_{self.end}"])

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.owner._parameters.get(f"bias_{self.end}")


@dataclass(frozen=True, eq=False)
class Gates:
    """A recurrent layer and a Linear for each of its weights."""

    module: Recurrent  # the layer itself, not a copy
    # By suffix of the weight's name, such as `ih_l0` or `hh_l0_reverse`.
    linears: Mapping[str, GateLinear]

    def forward(
        self, input: Tensor, hx: Tensor | States | None = None
    ) -> tuple[Tensor, Tensor | States]:
        """Computes what the layer computes, by the Linears."""
        module = self.module
        if not isinstance(input, Tensor) or input.dim() == 2:
            name = type(module).__name__
            raise ConfigurationError(
                f"`layer`: a {name} that gets packed sequences, or a sequence without a batch "
                "dimension, cannot be repaired.",
                "give the layer a batch of padded sequences, or name another layer.",
            )
        start = (hx,) if isinstance(hx, Tensor) else hx
        if module.batch_first:
            x, end = self._run(input, start)
        else:
            x, end = self._run(input.transpose(0, 1), start)
            x = x.transpose(0, 1)
        if isinstance(module, nn.LSTM):
            return x, end
        return x, end[0]

    def _run(self, x: Tensor, start: States | None) -> tuple[Tensor, States]:
        """Runs all layers on `n x steps x features`, with states `layers x n x units`."""
        module = self.module
        ends: list[States] = []
        for layer in range(module.num_layers):
            outputs = []
            for side, reverse in _sides(module, layer):
                state = None
                if start is not None:
                    state = tuple(states[len(ends)] for states in start)
                output, end = self._run_side(side, x, state, reverse=reverse)
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1)
        states = zip(*ends, strict=True)
        return x, tuple(map(torch.stack, states))

    def _run_side(
        self,
        side: str,
        x: Tensor,
        state: States | None,
        *,
        reverse: bool,
    ) -> tuple[Tensor, States]:
        """Runs a layer in one direction; returns outputs and final states, `n x units`."""
        module = self.module
        steps = list(self.linears[f"ih_{side}"](x).unbind(1))
        hidden = self.linears[f"hh_{side}"]
        if state is None:
            zero = steps[0].new_zeros(len(x), module.hidden_size)
            state = (zero, zero) if isinstance(module, nn.LSTM) else (zero,)
        if reverse:
            steps.reverse()
        outputs = []
        for step in steps:
            state = _step(module, step, hidden(state[0]), state)
            outputs.append(state[0])
        if reverse:
            outputs.reverse()
        return torch.stack(outputs, 1), state


def gates_of(name: str, module: Recurrent) -> Gates:
    """Creates the Linears of a recurrent layer.

    Raises a `ConfigurationError` for an LSTM with projections.
    """
    if module.proj_size:
        raise ConfigurationError(
            f"`layer={name!r}` is an LSTM with projections, which cannot be repaired.",
            "name another layer.",
        )
    linears = {}
    for layer in range(module.num_layers):
        for side, _ in _sides(module, layer):
            for end in (f"ih_{side}", f"hh_{side}"):
                linears[end] = GateLinear(module, end)
    return Gates(module, linears)


def _sides(module: Recurrent, layer: int) -> list[tuple[str, bool]]:
    """Returns a layer's directions: the end of its weights' names, and True if it is backwards."""
    sides = [(f"l{layer}", False)]
    if module.bidirectional:
        sides.append((f"l{layer}_reverse", True))
    return sides


@contextmanager
def unroll(gates: Sequence[Gates]) -> Iterator[None]:
    """Replaces the forward of recurrent layers: they call their Linears step by step."""
    with ExitStack() as stack:
        for layer in gates:
            stack.enter_context(patched_forward(layer.module, layer.forward))
        yield


@contextmanager
def patched_forward(
    module: nn.Module,
    forward: Callable[..., object],
    *,
    hooks: bool = True,
) -> Iterator[None]:
    """Replaces a module's `forward` inside the context; `hooks=False` also disables its hooks.

    With `hooks=True` an empty hook is added. Modules such as `TransformerEncoderLayer` have a fused
    path that would not call the new `forward` of their parts; they do not take this path if one of
    their parts has a hook.
    """
    attributes = vars(module)
    patch: dict[str, object] = {"forward": forward, "_compiled_call_impl": None}
    if hooks:
        with_empty_hook = OrderedDict(attributes["_forward_hooks"])
        with_empty_hook[-1] = lambda module, args, output: None
        patch["_forward_hooks"] = with_empty_hook
    else:
        patch["_forward_hooks"] = OrderedDict()
        patch["_forward_pre_hooks"] = OrderedDict()
    with replaced(module, **patch):
        yield


def _step(
    module: Recurrent,
    of_input: Tensor,
    of_hidden: Tensor,
    state: States,
) -> States:
    if isinstance(module, nn.LSTM):
        i, f, g, o = (of_input + of_hidden).chunk(4, 1)
        update = torch.sigmoid(i) * torch.tanh(g)
        cell = torch.sigmoid(f) * state[1] + update
        return torch.sigmoid(o) * torch.tanh(cell), cell
    if isinstance(module, nn.GRU):
        r_input, z_input, n_input = of_input.chunk(3, 1)
        r_hidden, z_hidden, n_hidden = of_hidden.chunk(3, 1)
        r = torch.sigmoid(r_input + r_hidden)
        z = torch.sigmoid(z_input + z_hidden)
        n = torch.tanh(n_input + r * n_hidden)
        return ((1 - z) * n + z * state[0],)
    activation = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return (activation(of_input + of_hidden),)
