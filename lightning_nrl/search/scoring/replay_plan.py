"""`ReplayPlan`: resumes passes with the same structure at the first repaired layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._utils.device import is_out_of_memory, may_use_tf32
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation.layers import LayerRef
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor
from lightning_nrl.search.scoring.sample_layout import SampleLayout, index_batch, infer_layout
from lightning_nrl.search.scoring.sparse_delta import edit_layers, make_layer_deltas, output_under
from lightning_nrl.search.scoring.traced_model import (
    EditableModel,
    ForwardTrace,
    Inputs,
    LayerEdit,
    edit_outputs,
    is_packed,
    with_cached_outputs,
)


@dataclass(frozen=True)
class LeafSpec:
    """Leaf of the tree of inputs and outputs that a resumed pass needs: a tensor of all samples, or
    a constant.
    """

    layout: SampleLayout | None  # None for a constant
    live: bool  # False if the logits depend only on the shape of the tensor
    value: Any  # the constant, or one sample of the tensor
    repeats: bool = True  # False for the first site's input and output, which all copies share

    @property
    def stored(self) -> bool:
        return self.layout is not None and self.live

    def matches(self, x: Any, n: int) -> bool:
        if not isinstance(self.value, Tensor) or not isinstance(x, Tensor):
            return type(x) is type(self.value) and (
                not isinstance(x, (int, float, str, bool)) or x == self.value
            )
        if x.dtype != self.value.dtype:
            return False
        if self.layout is None:
            return x.shape == self.value.shape and (x.is_meta or torch.equal(x, self.value))
        return self.layout.matches(x.shape, self.value.shape, n)

    def rebuild(self, stored: Iterator[Tensor], n: int, copies: int, device: torch.device) -> Any:
        """Returns the leaf for `copies * n` samples. A leaf whose values are stored takes the next
        tensor of `stored`.

        The model may change the leaf in place, unless it is the first site's input or output.
        """
        if self.layout is None:
            return self.value.clone() if isinstance(self.value, Tensor) else self.value
        if not self.repeats:
            return next(stored).to(device)
        if copies == 1:
            if not self.live:
                return self.layout.expand(self.value, n).clone()
            return next(stored).to(device, copy=True)
        base = next(stored).to(device) if self.live else self.layout.expand(self.value, n)
        return (
            CandidateTensor.repeated(base, copies)
            if self.layout.dim == 0
            else self.layout.expand(base, copies)
        )


@dataclass(frozen=True)
class ReplayPlan:
    """Plan to resume passes with the same structure. `traced_model` explains the frontier."""

    calls: tuple[str, ...]  # calls of the frontier, as in `ForwardTrace`
    modules: Mapping[str, nn.Module]  # modules of the frontier by name
    first: LayerRef  # the repaired layer (site) that is called first
    dims: Mapping[str, int]  # sample dimension of each site's output
    spec: (
        pytree.TreeSpec
    )  # structure of the tree (inputs, outputs of the frontier, input and output of the first site)
    leaves: tuple[LeafSpec, ...]  # leaves of that tree
    is_last_layer: bool = False  # True if the model returns the first site's output unchanged

    @classmethod
    def of_last_layer(cls, site: LayerRef, x: Tensor, y: Tensor) -> ReplayPlan:
        leaves = [LeafSpec(SampleLayout(0), True, t[:1].clone(), repeats=False) for t in (x, y)]
        spec = pytree.tree_structure((((), {}), [], (x, y)))
        return cls((), {}, site, {site.name: 0}, spec, tuple(leaves), is_last_layer=True)

    def is_like(self, other: ReplayPlan) -> bool:
        """True if both plans are for a last layer whose input and output have equal dtypes and
        shapes per sample.
        """
        if not self.is_last_layer or self.spec != other.spec:
            return False
        return all(a.matches(b.value, 1) for a, b in zip(self.leaves, other.leaves, strict=True))

    @property
    def live_calls(self) -> frozenset[str]:
        _, outputs, _ = pytree.tree_unflatten(list(self.leaves), self.spec)
        pairs = zip(self.calls, outputs, strict=True)
        return frozenset(
            name for name, tree in pairs if any(leaf.live for leaf in pytree.tree_leaves(tree))
        )

    @property
    def layouts(self) -> list[SampleLayout]:
        return [leaf.layout for leaf in self.leaves if leaf.stored and leaf.layout is not None]

    def match(self, trace: ForwardTrace, inputs: Inputs, n: int) -> list[Tensor] | None:
        if tuple(trace.calls) != self.calls or trace.layer_order[0] != self.first.name:
            return None
        leaves, spec = flatten_trace(inputs, trace)
        if spec != self.spec or not all(
            leaf.matches(x, n) for leaf, x in zip(self.leaves, leaves, strict=True)
        ):
            return None
        return [x for leaf, x in zip(self.leaves, leaves, strict=True) if leaf.stored]

    def resume(
        self,
        model: EditableModel,
        stored: Sequence[Tensor],
        n: int,
        edit: LayerEdit,
        copies: int = 1,
    ) -> Tensor:
        """Resumes the passes of `n` samples from their `stored` tensors, as
        `ActivationCache.replay` explains.
        """
        if self.is_last_layer:
            x, y = (t.to(model.space.device) for t in stored[-2:])
            return _copy_if_recorded(edit(self.first, x, y), y)
        source = iter(stored)
        leaves = [leaf.rebuild(source, n, copies, model.space.device) for leaf in self.leaves]
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
    """Flattens the tree `(inputs, outputs of the frontier, input and output of the first site)` of
    a traced pass.
    """
    args, kwargs = inputs
    return pytree.tree_flatten(
        ((tuple(args), dict(kwargs)), list(trace.outputs), (trace.input, trace.output))
    )


def _copy_if_recorded(new: Tensor, recorded: Tensor) -> Tensor:
    """Copies `new` if it is the recorded tensor, since later code may change it in place."""
    return (
        new.clone()
        if new is recorded or (type(new) is Tensor and new.data_ptr() == recorded.data_ptr())
        else new
    )


def find_replay_plan(model: EditableModel, inputs: Inputs, n: int) -> ReplayPlan | str:
    """Returns a plan for passes with the structure of this batch of `n` samples, or the reason why
    none is possible.

    The plan has been tested: under changed weights, a resumed pass gives the same logits as the
    whole model.
    """
    small = max(2, min(n, 6))
    few, more = (index_batch(inputs, torch.arange(size) % n, n) for size in (small, small + 1))
    (trace, _), (other, _) = model.trace(few), model.trace(more)
    first_name = trace.layer_order[0]
    if trace.layer_order.count(first_name) > 1:
        return f"layer {first_name!r} is called {trace.layer_order.count(first_name)} times in one pass"
    if trace.calls != other.calls or trace.layer_order != other.layer_order:
        return "the order in which modules are called depends on the data"
    if is_packed(trace.outputs):
        return "a module returns a packed sequence"
    leaves, spec = flatten_trace(few, trace)
    others, other_spec = flatten_trace(more, other)
    if spec != other_spec:
        return "the structure of what modules return depends on the data"
    try:
        layouts = [_layout(a, b, small) for a, b in zip(leaves, others, strict=True)]
        of_calls = [
            infer_layout(a, b, small, small + 1)
            for a, b in zip(trace.layer_shapes, other.layer_shapes, strict=True)
        ]
    except ValueError as error:
        return f"no dimension of a module's output stands for the samples: {error}"
    called = [
        (name, layout.dim)
        for name, layout in zip(trace.layer_order, of_calls, strict=True)
        if layout
    ]
    if len(called) < len(of_calls) or layouts[-2] is None:
        return "the size of a layer's input or output does not depend on the number of samples"
    dims = dict(called)
    if len(set(called)) > len(dims):
        return "calls of a layer have the samples in different dimensions"
    first = model.sites[first_name]
    modules = {name: model.model.get_submodule(name) for name in trace.calls}
    alive = _liveness(model, trace, few)
    problem = ""
    for live in (alive, [True] * len(leaves)):
        made = [_leaf(*parts) for parts in zip(leaves, layouts, live, strict=True)]
        made[-2:] = (replace(leaf, live=True, repeats=False) for leaf in made[-2:])
        plan = ReplayPlan(tuple(trace.calls), modules, first, dims, spec, tuple(made))
        stored = [x for leaf, x in zip(plan.leaves, leaves, strict=True) if leaf.stored]
        try:
            problem = _check(model, plan, stored, few, small)
        except (RuntimeError, ValueError, IndexError, TypeError, ReplayError) as error:
            if is_out_of_memory(error):
                raise
            problem = f"resuming a pass failed: {error}".splitlines()[0]
        if not problem:
            return replace(plan, is_last_layer=_is_last_layer(model, plan, stored, small))
    return problem


def same_values(a: Tensor, b: Tensor, precision: torch.dtype | None = None) -> bool:
    """True if two tensors are equal up to rounding errors in `precision`, by default in their
    dtype.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    are_equal = torch.equal(a, b)
    if are_equal or not b.is_floating_point():
        return are_equal
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(precision or b.dtype, 5e-2)
    if b.is_cuda and tolerance == 1e-4 and may_use_tf32():
        tolerance = 1e-2
    finite = b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-6), equal_nan=True)


