"""Finds the layers that a prediction calls, in the order of their last calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.step_outputs import forward_hooks
from lightning_nrl._utils.preserve import preserve_attributes, preserve_state, seed_all
from lightning_nrl.data.batch import Adapter, RawBatch, run_model
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import force_eager, layers_of

OUTPUT_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x.roll(1, 0), lambda x: 0.5 * x)
"""Changes of a layer's output that show whether logits depend on it.

Both keep typical values, since a NaN that becomes an index would crash a GPU.
"""


@contextmanager
def evaluation_context(evaluator: Evaluator) -> Iterator[None]:
    """Prepares a model for a prediction with seed 0, and restores its state on exit."""
    with preserve_state(evaluator.model), evaluator.context(), force_eager():
        seed_all(0)
        yield


@torch.no_grad()
def called_layers(evaluator: Evaluator, adapter: Adapter, raw: RawBatch) -> list[str] | None:
    """Returns the names of the layers that the prediction calls, by last call; None on an error.

    Omits Linear layers at the end that do not affect the logits, such as a second head.
    """
    model = evaluator.model
    args, kwargs, _ = adapter(raw)
    run = partial(run_model, model, args, kwargs)
    try:
        with evaluation_context(evaluator):
            called = call_order(model, run)
    except Exception:
        return None
    linear = {}
    for name, layer in layers_of(model).items():
        if name in called and isinstance(layer, nn.Linear):
            linear[name] = layer
    with evaluation_context(evaluator):
        unused = _unused_last_layers(model, linear, lambda: evaluator.task.logits(run()))
    return [name for name in called if name not in unused]


def call_order(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Returns the names of the layers that `run` calls, by last call."""
    calls = []
    with forward_hooks(layers_of(model), lambda name, args, output: calls.append(name)):
        run()
    return list(dict.fromkeys(reversed(calls)))[::-1]


def _unused_last_layers(
    model: nn.Module, linear: Mapping[str, nn.Linear], run: Callable[[], Tensor]
) -> set[str]:
    unused = set[str]()
    logits = _changed_logits(nn.Identity(), {}, model, run)
    if logits is None:
        return unused

    @cache
    def is_unused(name: str) -> bool:
        for change in OUTPUT_CHANGES:
            changed = _changed_logits(change, {name: linear[name]}, model, run)
            if changed is None or changed.shape != logits.shape:
                return False
            if not torch.allclose(changed, logits):
                return False
        return True

    # `layer="auto"` takes the last layer that is not frozen, other choices take the last layer: try
    # both orders.
    for order in (list(linear), sorted(linear, key=lambda name: linear[name].weight.requires_grad)):
        left = [name for name in order if name not in unused]
        while len(left) > 1 and is_unused(left[-1]):
            unused.add(left.pop())
    return unused


def _changed_logits(
    change: Callable[[Tensor], Tensor],
    layers: Mapping[str, nn.Module],
    model: nn.Module,
    run: Callable[[], Tensor],
) -> Tensor | None:
    hooks = forward_hooks(layers, lambda name, args, output: change(output))
    with preserve_attributes(model), hooks:
        seed_all(0)
        try:
            return run().clone()  # a model may reuse the memory of its outputs
        except Exception:
            return None
