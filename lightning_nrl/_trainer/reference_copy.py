"""The replaced model as a module on the device of the new model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from lightning_nrl._trainer.data_splits import find_loader
from lightning_nrl._trainer.inner_trainer import copied_module
from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import data_module_of
from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.preserve import eval_mode
from lightning_nrl._utils.state import State, write
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.updates.old_model import OldModel, parse_reference
from lightning_nrl.updates.predictions import Predictions


def parse_teacher(reference: object) -> OldModel | Predictions:
    """Returns the replaced model, or its predictions if `reference` is a CSV file. Refuses any
    other reference.
    """
    found = parse_reference(reference)
    if not isinstance(found, (OldModel, Predictions)):
        hint = "give a checkpoint, a module, an OldModel or a CSV file of predictions."
        what = (
            "there is no model to compare with"
            if found is None
            else "it cannot be asked for outputs"
        )
        raise ConfigurationError(f"`reference={reference!r}`: {what}.", hint)
    return found


def parse_with_weights(reference: object) -> OldModel:
    """Returns the replaced model. Refuses a model whose weights cannot be mixed with the weights of
    the new model.
    """
    found = parse_reference(reference)
    if not isinstance(found, OldModel):
        what = "there are no weights to interpolate with" if found is None else "it has no weights"
        hint = "give a checkpoint, a module, a state dict or an OldModel."
        raise ConfigurationError(f"`reference={reference!r}`: {what}.", hint)
    for name in ("adapter", "classes"):
        if getattr(found, name) is not None:
            problem = f"`reference`: an OldModel with `{name}` has other inputs or outputs than the new model."
            raise ConfigurationError(
                problem, "only weights with the same inputs and outputs can be interpolated."
            )
    return found


def reference_module(
    trainer: Trainer,
    module: LightningModule,
    given: nn.Module | State | str | Path,
    held: ExitStack,
) -> nn.Module:
    """Returns `given` if it is a module, or else a copy of `module` with the weights `given`.

    Until `held` closes, the returned module is in evaluation mode and on the device of `module`.
    """
    model = given if isinstance(given, nn.Module) else _copy(trainer, module, given)
    home = next((x.device for x in (*model.parameters(), *model.buffers())), module.device)
    held.callback(model.to, home)
    held.enter_context(eval_mode(model.to(module.device)))
    return model


def _copy(trainer: Trainer, module: LightningModule, given: State | str | Path) -> LightningModule:
    state = fitting("reference", read_state("reference", given), module)
    data = find_loader("train", trainer, module)
    dataset = data.dataset if isinstance(data, DataLoader) else None
    shared = [trainer, data_module_of(trainer), *trainer.loggers, data, dataset]
    modes = [False for _ in module.modules()]
    try:
        new = copied_module(
            module, state, modes, shared=[thing for thing in shared if thing is not None]
        )
    except Exception as error:
        what = f"{type(module).__name__} cannot be copied to hold the old weights ({type(error).__name__}: {error})."
        raise ConfigurationError(
            f"`reference`: {what}", "load the old model yourself and give the module."
        ) from error
    write(new, state)
    new.trainer = trainer
    return new
