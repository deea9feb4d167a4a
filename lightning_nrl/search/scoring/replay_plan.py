"""Plans of passes with the same structure: what is stored of a pass, and how it runs again.

A `ReplayPlan` resumes passes at the first repaired layer, and a `WholePlan` runs the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._utils.device import is_out_of_memory, may_use_tf32
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation.layers import LayerRef
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor, as_dense
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


class NotReplayableError(Exception):
    """No plan can resume the passes of a batch; the message says why."""


@dataclass(frozen=True)
class LeafSpec:
    """Leaf of the tree of inputs and outputs that a pass needs."""

    layout: SampleLayout | None  # where a tensor has its samples; None for a constant
    live: bool  # False if the logits depend only on the shape of the tensor
    value: object  # the constant, or one sample of the tensor
    repeats: bool = True  # False for the first site's input and output, which all copies share

    @classmethod
    def of(cls, value: object, layout: SampleLayout | None, live: bool = True) -> LeafSpec:
        if layout is None or not isinstance(value, Tensor):
            return cls(None, True, value)
        return cls(layout, live, layout.take(value, slice(0, 1)).clone())

    @property
    def stored(self) -> bool:
        return self.layout is not None and self.live

    def matches(self, x: object, n: int) -> bool:
        if not isinstance(self.value, Tensor) or not isinstance(x, Tensor):
            is_plain = isinstance(x, (int, float, str, bool))
            return type(x) is type(self.value) and (not is_plain or x == self.value)
        if x.dtype != self.value.dtype:
            return False
        if self.layout is None:
            return x.shape == self.value.shape and (x.is_meta or torch.equal(x, self.value))
        return self.layout.matches(x.shape, self.value.shape, n)

    def rebuild(
        self, stored: Iterator[Tensor], n: int, copies: int, device: torch.device
    ) -> object:
        """Returns the leaf for `copies * n` samples; a stored leaf takes the next of `stored`.

        The model may change the leaf in place, unless it is the first site's input or output.
        """
        if not isinstance(self.value, Tensor):
            return self.value
        if self.layout is None:
            return self.value.clone()
        if not self.repeats:
            return next(stored).to(device)
        if not self.live:
            samples = self.layout.expand(self.value, n)  # only the shape matters
        elif copies == 1:
            return next(stored).to(device, copy=True)
        else:
            samples = next(stored).to(device)
        if copies == 1:
            return samples.clone()
        if self.layout.dim == 0:
            return CandidateTensor.repeated(samples, copies)
        return self.layout.expand(samples, copies)


@dataclass(frozen=True)
class StoredLeaves:
    """Base class of plans. It stores some leaves of a tree."""

    spec: pytree.TreeSpec  # structure of the tree
    leaves: tuple[LeafSpec, ...]

    @property
    def layouts(self) -> list[SampleLayout]:
        """Layouts of the stored tensors."""
        return [leaf.layout for leaf in self.leaves if leaf.live and leaf.layout is not None]

    def stored_among(self, values: Sequence[object]) -> list[Tensor]:
        leaves = zip(self.leaves, values, strict=True)
        return [value for leaf, value in leaves if leaf.stored and isinstance(value, Tensor)]

    def select(
        self, values: Sequence[object], spec: pytree.TreeSpec, n: int
    ) -> list[Tensor] | None:
        """Returns the leaves of a tree to store; None if the tree has another structure."""
        if spec != self.spec:
            return None
        leaves = zip(self.leaves, values, strict=True)
        if not all(leaf.matches(value, n) for leaf, value in leaves):
            return None
        return self.stored_among(values)

    def rebuilt(
        self, stored: Sequence[Tensor], n: int, copies: int, device: torch.device
    ) -> list[object]:
        source = iter(stored)
        return [leaf.rebuild(source, n, copies, device) for leaf in self.leaves]


@dataclass(frozen=True)
class WholePlan(StoredLeaves):
    """Plan to run the whole model. The tree is that of the model's inputs."""

    @classmethod
    def of(cls, inputs: Inputs, n: int) -> WholePlan:
        values, spec = pytree.tree_flatten(inputs)
        leaves = []
        for value in values:
            has_samples = isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
            leaves.append(LeafSpec.of(value, SampleLayout(0) if has_samples else None))
        return cls(spec, tuple(leaves))

    def record(self, model: EditableModel, inputs: Inputs, n: int) -> list[Tensor] | None:
        """Returns the tensors of a pass to store; None if the pass has another structure."""
        values, spec = pytree.tree_flatten(inputs)
        stored = self.select(values, spec, n)
        if stored is None:
            return None
        # No comparison of logits follows, so constants must be equal, not only alike.
        for leaf, value in zip(self.leaves, values, strict=True):
            is_constant = not isinstance(value, Tensor)
            if is_constant and value is not leaf.value and value != leaf.value:
                return None
        return stored

    def inputs(self, model: EditableModel, stored: Sequence[Tensor], n: int) -> Inputs:
        args, kwargs = pytree.tree_unflatten(
            self.rebuilt(stored, n, 1, model.space.device), self.spec
        )
        return args, kwargs

    def resume(
        self,
        model: EditableModel,
        stored: Sequence[Tensor],
        n: int,
        edit: LayerEdit,
        copies: int = 1,
    ) -> Tensor:
        """Runs the passes of `n` samples from their `stored` tensors.

        `ActivationCache.replay` explains the other arguments.
        """
        with edit_outputs(model.space.sites, edit):
            return model.forward(self.inputs(model, stored, n))


