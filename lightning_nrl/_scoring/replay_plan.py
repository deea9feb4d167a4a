"""How passes of one shape are resumed at the first repaired layer: what of them is kept, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._model.layers import LayerRef
from lightning_nrl._scoring.candidate_tensor import CandidateTensor
from lightning_nrl._scoring.editable_model import EditableModel, Inputs, LayerEdit, edit_outputs
from lightning_nrl._scoring.forward_trace import ForwardTrace, with_cached_outputs
from lightning_nrl._scoring.sample_layout import SampleLayout

__all__ = ["LeafSpec", "ReplayPlan", "flatten_trace"]


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the tree that a resumed pass needs: a tensor of all samples, or a constant."""

    layout: SampleLayout | None  # where its samples are; None for a constant
    live: bool  # whether its values matter; else only its shape does
    value: Any  # the constant, or one sample of a tensor of samples
    repeats: bool = True  # whether each copy needs it; the first site's input and output are not

    @property
    def stored(self) -> bool:
        """Whether the values of all samples are kept."""
        return self.layout is not None and self.live

    def matches(self, x: Any, n: int) -> bool:
        """Whether `x` may be this leaf in a pass of `n` samples."""
        if not isinstance(self.value, Tensor) or not isinstance(x, Tensor):
            return type(x) is type(self.value) and (not isinstance(x, (int, float, str, bool)) or x == self.value)
        if x.dtype != self.value.dtype:
            return False
        if self.layout is None:
            return x.shape == self.value.shape and (x.is_meta or torch.equal(x, self.value))
        return self.layout.matches(x.shape, self.value.shape, n)

    def rebuild(
        self, stored: Iterator[Tensor], n: int, copies: int, device: torch.device, *, read_only: bool = False
    ) -> Any:
        """The leaf in a pass of `copies * n` samples; one that is stored is the next of `stored`.

        It may be changed in place unless it is `read_only`: then it may be the stored one itself.
        """
        if self.layout is None:
            return self.value.clone() if isinstance(self.value, Tensor) else self.value
        if not self.repeats:
            return next(stored).to(device)
        if copies == 1:
            if not self.live:
                return self.layout.expand(self.value, n).clone()
            return next(stored).to(device, copy=not read_only)
        base = next(stored).to(device) if self.live else self.layout.expand(self.value, n)
        return CandidateTensor.repeated(base, copies) if self.layout.dim == 0 else self.layout.expand(base, copies)


@dataclass(frozen=True)
class ReplayPlan:
    """How passes of one shape are resumed."""

    calls: tuple[str, ...]  # the frontier, see ForwardTrace
    modules: Mapping[str, nn.Module]  # its modules by name
    first: LayerRef  # the site that is called first
    dims: Mapping[str, int]  # for each site the dimension of its output that counts samples
    spec: pytree.TreeSpec  # of the tree (inputs, outputs of the frontier, input and output of the first site)
    leaves: tuple[LeafSpec, ...]  # what that tree holds
    is_last_layer: bool = False  # whether the first site's output is what the model returns: nothing has to be run

    @classmethod
    def of_last_layer(cls, site: LayerRef, x: Tensor, y: Tensor) -> ReplayPlan:
        """The plan where the layer's output is what the model returns: nothing but its input and output is kept."""
        leaves = [LeafSpec(SampleLayout(0), True, t[:1].clone(), repeats=False) for t in (x, y)]
        spec = pytree.tree_structure((((), {}), [], (x, y)))
        return cls((), {}, site, {site.name: 0}, spec, tuple(leaves), is_last_layer=True)

    def is_like(self, other: ReplayPlan) -> bool:
        """Whether samples of another plan of a last layer can be kept with those of this one."""
        return (
            self.is_last_layer
            and self.spec == other.spec
            and all(
                a.value.shape == b.value.shape and a.value.dtype == b.value.dtype
                for a, b in zip(self.leaves, other.leaves, strict=True)
            )
        )

    @property
    def live_calls(self) -> frozenset[str]:
        """Modules whose outputs are to be kept when a pass is traced."""
        numbered = pytree.tree_unflatten(list(range(len(self.leaves))), self.spec)
        pairs = zip(self.calls, numbered[1], strict=True)
        return frozenset(name for name, tree in pairs if any(self.leaves[i].live for i in pytree.tree_leaves(tree)))

    @property
    def layouts(self) -> list[SampleLayout]:
        """Where the samples are in each stored tensor."""
        return [leaf.layout for leaf in self.leaves if leaf.stored and leaf.layout is not None]

    @cached_property
    def _of_first(self) -> frozenset[int]:
        """Leaves of the first site's input and output, which nothing changes in place."""
        return frozenset(pytree.tree_leaves(pytree.tree_unflatten(list(range(len(self.leaves))), self.spec)[-1]))

    def match(self, trace: ForwardTrace, inputs: Inputs, n: int) -> list[Tensor] | None:
        """The tensors to be stored of a traced pass of `n` samples, or None if it has another shape."""
        if tuple(trace.calls) != self.calls or trace.layer_order[0] != self.first.name:
            return None
        leaves, spec = flatten_trace(inputs, trace)
        if spec != self.spec or not all(leaf.matches(x, n) for leaf, x in zip(self.leaves, leaves, strict=True)):
            return None
        return [x for leaf, x in zip(self.leaves, leaves, strict=True) if leaf.stored]

    def resume(
        self, model: EditableModel, stored: Sequence[Tensor], n: int, edit: LayerEdit, copies: int = 1
    ) -> Tensor:
        """Runs what comes after the first site: logits of `copies * n` samples, copy by copy.

        `edit` is called at every site with samples in the first dimension: at the first one with the recorded input and
        output of `n` samples, of which it returns `copies`, at later ones with those of `copies * n`.
        """
        if self.is_last_layer:
            x, y = (t.to(model.space.device) for t in stored[-2:])
            return _copy_if_recorded(edit(self.first, x, y), y)
        source = iter(stored)
        leaves = [
            leaf.rebuild(source, n, copies, model.space.device, read_only=i in self._of_first)
            for i, leaf in enumerate(self.leaves)
        ]
        inputs, outputs, (x, y) = pytree.tree_unflatten(leaves, self.spec)

        def samples_first(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            dim = self.dims[site.name]
            if dim == 0:
                return edit(site, x, y)
            return edit(site, x.movedim(dim, 0), y.movedim(dim, 0)).movedim(0, dim)

        def first_output() -> Tensor:
            return _copy_if_recorded(samples_first(self.first, x, y), y)

        later = [site for site in model.space.sites if site is not self.first]
        with (
            edit_outputs(later, samples_first),
            with_cached_outputs(self.calls, self.modules, outputs, self.first.module, first_output),
        ):
            return model.forward(inputs)


def flatten_trace(inputs: Inputs, trace: ForwardTrace) -> tuple[list[Any], pytree.TreeSpec]:
    """The tree `(inputs, outputs of the frontier, input and output of the first site)` of a traced pass."""
    args, kwargs = inputs
    return pytree.tree_flatten(((tuple(args), dict(kwargs)), list(trace.outputs), (trace.input, trace.output)))


def _copy_if_recorded(new: Tensor, recorded: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is the recorded one, which what comes after might change in place."""
    return new.clone() if new is recorded or (type(new) is Tensor and new.data_ptr() == recorded.data_ptr()) else new