def _check(
    model: EditableModel, plan: ReplayPlan, stored: list[Tensor], inputs: Inputs, n: int
) -> str:
    """Compares resumed passes with the whole model, with all or a few weights changed; returns the
    problem, or "".
    """
    flat = model.space.flat()
    changed = perturbed(flat)
    whole = model.space.changed(torch.arange(len(flat), device=flat.device), changed)

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        if site is not plan.first:
            x, y = x[len(x) // 2 :], y[: len(y) // 2]
        return torch.cat([y, output_under(whole, site, x)])

    where = (
        torch.linspace(0, len(flat) - 1, min(8, len(flat)), dtype=torch.float64)
        .long()
        .unique()
        .to(flat.device)
    )
    values = torch.stack([flat, changed])[:, where]
    sparse = edit_layers(make_layer_deltas(model.space, where), values)
    unchanged, few = (model.space.changed(where, v) for v in values)
    for some_edit, weights in ((edit, ({}, whole)), (sparse, (unchanged, few))):
        resumed = plan.resume(model, stored, n, some_edit, copies=2)
        precision = min((stored[-1].dtype, resumed.dtype), key=lambda t: torch.finfo(t).bits)
        halves = (resumed.dense() if isinstance(resumed, CandidateTensor) else resumed).chunk(2)
        for half, parameters in zip(halves, weights, strict=True):
            if not same_values(half, model.logits(inputs, parameters), precision):
                return "resuming a pass after the layer gives other outputs than the whole model"
    return ""


def perturbed(flat: Tensor) -> Tensor:
    """Adds noise of about the size of the weights."""
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
    return flat + noise * flat.std(correction=0).clamp_min(1e-3)


def _is_last_layer(model: EditableModel, plan: ReplayPlan, stored: list[Tensor], n: int) -> bool:
    given: list[Tensor] = []

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        given.append(y.clone())
        return given[-1]

    logits = plan.resume(model, stored, n, edit)
    return len(given) == 1 and logits is given[0]


def _liveness(model: EditableModel, trace: ForwardTrace, inputs: Inputs) -> list[bool]:
    """Returns True for each leaf that affects the logits other than through the first site.
    Gradients decide this.
    """
    leaves, spec = flatten_trace(inputs, trace)
    floats = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = [
                x.detach().clone().requires_grad_()
                for x, f in zip(leaves, floats, strict=True)
                if f
            ]
            source = iter(wanted)
            given = [next(source).clone() if f else x for x, f in zip(leaves, floats, strict=True)]
            inputs, outputs, (_, y) = pytree.tree_unflatten(given, spec)
            y = y.detach()
            first = model.sites[trace.layer_order[0]].module
            modules = dict(model.model.named_modules())
            with with_cached_outputs(trace.calls, modules, outputs, first, lambda: y):
                logits = model.forward(inputs)
            found: Iterator[Tensor | None] = iter([None] * len(wanted))
            if logits.requires_grad:
                found = iter(torch.autograd.grad(logits.sum(), wanted, allow_unused=True))
    except (RuntimeError, ReplayError) as error:
        if is_out_of_memory(error):
            raise
        return [True] * len(leaves)
    return [next(found) is not None if f else True for f in floats]


def _leaf(x: Any, layout: SampleLayout | None, live: bool) -> LeafSpec:
    if layout is None:
        return LeafSpec(None, True, x)
    return LeafSpec(layout, live, layout.take(x, slice(0, 1)).clone())


def _layout(a: Any, b: Any, small: int) -> SampleLayout | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    return infer_layout(a.shape, b.shape, small, small + 1)