@dataclass(frozen=True)
class ReplayPlan(StoredLeaves):
    """Plan to resume passes at the first repaired layer. `traced_model` explains the frontier.

    The tree holds the model's inputs, the outputs of the frontier, and the input and the output of
    the first repaired layer.
    """

    calls: tuple[str, ...]  # calls of the frontier, as in `ForwardTrace`
    modules: Mapping[str, nn.Module]  # modules of the frontier by name
    first: LayerRef  # the repaired layer (site) that is called first
    dims: Mapping[str, int]  # sample dimension of each site's output
    is_last_layer: bool = False  # True if the model returns the first site's output unchanged

    @classmethod
    def of_last_layer(cls, site: LayerRef, x: Tensor, y: Tensor) -> ReplayPlan:
        values, spec = flatten_last_layer(x, y)
        leaves = [replace(LeafSpec.of(t, SampleLayout(0)), repeats=False) for t in values]
        return cls(spec, tuple(leaves), (), {}, site, {site.name: 0}, is_last_layer=True)

    @property
    def live_calls(self) -> frozenset[str]:
        _, outputs, _ = pytree.tree_unflatten(list(self.leaves), self.spec)
        names = set()
        for name, output in zip(self.calls, outputs, strict=True):
            if any(leaf.live for leaf in pytree.tree_leaves(output)):
                names.add(name)
        return frozenset(names)

    def record(self, model: EditableModel, inputs: Inputs, n: int) -> list[Tensor] | None:
        trace, _ = model.trace(inputs, self.live_calls.__contains__)
        return self.match(trace, inputs, n)

    def match(self, trace: ForwardTrace, inputs: Inputs, n: int) -> list[Tensor] | None:
        """Returns the tensors of a traced pass to store; None if it has another structure."""
        if tuple(trace.calls) != self.calls or trace.layer_order[0] != self.first.name:
            return None
        return self.select(*flatten_trace(inputs, trace), n)

    def resume(
        self,
        model: EditableModel,
        stored: Sequence[Tensor],
        n: int,
        edit: LayerEdit,
        copies: int = 1,
    ) -> Tensor:
        device = model.space.device
        if self.is_last_layer:
            x, y = stored[-2].to(device), stored[-1].to(device)
            return _copy_if_recorded(edit(self.first, x, y), y)
        inputs, outputs, (x, y) = pytree.tree_unflatten(
            self.rebuilt(stored, n, copies, device), self.spec
        )

        def edit_samples_first(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            dim = self.dims[site.name]
            if dim == 0:
                return edit(site, x, y)
            return edit(site, x.movedim(dim, 0), y.movedim(dim, 0)).movedim(0, dim)

        def first_output() -> Tensor:
            return _copy_if_recorded(edit_samples_first(self.first, x, y), y)

        later = [site for site in model.space.sites if site is not self.first]
        with (
            edit_outputs(later, edit_samples_first),
            with_cached_outputs(self.calls, self.modules, outputs, self.first.module, first_output),
        ):
            return model.forward(inputs)


Plan = WholePlan | ReplayPlan


def flatten_trace(inputs: Inputs, trace: ForwardTrace) -> tuple[list[object], pytree.TreeSpec]:
    """Flattens the tree of a `ReplayPlan`."""
    return pytree.tree_flatten((inputs, list(trace.outputs), (trace.input, trace.output)))


def flatten_last_layer(x: Tensor, y: Tensor) -> tuple[list[object], pytree.TreeSpec]:
    """Flattens the tree of a `ReplayPlan` without inputs of the model."""
    return pytree.tree_flatten((((), {}), [], (x, y)))


def _copy_if_recorded(new: Tensor, recorded: Tensor) -> Tensor:
    """Copies `new` if it is the recorded tensor, since later code may change it in place."""
    is_view = type(new) is Tensor and new.data_ptr() == recorded.data_ptr()
    return new.clone() if new is recorded or is_view else new


def find_replay_plan(model: EditableModel, inputs: Inputs, n: int) -> ReplayPlan:
    """Returns a plan for passes with the structure of this batch of `n` samples.

    The plan has been tested: under changed weights, a resumed pass gives the same logits as the
    whole model.

    Raises:
        NotReplayableError: no plan passes the test.
    """
    # What depends on the number of samples shows where a tensor has its samples.
    small = max(2, min(n, 6))
    few = index_batch(inputs, torch.arange(small) % n, n)
    more = index_batch(inputs, torch.arange(small + 1) % n, n)
    trace, _ = model.trace(few)
    trace_of_more, _ = model.trace(more)
    _check_calls(trace, trace_of_more)
    leaves, spec = flatten_trace(few, trace)
    leaves_of_more, spec_of_more = flatten_trace(more, trace_of_more)
    if spec != spec_of_more:
        raise NotReplayableError("the structure of what modules return depends on the data")
    try:
        layouts = [_layout(*pair, small) for pair in zip(leaves, leaves_of_more, strict=True)]
        dims = _sample_dims(trace, trace_of_more, small)
    except ValueError as error:
        raise NotReplayableError(
            f"no dimension of a module's output stands for the samples: {error}"
        ) from error
    if layouts[-2] is None:
        raise NotReplayableError(FIXED_SIZE)
    plan = ReplayPlan(
        spec,
        (),
        tuple(trace.calls),
        {name: model.model.get_submodule(name) for name in trace.calls},
        model.sites[trace.layer_order[0]],
        dims,
    )
    problem = ""
    for live in (_liveness(model, trace, few), [True] * len(leaves)):
        specs = [LeafSpec.of(*parts) for parts in zip(leaves, layouts, live, strict=True)]
        first_site = [replace(leaf, live=True, repeats=False) for leaf in specs[-2:]]
        plan = replace(plan, leaves=(*specs[:-2], *first_site))
        stored = plan.stored_among(leaves)
        problem = _test(model, plan, stored, few, small)
        if not problem:
            return replace(plan, is_last_layer=_is_last_layer(model, plan, stored, small))
    raise NotReplayableError(problem)


FIXED_SIZE = "the size of a layer's input or output does not depend on the number of samples"
OTHER_ORDER = "the order in which modules are called depends on the data"


def _check_calls(trace: ForwardTrace, trace_of_more: ForwardTrace) -> None:
    first = trace.layer_order[0]
    n_calls = trace.layer_order.count(first)
    if n_calls > 1:
        raise NotReplayableError(f"layer {first!r} is called {n_calls} times in one pass")
    if trace.calls != trace_of_more.calls or trace.layer_order != trace_of_more.layer_order:
        raise NotReplayableError(OTHER_ORDER)
    if is_packed(trace.outputs):
        raise NotReplayableError("a module returns a packed sequence")


def _sample_dims(trace: ForwardTrace, trace_of_more: ForwardTrace, small: int) -> dict[str, int]:
    """Returns the sample dimension of each site's output."""
    dims: dict[str, int] = {}
    for name, shape, shape_of_more in zip(
        trace.layer_order, trace.layer_shapes, trace_of_more.layer_shapes, strict=True
    ):
        layout = infer_layout(shape, shape_of_more, small, small + 1)
        if layout is None:
            raise NotReplayableError(FIXED_SIZE)
        if dims.setdefault(name, layout.dim) != layout.dim:
            raise NotReplayableError("calls of a layer have the samples in different dimensions")
    return dims


def same_values(a: Tensor, b: Tensor, precision: torch.dtype | None = None) -> bool:
    """True if two tensors are equal up to rounding in `precision`, by default in their dtype."""
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


def _test(
    model: EditableModel, plan: ReplayPlan, stored: list[Tensor], inputs: Inputs, n: int
) -> str:
    """Compares resumed passes with the whole model; returns the problem, or ""."""
    try:
        agrees = _agrees(model, plan, stored, inputs, n)
    except (RuntimeError, ValueError, IndexError, TypeError, ReplayError) as error:
        if is_out_of_memory(error):
            raise
        return f"resuming a pass failed: {error}".splitlines()[0]
    return (
        "" if agrees else "resuming a pass after the layer gives other outputs than the whole model"
    )


def _agrees(
    model: EditableModel, plan: ReplayPlan, stored: list[Tensor], inputs: Inputs, n: int
) -> bool:
    """True if resumed passes give the whole model's logits, with all or a few weights changed."""
    space, flat = model.space, model.space.flat()
    changed = perturbed(flat)
    all_changed = space.changed(torch.arange(len(flat), device=flat.device), changed)

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        if site is not plan.first:
            x, y = x[len(x) // 2 :], y[: len(y) // 2]
        return torch.cat([y, output_under(all_changed, site, x)])

    spread = torch.linspace(0, len(flat) - 1, min(8, len(flat)), dtype=torch.float64)
    where = spread.long().unique().to(flat.device)
    values = torch.stack([flat, changed])[:, where]
    sparse_edit = edit_layers(make_layer_deltas(space, where), values)
    few_changed = [space.changed(where, candidate) for candidate in values]
    for layer_edit, weights in ((edit, [{}, all_changed]), (sparse_edit, few_changed)):
        resumed = plan.resume(model, stored, n, layer_edit, copies=2)
        precision = min(stored[-1].dtype, resumed.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        for logits, parameters in zip(as_dense(resumed).chunk(2), weights, strict=True):
            if not same_values(logits, model.logits(inputs, parameters), precision):
                return False
    return True


def perturbed(flat: Tensor) -> Tensor:
    """Adds noise of about the size of the weights."""
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
    return flat + noise * flat.std(correction=0).clamp_min(1e-3)


def _is_last_layer(model: EditableModel, plan: ReplayPlan, stored: list[Tensor], n: int) -> bool:
    outputs = []

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        outputs.append(y.clone())
        return outputs[-1]

    logits = plan.resume(model, stored, n, edit)
    return len(outputs) == 1 and logits is outputs[0]


def _liveness(model: EditableModel, trace: ForwardTrace, inputs: Inputs) -> list[bool]:
    """Returns True for each leaf that affects the logits other than through the first site.

    Gradients decide this, so that it is True for everything but floats.
    """
    leaves, spec = flatten_trace(inputs, trace)
    floats = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            floats[i] = leaf.detach().clone().requires_grad_()
    gradients: Sequence[Tensor | None] = [None] * len(floats)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copies = [floats[i].clone() if i in floats else x for i, x in enumerate(leaves)]
            inputs, outputs, (_, y) = pytree.tree_unflatten(copies, spec)
            y = y.detach()
            first = model.sites[trace.layer_order[0]].module
            with with_cached_outputs(
                trace.calls, dict(model.model.named_modules()), outputs, first, lambda: y
            ):
                logits = model.forward(inputs)
            if logits.requires_grad:
                gradients = torch.autograd.grad(
                    logits.sum(), list(floats.values()), allow_unused=True
                )
    except (RuntimeError, ReplayError) as error:
        if is_out_of_memory(error):
            raise
        return [True] * len(leaves)
    dead = {i for i, gradient in zip(floats, gradients, strict=True) if gradient is None}
    return [i not in dead for i in range(len(leaves))]


def _layout(value: object, value_of_more: object, small: int) -> SampleLayout | None:
    if not isinstance(value, Tensor) or not isinstance(value_of_more, Tensor):
        return None
    return infer_layout(value.shape, value_of_more.shape, small, small + 1)
