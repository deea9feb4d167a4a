"""Compares the logits and labels that a repair would use with those of a module's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_nrl._trainer.loaders import length_of
from lightning_nrl._trainer.step_outputs import logits_of
from lightning_nrl.data.adapters import (
    ADAPTER_HINT,
    adapter_hint,
    fields_of,
    is_default,
    paths_in,
)
from lightning_nrl.data.batch import Adapter, Args, BatchTarget, ModelOutput, RawBatch, tensors_in
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import NamedHead, Task

LOSSES = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.mse_loss,
    F.nll_loss,
}
# Largest relative difference of outputs that count as equal, wide enough for half precision.
COMPARED_TOLERANCE = 1e-2


Calls = list[tuple[Tensor, Tensor]]
"""Input and output of a layer in each of its calls."""
Comparison = tuple[Tensor, Tensor]
"""The input and the target of a loss."""


class LossRecorder(TorchFunctionMode):
    """Records what the losses in a block compare."""

    def __init__(self) -> None:
        super().__init__()
        self.comparisons: list[Comparison] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func in LOSSES:
            arguments = inspect.signature(func).bind(*args, **named).args
            self.comparisons.append((arguments[0].detach(), arguments[1].detach()))
        return func(*args, **named)


class Prediction(NamedTuple):
    """A model's output for a batch, calls of its layers, and what the adapter found."""

    raw: RawBatch
    args: Args
    target: BatchTarget
    output: ModelOutput
    calls: Calls


def check_loss(
    step: str,
    comparisons: Sequence[Comparison],
    prediction: Prediction,
    task: Task,
    adapter: Adapter,
) -> bool:
    """Returns True if a loss in `step` compares our logits with our labels.

    Raises a `ConfigurationError` if it compares the labels with another output of the model, or our
    logits with another part of the batch. Labels of the user's own adapter stay.
    """
    logits = logits_of(prediction.output, length_of(prediction.target), task)
    labels = list(tensors_in(prediction.target))
    with_labels = []
    other_targets = []  # of our logits
    for compared, target in comparisons:
        has_labels = any(_is_same(target, label) for label in labels)
        has_logits = logits is not None and _is_from(compared, logits)
        if has_labels and has_logits:
            return True
        if has_labels:
            with_labels.append(compared)
        if has_logits:
            other_targets.append(_path_of(target, prediction.raw))
    if not isinstance(task, NamedHead):  # a head that the user named stays
        for compared in with_labels:
            _refuse_output(step, compared, prediction, logits)
    if not is_default(adapter):
        return False
    for path in filter(None, other_targets):
        raise ConfigurationError(
            f"`adapter`: your loss (in `{step}`) compares the output with `{path}`, and the repair "
            "would take other labels.",
            adapter_hint(prediction.raw, labels=path, args=prediction.args),
        )
    return False


def check_unambiguous(prediction: Prediction, task: Task) -> None:
    """Refuses a sequence of outputs if several of them may be the logits."""
    if isinstance(task, NamedHead) or not isinstance(prediction.output, (tuple, list)):
        return
    fitting = []
    for name, x in outputs_in(prediction.output).items():
        with suppress(Exception):
            task.check(task.logits(x), prediction.target)
            fitting.append(f"{name!r}, {list(x.shape)}")
    if len(fitting) > 1:
        raise ConfigurationError(
            f"`output`: several outputs may be the logits ({'; '.join(fitting)}), and no loss in "
            "your steps was seen to compare one of them with the labels.",
            "write `output=` with the one that has the logits "
            "(`data=DataOptions(output=...)` in a repair).",
        )


def outputs_in(output: ModelOutput) -> dict[int | str, Tensor]:
    """Returns the tensors among several outputs by position, key or field."""
    parts = fields_of(output) or {}
    if not parts and isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    return {name: x for name, x in parts.items() if isinstance(x, Tensor) and x.ndim}


def _refuse_output(
    step: str, compared: Tensor, prediction: Prediction, logits: Tensor | None
) -> None:
    shape = list(compared.shape)
    labels = [_path_of(label, prediction.raw) for label in tensors_in(prediction.target)]
    chosen = "no output" if logits is None else f"an output {list(logits.shape)}"
    problem = f"with `{', '.join(labels)}`, and the repair would take {chosen} for the logits."
    for name, x in outputs_in(prediction.output).items():
        if _is_from(compared, x):
            raise ConfigurationError(
                f"`output`: your loss (in `{step}`) compares output {name!r}, {shape}, {problem}",
                f"write `output={name!r}` (`data=DataOptions(output={name!r})` in a repair), "
                "or name the output that is the prediction.",
            )
    # Weights outside of `forward` make logits of an embedding. One column may be one of ours.
    if logits is not None and len(shape) == logits.ndim == 2 and 1 < shape[1] < logits.shape[1]:
        raise ConfigurationError(
            f"`model`: your loss (in `{step}`) compares {shape}, which is no output, {problem}",
            ADAPTER_HINT,
        )


def _path_of(target: Tensor, raw: RawBatch) -> str:
    for path, part in paths_in(raw).items():
        if isinstance(part, Tensor) and _is_same(target, part):
            return path
    return ""


def _is_from(x: Tensor, logits: Tensor) -> bool:
    """True if a loss gets these logits, or their probabilities."""
    if x.numel() != logits.numel() or not x.numel():
        return False
    for form in _forms(x):
        for expected in _forms(logits):
            if (form - expected).abs().max() <= COMPARED_TOLERANCE * expected.abs().max():
                return True
    return False


def _forms(logits: Tensor) -> Iterator[Tensor]:
    logits = logits.float()
    yield logits.flatten()
    yield logits.sigmoid().flatten()
    if logits.ndim > 1 and logits.shape[1] > 1:
        yield logits.log_softmax(1).flatten()


def _is_same(target: Tensor, labels: Tensor) -> bool:
    if not target.numel() or not labels.numel():
        return False
    if target.numel() != labels.numel():
        target, labels = _classes(target), _classes(labels)
    return torch.equal(target.flatten().double(), labels.flatten().double())


def _classes(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.ndim == 2 else labels
