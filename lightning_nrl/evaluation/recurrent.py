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
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl.errors import ConfigurationError

Recurrent = nn.LSTM | nn.GRU | nn.RNN
"""Kinds of recurrent layer that can be repaired."""


class GateLinear(nn.Linear):
    """A Linear that uses parameters of a recurrent layer: `weight_ih_l0` and `bias_ih_l0` if `end`
    is `ih_l0`.
    """

    def __init__(self, owner: Recurrent, end: str) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # set in this way, it does not become a submodule
        self.end = end
        self.out_features, self.in_features = self.weight.shape
        self.train(owner.training)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        found: Any = self.__dict__["owner"]._parameters[f"weight_{self.end}"]
        return found  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        found: Any = self.__dict__["owner"]._parameters.get(f"bias_{self.end}")
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Gates:
    """A recurrent layer and a Linear for each of its weights."""

    module: Recurrent  # the layer itself, not a copy
    linears: Mapping[
        str, GateLinear
    ]  # by suffix of the weight's name, such as `ih_l0` or `hh_l0_reverse`


def gates_of(name: str, module: Recurrent) -> Gates:
    """Creates the Linears of a recurrent layer. Raises a `ConfigurationError` for an LSTM with
    projections.
    """
    if getattr(module, "proj_size", 0):
        raise ConfigurationError(
            f"`layer={name!r}` is an LSTM with projections, which cannot be repaired.",
            "name another layer.",
        )
    directions = ("", "_reverse") if module.bidirectional else ("",)
    layers = range(module.num_layers)
    ends = [
        f"{kind}_l{layer}{side}" for layer in layers for side in directions for kind in ("ih", "hh")
    ]
    return Gates(module, {end: GateLinear(module, end) for end in ends})


@contextmanager
def unroll(gates: Sequence[Gates]) -> Iterator[None]:
    """Replaces the forward of recurrent layers inside the context: they call their Linears step by
    step.
    """
    with ExitStack() as stack:
        for one in gates:
            stack.enter_context(patched_forward(one.module, _Unrolled(one)))
        yield


@contextmanager
def patched_forward(
    module: nn.Module, forward: Callable[..., Any], *, hooks: bool = True
) -> Iterator[None]:
    """Replaces a module's `forward` inside the context. `hooks=False` also disables the module's
    hooks.

    With `hooks=True` an empty hook is added. Modules such as `TransformerEncoderLayer` have a fused
    path that would not call the new `forward` of their parts; they do not take this path if one of
    their parts has a hook.
    """
    held = module.__dict__
    new: dict[str, Any] = {"forward": forward, "_compiled_call_impl": None}
    if hooks:
        new["_forward_hooks"] = OrderedDict(held["_forward_hooks"])
        new["_forward_hooks"][-1] = lambda module, args, output: None
    else:
        new["_forward_hooks"], new["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
    before = {name: held[name] for name in new if name in held}
    held.update(new)
    try:
        yield
    finally:
        for name in new:
            held.pop(name, None)
        held.update(before)


@dataclass(frozen=True)
class _Unrolled:
    gates: Gates

    def __call__(self, input: Any, hx: Any = None) -> tuple[Tensor, Any]:
        module = self.gates.module
        if not isinstance(input, Tensor):
            raise ConfigurationError(
                f"`layer`: a {type(module).__name__} that gets packed sequences cannot be repaired.",
                "give the layer padded sequences, or name another layer.",
            )
        unbatched, is_lstm = input.dim() == 2, isinstance(module, nn.LSTM)
        x = (
            input.unsqueeze(0)
            if unbatched
            else input
            if module.batch_first
            else input.transpose(0, 1)
        )
        states = None if hx is None else hx if is_lstm else (hx,)
        if states is not None and unbatched:
            states = tuple(state.unsqueeze(1) for state in states)
        directions, last = 2 if module.bidirectional else 1, []
        for layer in range(module.num_layers):
            sides = []
            for side in range(directions):
                number = layer * directions + side
                start = None if states is None else tuple(state[number] for state in states)
                outputs, ended = self._run(
                    f"l{layer}{'_reverse' * side}", x, start, reverse=bool(side)
                )
                sides.append(outputs)
                last.append(ended)
            x = sides[0] if directions == 1 else torch.cat(sides, -1)
        final = tuple(torch.stack(kind) for kind in zip(*last, strict=True))
        if unbatched:
            x, final = x.squeeze(0), tuple(state.squeeze(1) for state in final)
        elif not module.batch_first:
            x = x.transpose(0, 1)
        return x, final if is_lstm else final[0]

    def _run(
        self, end: str, x: Tensor, start: tuple[Tensor, ...] | None, *, reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs a layer in one direction; returns outputs, `n x steps x units`, and final states, `n
        x units`.
        """
        module = self.gates.module
        inner, hidden = self.gates.linears[f"ih_{end}"], self.gates.linears[f"hh_{end}"]
        steps = inner(x).unbind(1)
        if start is None:
            zero = steps[0].new_zeros(steps[0].shape[0], module.hidden_size)
            start = (zero, zero) if isinstance(module, nn.LSTM) else (zero,)
        state, outputs = start, []
        for step in reversed(steps) if reverse else steps:
            state = _step(module, step, hidden(state[0]), state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if reverse else outputs, 1), state


def _step(
    module: Recurrent, of_input: Tensor, of_hidden: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if isinstance(module, nn.LSTM):
        i, f, g, o = (of_input + of_hidden).chunk(4, 1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell
    if isinstance(module, nn.GRU):
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, 1), of_hidden.chunk(3, 1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        return ((1 - z) * torch.tanh(n + r * hn) + z * state[0],)
    act = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return (act(of_input + of_hidden),)
