"""Passes of one shape: what of them is kept, and how they are resumed at the first repaired layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.channelwise import Varied
from lightning_nrl._scoring.sample_layout import Layout
from lightning_nrl._scoring.tracing import Moment, editing, remembering, watching
from lightning_nrl._utils.precision import Context
from lightning_nrl._utils.state import holding
from lightning_nrl.errors import ReplayError, explain
from lightning_nrl.tasks import Task

__all__ = ["Inputs", "LayerEdit", "Leaf", "Plan", "Subject", "flatten"]

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a model is called with: positional and keyword arguments."""
LayerEdit = Callable[[LayerRef, Tensor, Tensor], Tensor]
"""Takes a site, the layer's input and its output, and gives the output to go on with."""


@dataclass(frozen=True)
class Subject:
    """The model under repair, as it is deployed.

    Attributes:
        model: the model in evaluation mode.
        space: its repaired layers.
        task: finds the logits in what it returns.
        context: entered around every forward pass, such as autocast.
    """

    model: nn.Module
    space: ParameterSpace
    task: Task
    context: Context

    @property
    def sites(self) -> dict[str, LayerRef]:
        return {site.name: site for site in self.space.sites}

    def watch(self, inputs: Inputs, keep: Callable[[str], bool] = lambda name: True) -> tuple[Moment, Tensor]:
        """One ordinary pass: its moment at the first site, and the logits."""
        with watching(self.model, {s.name: s.module for s in self.space.sites}, keep) as moment, self.context():
            args, kwargs = _own(inputs)
            output = self.model(*args, **kwargs)
        for name in self.sites:
            if name not in moment.order:
                raise ReplayError(
                    explain(
                        f"`layer={name!r}` is never called in the model's forward pass, so it has no input to measure.",
                        "name a layer that is called as a module; parts of fused modules, such as "
                        "`MultiheadAttention.out_proj`, are not.",
                    )
                )
        return moment, self.task.logits(output)

    def whole(self, inputs: Inputs, parameters: Mapping[str, Tensor]) -> Tensor:
        """The logits of the whole model with some parameters replaced."""
        args, kwargs = _own(inputs)
        with holding(self.model, parameters), self.context():
            return self.task.logits(self.model(*args, **kwargs))

    def edited(self, inputs: Inputs, edit: LayerEdit) -> Tensor:
        """The logits of the whole model with every site's output edited."""
        args, kwargs = _own(inputs)
        with _editing_all(self.space.sites, edit), self.context():
            return self.task.logits(self.model(*args, **kwargs))


@dataclass(frozen=True)
class Leaf:
    """One thing that a resumed pass needs: a tensor of all samples, or a constant.

    Attributes:
        layout: where its samples are; None for a constant.
        live: whether its values matter; else only its shape does.
        value: the constant; of a tensor of samples, one sample.
        repeats: whether it is needed once a copy; the first site's input and output are not.
    """

    layout: Layout | None
    live: bool
    value: Any
    repeats: bool = True

    @property
    def stored(self) -> bool:
        return self.layout is not None and self.live

    def fits(self, x: Any, n: int) -> bool:
        """Whether `x` may be this leaf in a pass of `n` samples."""
        if not isinstance(self.value, Tensor) or not isinstance(x, Tensor):
            return type(x) is type(self.value) and (not isinstance(x, (int, float, str, bool)) or x == self.value)
        if x.dtype != self.value.dtype:
            return False
        if self.layout is None:
            return x.shape == self.value.shape and (x.is_meta or torch.equal(x, self.value))
        return self.layout.matches(x.shape, self.value.shape, n)


