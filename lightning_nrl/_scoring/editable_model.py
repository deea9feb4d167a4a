"""The model under repair: its passes traced, run with other parameters, or with the outputs of its layers edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._model.recurrent import opened
from lightning_nrl._scoring.forward_trace import ForwardTrace, edit_output, trace_forward
from lightning_nrl._utils.state import holding
from lightning_nrl.data.batch import run_model
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation.evaluator import Evaluator

__all__ = ["EditableModel", "Inputs", "LayerEdit", "edit_outputs"]

Inputs = tuple[tuple[object, ...], Mapping[str, object]]
"""What a model is called with: positional and keyword arguments."""
LayerEdit = Callable[[LayerRef, Tensor, Tensor], Tensor]
"""Takes a site, the layer's input and its output, and gives the output to go on with."""


@runtime_checkable
class _Clonable(Protocol):
    def clone(self) -> Any: ...


@dataclass(frozen=True)
class EditableModel:
    """The model under repair, as it is deployed."""

    evaluator: Evaluator  # the model in evaluation mode, and what judges it
    space: ParameterSpace  # its repaired layers

    @property
    def model(self) -> nn.Module:
        """The module itself."""
        return self.evaluator.model

    @property
    def sites(self) -> dict[str, LayerRef]:
        """The repaired layers by name."""
        return {site.name: site for site in self.space.sites}

    def trace(self, inputs: Inputs, keep: Callable[[str], bool] = lambda name: True) -> tuple[ForwardTrace, Tensor]:
        """One ordinary pass: what was done when it first called a site, and the logits.

        A site that is never called is a `ReplayError`.
        """
        modules = {site.name: site.module for site in self.space.sites}
        recurrent = opened(self.space.gates)
        with recurrent, trace_forward(self.model, modules, keep) as trace, self.evaluator.context():
            args, kwargs = _cloned(inputs)
            output = run_model(self.model, args, kwargs)
        for name in self.sites:
            if name not in trace.layer_order:
                raise ReplayError(
                    f"`layer={name!r}` is never called in the model's forward pass, so it has no input to measure.",
                    "name a layer that is called as a module; parts of fused modules, such as "
                    "`MultiheadAttention.out_proj`, are not.",
                )
        return trace, self.evaluator.task.logits(output)

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of a pass, which may change its inputs."""
        args, kwargs = inputs
        with opened(self.space.gates), self.evaluator.context():
            return self.evaluator.task.logits(run_model(self.model, args, kwargs))

    def logits(self, inputs: Inputs, parameters: Mapping[str, Tensor]) -> Tensor:
        """The logits of the whole model with some parameters replaced."""
        with holding(self.model, parameters):
            return self.forward(_cloned(inputs))

    def edited_logits(self, inputs: Inputs, edit: LayerEdit) -> Tensor:
        """The logits of the whole model with every site's output edited."""
        with edit_outputs(self.space.sites, edit):
            return self.forward(_cloned(inputs))


@contextmanager
def edit_outputs(sites: Sequence[LayerRef], edit: LayerEdit) -> Iterator[None]:
    """Inside, the output of each site goes through `edit(site, input, output)`."""
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(edit_output(site.module, partial(edit, site)))
        yield


def _cloned(inputs: Inputs) -> Inputs:
    """The inputs in memory of their own, since a model may change what it is given; of graphs too."""
    args, kwargs = pytree.tree_map_only((Tensor, _Clonable), lambda x: x.clone(), (tuple(inputs[0]), dict(inputs[1])))
    return args, kwargs
