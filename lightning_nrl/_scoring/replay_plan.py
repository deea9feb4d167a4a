"""Finding out how a pass can be resumed at the first repaired layer: by trial, and checked against the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._model.layers import LayerRef
from lightning_nrl._scoring.channelwise import Varied
from lightning_nrl._scoring.replay import Inputs, Leaf, Plan, Subject, flatten
from lightning_nrl._scoring.sample_layout import Layout, infer_layout, select
from lightning_nrl._scoring.sparse_delta import edits, layer_output, make_changes
from lightning_nrl._scoring.tracing import Moment, remembering
from lightning_nrl.errors import ReplayError

__all__ = ["make_plan", "same_values"]


def make_plan(subject: Subject, inputs: Inputs, n: int) -> Plan | str:
    """Finds out how passes like this one are resumed.

    Args:
        subject: the model.
        inputs: what it is called with, `n` samples.
        n: how many.

    Returns:
        A plan that gave the same logits as the whole model for changed weights, or why there is none, in words.

    Raises:
        ReplayError: a site is never called.
    """
    small = max(2, min(n, 6))
    few, more = (select(inputs, torch.arange(size) % n, n) for size in (small, small + 1))
    (moment, _), (other, _) = subject.watch(few), subject.watch(more)
    again = next((name for name in moment.order if moment.order.count(name) > 1), None)
    if again is not None:
        return f"layer {again!r} is called {moment.order.count(again)} times in one pass"
    if moment.calls != other.calls or moment.order != other.order:
        return "the order in which modules are called depends on the data"
    leaves, spec = flatten(few, moment)
    others, other_spec = flatten(more, other)
    if spec != other_spec:
        return "what modules return depends on the data"
    try:
        layouts = [_layout(a, b, small) for a, b in zip(leaves, others, strict=True)]
        site_layouts = [infer_layout(a, b, small, small + 1) for a, b in zip(moment.shapes, other.shapes, strict=True)]
    except ValueError as error:
        return f"a module's output does not count samples in one dimension: {error}"
    if None in site_layouts or layouts[-2] is None:
        return "a layer's output is the same for all samples"
    dims = {name: layout.dim for name, layout in zip(moment.order, site_layouts, strict=True) if layout is not None}
    first = subject.sites[moment.order[0]]
    modules = {name: subject.model.get_submodule(name) for name in moment.calls}
    alive = _liveness(subject, moment, few)
    problem = ""
    for live in (alive, [True] * len(leaves)):
        made = tuple(_leaf(*parts) for parts in zip(leaves, layouts, live, strict=True))
        site = tuple(Leaf(leaf.layout, True, leaf.value, repeats=False) for leaf in made[-2:])
        plan = Plan(tuple(moment.calls), modules, first, dims, spec, (*made[:-2], *site))
        stored = [x for leaf, x in zip(plan.leaves, leaves, strict=True) if leaf.stored]
        try:
            problem = _check_all(subject, plan, stored, few, small) or _check_few(subject, plan, stored, few, small)
        except (RuntimeError, ValueError, IndexError, TypeError, ReplayError) as error:
            problem = f"resuming it failed: {error}".splitlines()[0]
        if not problem:
            return replace(plan, direct=_is_direct(subject, plan, stored, small))
    return problem


def same_values(a: Tensor, b: Tensor, precision: torch.dtype | None = None) -> bool:
    """Whether two results differ by no more than rounding, in the dtype they were computed in."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point():
        return torch.equal(a, b)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(precision or b.dtype, 5e-2)
    if b.is_cuda and tolerance == 1e-4 and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        tolerance = 1e-2
    finite = b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-6), equal_nan=True)


def _check_all(subject: Subject, plan: Plan, stored: list[Tensor], inputs: Inputs, n: int) -> str:
    """Resumes the pass under original weights and with all of them changed; says what is wrong, or nothing."""
    flat = subject.space.flat()
    where = torch.arange(len(flat), device=flat.device)
    parameters = subject.space.changed(where, _perturbed(flat))

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        if site is not plan.first:
            x, y = x[len(x) // 2 :], y[: len(y) // 2]
        new = {name.rpartition(".")[2]: parameters[name] for name in site.parameters}
        module: Any = site.module
        return torch.cat([y, layer_output(module, x, new["weight"], new.get("bias", module.bias))])

    return _compared(subject, inputs, ({}, parameters), plan.resume(subject, stored, n, edit, copies=2), stored[-1])


def _check_few(subject: Subject, plan: Plan, stored: list[Tensor], inputs: Inputs, n: int) -> str:
    """The same with a few weights changed, whose effect is followed channel by channel."""
    flat = subject.space.flat()
    where = torch.linspace(0, len(flat) - 1, min(8, len(flat)), dtype=torch.float64).long().unique().to(flat.device)
    values = torch.stack([flat, _perturbed(flat)])[:, where]
    changes = make_changes(subject.space, where)
    parameters = [subject.space.changed(where, v) for v in values]
    return _compared(
        subject, inputs, parameters, plan.resume(subject, stored, n, edits(changes, values), 2), stored[-1]
    )


def _compared(
    subject: Subject, inputs: Inputs, parameters: Sequence[Mapping[str, Tensor]], resumed: Tensor, y: Tensor
) -> str:
    precision = min((y.dtype, resumed.dtype), key=lambda t: torch.finfo(t).bits)
    halves = (resumed.dense() if isinstance(resumed, Varied) else resumed).chunk(2)
    for half, weights in zip(halves, parameters, strict=True):
        if not same_values(half, subject.whole(inputs, weights), precision):
            return "resuming it after the layer gives other outputs than the whole model"
    return ""


def _perturbed(flat: Tensor) -> Tensor:
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
    return flat + noise * flat.std(correction=0).clamp_min(1e-3)


def _is_direct(subject: Subject, plan: Plan, stored: list[Tensor], n: int) -> bool:
    """Whether the first site's output, untouched, is what the model returns."""
    seen: list[Tensor] = []

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        seen.append(y.clone())
        return seen[-1]

    logits = plan.resume(subject, stored, n, edit)
    return len(seen) == 1 and logits is seen[0]


def _liveness(subject: Subject, moment: Moment, inputs: Inputs) -> list[bool]:
    """Which leaves reach the logits other than through the first site, by the gradients that come back to them."""
    leaves, spec = flatten(inputs, moment)
    floats = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = [x.detach().clone().requires_grad_() for x, f in zip(leaves, floats, strict=True) if f]
            source = iter(wanted)
            given = [next(source).clone() if f else x for x, f in zip(leaves, floats, strict=True)]
            (args, kwargs), outputs, (_, y) = pytree.tree_unflatten(given, spec)
            y = y.detach()
            first = subject.sites[moment.order[0]].module
            with (
                remembering(moment.calls, dict(subject.model.named_modules()), outputs, first, lambda: y),
                subject.context(),
            ):
                logits = subject.task.logits(subject.model(*args, **kwargs))
            found: Iterator[Tensor | None] = iter([None] * len(wanted))
            if logits.requires_grad:
                found = iter(torch.autograd.grad(logits.sum(), wanted, allow_unused=True))
    except (RuntimeError, ReplayError):
        return [True] * len(leaves)
    return [next(found) is not None if f else True for f in floats]


def _leaf(x: Any, layout: Layout | None, live: bool) -> Leaf:
    if layout is None:
        return Leaf(None, True, x)
    return Leaf(layout, live, layout.take(x, slice(0, 1)).clone())


def _layout(a: Any, b: Any, small: int) -> Layout | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    return infer_layout(a.shape, b.shape, small, small + 1)
