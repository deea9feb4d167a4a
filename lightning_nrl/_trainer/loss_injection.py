"""A training step with something added to its loss; outside of a batch the module is as it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_nrl._trainer.output_capture import Call, logits_of, same_objects
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import Task

ONE_LINE = (
    "add `loss = loss + regression_loss(self, batch, logits)` to `training_step` "
    "(`from lightning_nrl.callbacks import regression_loss`)."
)
"""What a user can do where the term cannot be added from outside."""


class ForwardPass(NamedTuple):
    """The forward pass of a training step: what went in, and the logits that came out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor


def find_forward_pass(
    name: str, calls: Sequence[Call], args: Sequence[Any], kwargs: Mapping[str, Any], n: int, task: Task
) -> ForwardPass:
    """The one call of a step that is about its batch; refuses none, and more than one that could be it.

    The calls of one step are those of the part of this name (empty: the module); `args` and `kwargs` are what the model
    is called with for this batch of `n` samples as it is.
    """
    found = []
    for given, named, output in calls:
        logits = logits_of(output, n, task)
        if logits is not None:
            same = same_objects(given, args) and same_objects(named, kwargs)
            found.append((ForwardPass(tuple(given), named, logits), same))
    plain = [call for call, same in found if same]
    if len(plain) == 1:
        return plain[0]
    # What goes into a part need not be what goes into the model.
    if len(found) == 1 and not name:
        return found[0][0]
    if not found:
        what = f"`training_step` does not call `self(x)` on the {n} samples of a batch"
    elif len(found) == 1:
        what = f"`training_step` calls `self.{name}` with other inputs than those of the batch"
    else:
        what = f"`training_step` calls the model {len(found)} times"
    raise ConfigurationError(f"{what}, so it is not known which output the term is for.", ONE_LINE)


def add_to_loss(result: Any, term: Tensor) -> Any:
    """What a training step returned (a loss, a mapping with a `loss`, None for no step), a scalar added to its loss."""
    if result is None:
        return None
    if isinstance(result, Tensor):
        return result + term.to(result.device)
    if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
        return {**result, "loss": result["loss"] + term.to(result["loss"].device)}
    raise ConfigurationError(
        f"`training_step` returned a {type(result).__name__} without a loss.",
        "return the loss, or a dict with the key 'loss'.",
    )
