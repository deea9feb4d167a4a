"""Finds trained parameters that the counted prediction does not depend on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from lightning_nrl._trainer.called_layers import evaluation_context
from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.step_outputs import no_op, replaced
from lightning_nrl._trainer.trainer_state import untracked
from lightning_nrl._utils.preserve import preserve_attributes
from lightning_nrl._utils.sharded import is_sharded
from lightning_nrl._utils.state import temporary_weights
from lightning_nrl.data.batch import run_model
from lightning_nrl.evaluation import Evaluator


def unused_weights(
    trainer: Trainer, model: LightningModule, evaluator: Evaluator, source: LoaderSource
) -> list[str]:
    """Returns the names of parameters that `training_step` trains and the logits do not depend on.

    Such as the transitions of a decoder, or weights of which a module keeps what it has computed.
    The training step runs first, in training mode, in which modules drop what they keep.
    """
    if is_sharded(model):
        return []
    parameters = dict(model.named_parameters())
    raw = source.first_batch()

    def loss() -> Tensor | None:
        n_arguments = len(inspect.signature(model.training_step).parameters)
        model.train()
        result = model.training_step(*(raw, 0, 0)[:n_arguments])
        return result.get("loss") if isinstance(result, Mapping) else result

    def logits() -> Tensor:
        args, kwargs, _ = source.adapter(raw)
        return evaluator.task.logits(run_model(model, args, kwargs))

    def run(call: Callable[[], Tensor | None]) -> Tensor:
        with (
            untracked(trainer),
            preserve_attributes(model),
            evaluation_context(model, evaluator),
            replaced(model, log=no_op, log_dict=no_op),
        ):
            result = call()
            assert isinstance(result, Tensor)
            return result

    with suppress(Exception):  # the evaluation and the training report an error
        with torch.enable_grad():
            trained, used = _leaves(run(loss)), _leaves(run(logits))
        unused = {
            name: parameter
            for name, parameter in parameters.items()
            if id(parameter) in trained - used
        }
        if not unused:
            return []
        with torch.no_grad():
            before = run(logits)
            # A prediction may depend on parameters without gradients.
            with temporary_weights(model, {name: x + 1 for name, x in unused.items()}):
                after = run(logits)
        return list(unused) if torch.equal(before, after) else []
    return []


def _leaves(result: Tensor) -> set[int]:
    """Returns the `id` of each parameter from which a result was computed."""
    leaves, seen, nodes = set(), set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return leaves