@dataclass(frozen=True)
class Plan:
    """How passes of one shape are resumed.

    Attributes:
        calls: the frontier, see `Moment`.
        modules: its modules by name.
        first: the site that is called first.
        dims: for each site the dimension of its output that counts samples.
        spec: the shape of the tree `(inputs, outputs of the frontier, input and output of the first site)`.
        leaves: what that tree holds.
        direct: whether the first site's output is what the model returns, so that nothing has to be run.
    """

    calls: tuple[str, ...]
    modules: Mapping[str, nn.Module]
    first: LayerRef
    dims: Mapping[str, int]
    spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    direct: bool = False

    @property
    def live_calls(self) -> frozenset[str]:
        """Modules whose outputs are to be kept when a pass is watched."""
        numbered = pytree.tree_unflatten(list(range(len(self.leaves))), self.spec)
        pairs = zip(self.calls, numbered[1], strict=True)
        return frozenset(name for name, tree in pairs if any(self.leaves[i].live for i in pytree.tree_leaves(tree)))

    def accepts(self, moment: Moment, inputs: Inputs, n: int) -> list[Any] | None:
        """The stored tensors of a watched pass of `n` samples, or None if it has another shape."""
        if tuple(moment.calls) != self.calls or moment.order[0] != self.first.name:
            return None
        leaves, spec = flatten(inputs, moment)
        if spec != self.spec or not all(leaf.fits(x, n) for leaf, x in zip(self.leaves, leaves, strict=True)):
            return None
        return [x for leaf, x in zip(self.leaves, leaves, strict=True) if leaf.stored]

    def layouts(self) -> list[Layout]:
        """Where the samples are in each stored tensor."""
        return [leaf.layout for leaf in self.leaves if leaf.stored and leaf.layout is not None]

    def resume(self, subject: Subject, stored: Sequence[Tensor], n: int, edit: LayerEdit, copies: int = 1) -> Tensor:
        """Runs what comes after the first site.

        Args:
            subject: the model.
            stored: the stored tensors of `n` samples.
            n: samples.
            edit: called at every site with samples in the first dimension; at the first site with the remembered input
                and output of `n` samples, at later ones with those of `copies * n`.
            copies: how many times `n` samples the first edit returns.

        Returns:
            Logits of `copies * n` samples, copy by copy.
        """
        if self.direct:
            x, y = (t.to(subject.space.device) for t in stored[-2:])
            return _own_memory(edit(self.first, x, y), y)
        source = iter(stored)
        made = [self._made(leaf, source, n, copies, subject.space.device) for leaf in self.leaves]
        (args, kwargs), outputs, (x, y) = pytree.tree_unflatten(made, self.spec)

        def samples_first(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            dim = self.dims[site.name]
            if dim == 0:
                return edit(site, x, y)
            return edit(site, x.movedim(dim, 0), y.movedim(dim, 0)).movedim(0, dim)

        def result() -> Tensor:
            return _own_memory(samples_first(self.first, x, y), y)

        later = [site for site in subject.space.sites if site is not self.first]
        first = self.first.module
        with (
            _editing_all(later, samples_first),
            remembering(self.calls, self.modules, outputs, first, result),
            subject.context(),
        ):
            return subject.task.logits(subject.model(*args, **kwargs))

    def _made(self, leaf: Leaf, source: Any, n: int, copies: int, device: torch.device) -> Any:
        if leaf.layout is None:
            return leaf.value.clone() if isinstance(leaf.value, Tensor) else leaf.value
        if not leaf.repeats:
            return next(source).to(device)
        if copies == 1:
            return next(source).to(device, copy=True) if leaf.live else leaf.layout.widened(leaf.value, n).clone()
        base = next(source).to(device) if leaf.live else leaf.layout.widened(leaf.value, n)
        return Varied.repeated(base, copies) if leaf.layout.dim == 0 else leaf.layout.widened(base, copies)


def flatten(inputs: Inputs, moment: Moment) -> tuple[list[Any], pytree.TreeSpec]:
    """The tree `(inputs, outputs of the frontier, input and output of the first site)` of a watched pass."""
    args, kwargs = inputs
    return pytree.tree_flatten(((tuple(args), dict(kwargs)), list(moment.outputs), (moment.x, moment.y)))


def _own_memory(new: Tensor, recorded: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is the recorded one, which what comes after might change in place."""
    return new.clone() if new is recorded or (type(new) is Tensor and new.data_ptr() == recorded.data_ptr()) else new


def _own(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in memory of their own, since a model may change what it is given."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(inputs[0]), dict(inputs[1])))
    return args, kwargs


@contextmanager
def _editing_all(sites: Sequence[LayerRef], edit: LayerEdit) -> Iterator[None]:
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(editing(site.module, partial(edit, site)))
        yield
