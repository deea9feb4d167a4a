"""The replaced model as a module on the device of the new model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import nn

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import data_module_of
from lightning_nrl._trainer.reading.data_splits import find_loader
from lightning_nrl._trainer.reading.random_transforms import innermost_datasets
from lightning_nrl._trainer.training.module_copy import copied_module
from lightning_nrl._utils.checkpoint import read_fitting
from lightning_nrl._utils.preserve import eval_mode
from lightning_nrl._utils.state import State, device_of, write
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.updates import Predictions
from lightning_nrl.updates.old_model import OldModel, parse_reference


def parse_teacher(reference: object) -> OldModel | Predictions:
    """Returns the replaced model, or its predictions from a CSV file. Refuses anything else."""
    parsed = parse_reference(reference)
    if isinstance(parsed, (OldModel, Predictions)):
        return parsed
    problem = "it cannot be asked for outputs"
    if parsed is None:
        problem = "there is no model to compare with"
    raise ConfigurationError(
        f"`reference={reference!r}`: {problem}.",
        "give a checkpoint, a module, an OldModel or a CSV file of predictions.",
    )


def parse_with_weights(reference: object) -> OldModel:
    """Returns the replaced model. Refuses one whose weights cannot be mixed with the new ones."""
    parsed = parse_reference(reference)
    if not isinstance(parsed, OldModel):
        problem = "it has no weights"
        if parsed is None:
            problem = "there are no weights to interpolate with"
        raise ConfigurationError(
            f"`reference={reference!r}`: {problem}.",
            "give a checkpoint, a module, a state dict or an OldModel.",
        )
    for name in ("adapter", "classes"):
        if vars(parsed)[name] is not None:
            raise ConfigurationError(
                f"`reference`: an OldModel with `{name}` has other inputs or outputs than the new "
                "model.",
                "only weights with the same inputs and outputs can be interpolated.",
            )
    return parsed


def check_other_model(reference: object, module: LightningModule) -> None:
    """Refuses the module in training as the replaced model."""
    if isinstance(reference, OldModel) and reference.model is module:
        raise ConfigurationError(
            "`reference` is the model in training.",
            "give its checkpoint, or a copy: `copy.deepcopy(model)`.",
        )


def reference_module(
    trainer: Trainer,
    module: LightningModule,
    reference: nn.Module | State | str | Path,
    stack: ExitStack,
) -> nn.Module:
    """Returns the reference if it is a module, or else a copy of `module` with its weights.

    Until `stack` closes, the returned module is in evaluation mode and on the device of `module`.
    """
    model = reference
    if not isinstance(model, nn.Module):
        model = _copy(trainer, module, model)
    stack.callback(model.to, device_of(model))
    stack.enter_context(eval_mode(model.to(module.device)))
    return model


def _copy(
    trainer: Trainer, module: LightningModule, weights: State | str | Path
) -> LightningModule:
    state = read_fitting("reference", weights, module)
    loaders = find_loader("train", trainer, module)
    data_sets = innermost_datasets(loaders)
    shared = (trainer, data_module_of(trainer), *trainer.loggers, loaders, *data_sets)
    modes = dict.fromkeys(module.modules(), False)
    try:
        new = copied_module(module, state, modes, shared=shared)
    except Exception as error:
        raise ConfigurationError(
            f"`reference`: {type(module).__name__} cannot be copied to hold the old weights "
            f"({type(error).__name__}: {error}).",
            "load the old model yourself and give the module.",
        ) from error
    # `copied_module` writes `state` only in `configure_model`, which does not run here.
    write(new, state)
    new.trainer = trainer
    return new
