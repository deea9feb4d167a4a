"""Access to private or untyped parts of Lightning, tested with 2.5 and 2.6.

Docstrings name the private parts in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, cast

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import (
    Callback,
    DistributedSamplerWrapper,
    LightningDataModule,
    LightningModule,
    Trainer,
    class_for,
)
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.preserve import replaced
from lightning_nrl.data.adapters import describe
from lightning_nrl.data.batch import RawBatch, with_plain_tensors
from lightning_nrl.errors import ConfigurationError, first_line

Loader: TypeAlias = DataLoader[Any]
Loaders: TypeAlias = Any  # a data loader, or loaders in lists, mappings or a CombinedLoader

AnyCallback = TypeVar("AnyCallback", bound=Callback)

CheckpointState: TypeAlias = dict[str, Any]
"""What a checkpoint file holds."""

COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""Methods of a compiled module that Lightning replaces by bound functions."""


def _untyped(trainer: Trainer) -> Any:
    return trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return cast("list[Callback]", _untyped(trainer).callbacks)


def callbacks_of_class(trainer: Trainer, kind: type[AnyCallback]) -> list[AnyCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    _untyped(trainer).callbacks = callbacks


def data_module_of(trainer: Trainer) -> LightningDataModule | None:
    return cast("LightningDataModule | None", _untyped(trainer).datamodule)


def batch_limit(trainer: Trainer) -> int | None:
    """Returns the number of batches per loader in a `fast_dev_run`, or None in an ordinary run."""
    return int(_untyped(trainer).fast_dev_run) or None


def overfit_batches(trainer: Trainer) -> int | float:
    """Returns `Trainer.overfit_batches`: a number (int) or share (float) of batches, or 0."""
    return cast(float, _untyped(trainer).overfit_batches)


def state_key_of(callback: Callback, **settings: object) -> str:
    """Returns the key of a callback's state in a checkpoint (`_generate_state_key`)."""
    return callback._generate_state_key(**settings)


def logged_hparams(trainer: Trainer) -> dict[str, Any]:
    """Returns the hyperparameters of module and data that a fit logs (`_log_hyperparams`)."""
    hparams: dict[str, Any] = {}
    for holder in (trainer.lightning_module, data_module_of(trainer)):
        if holder is not None and holder._log_hyperparams:
            hparams |= holder.hparams_initial
    hparams.pop("_class_path", None)  # added by LightningCLI
    return hparams


def trainer_of(module: LightningModule) -> Trainer | None:
    return module._trainer  # `LightningModule.trainer` would raise instead of returning None


def overrides(module: LightningModule, name: str) -> bool:
    """True if a module overrides a step or hook of LightningModule."""
    for kind in type(module).__mro__:
        if name in vars(kind):
            return kind.__module__.partition(".")[0] not in ("pytorch_lightning", "lightning")
    return False


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """Sets the trainer's stage to validation, in which modules do not augment, for a block."""
    stage = class_for(trainer, "pytorch.trainer.states.RunningStage").VALIDATING
    with replaced(trainer.state, stage=stage):
        yield


def prepare_batch(trainer: Trainer, module: LightningModule, batch: RawBatch) -> RawBatch:
    """Moves a batch to the device as validation does (`_on_before_batch_transfer`)."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    try:
        moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"`data`: `transfer_batch_to_device` raised {type(error).__name__}: {error}\n"
            f"{describe(batch)}",
            "give loaders, such as `passed`, whose batches are like those of your own loaders.",
        ) from error
    return with_plain_tensors(moved)


def given_loaders(trainer: Trainer, split: str) -> Loaders:
    """Returns the `train` or `val` loaders given to `fit`, or None for hooks (`_data_source`)."""
    loop = trainer.fit_loop if split == "train" else trainer.fit_loop.epoch_loop.val_loop
    holder = loop._data_source.instance
    return None if isinstance(holder, (LightningModule, LightningDataModule)) else holder


def combined_like(
    trainer: Trainer, loaders: Loaders, change: Callable[[Loader], Loader]
) -> Loaders:
    """Returns a `CombinedLoader` of the changed loaders, with the mode of the fit (`_mode`)."""
    combined = trainer.fit_loop._combined_loader
    mode = getattr(loaders if combined is None else combined, "_mode", "max_size_cycle")
    changed = pytree.tree_map(change, getattr(loaders, "iterables", loaders))
    combined = class_for(trainer, "pytorch.utilities.CombinedLoader")(changed, mode)
    iter(combined)  # sets its length
    return combined


def validation_loaders(trainer: Trainer) -> tuple[list[Loaders], list[int | float], str] | None:
    """Returns the loaders of a validation, their batch limits and their mode, if there are any."""
    loop = trainer.validate_loop
    if trainer.state.fn == "fit":
        loop = trainer.fit_loop.epoch_loop.val_loop
    with validating(trainer):
        loop.setup_data()
    combined = loop._combined_loader  # `val_dataloaders` may be nested as the user likes
    if combined is None:
        return None
    return list(combined.flattened), list(loop.max_batches), combined._mode


def batch_limits(trainer: Trainer) -> tuple[str, list[int | None]]:
    """Returns the argument that limits a test or validation, and each loader's largest number.

    Without a limit, the text is empty and the numbers are None.
    """
    split, loop = "test", trainer.test_loop
    if trainer.state.fn == "validate":
        split, loop = "val", trainer.validate_loop
    name = f"limit_{split}_batches"
    limit = vars(trainer)[name]
    if isinstance(limit, float) and limit == 1.0:
        return "", [None for _ in loop.max_batches]
    if batch_limit(trainer):
        name = "fast_dev_run"
    return f"{name}={limit}", [int(n) for n in loop.max_batches]


def rerun_validation(trainer: Trainer) -> None:
    """Validates again within a fit, to update metrics. Restores the loop's counters.

    Also restores `_logger_connector`.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    connector = trainer._logger_connector
    progress = loop.batch_progress.state_dict()
    seen = dict(loop._seen_batches_per_dataloader)
    connector_state = connector._first_loop_iter, connector._current_fx
    try:
        with validating(trainer):
            loop.run()
    finally:
        connector._first_loop_iter, connector._current_fx = connector_state
        loop.batch_progress.load_state_dict(progress)
        loop._seen_batches_per_dataloader.update(seen)


def restore_training(trainer: Trainer) -> str:
    """Loads loops, optimizers and schedules from the checkpoint that a fit has read.

    Returns why they do not fit, or an empty text. Lightning would load them after `on_fit_start`,
    and raise an error if they do not fit (`_checkpoint_connector`).
    """
    connector = trainer._checkpoint_connector
    problem = ""
    try:
        connector.restore_training_state()
    except Exception as error:
        problem = first_line(error)
    connector._loaded_checkpoint = {}
    return problem


def sampler_of(loader: Loader) -> tuple[Any, Any]:
    """Returns the sampler to call and the user's own; they differ if Lightning wrapped it."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSamplerWrapper):
        wrapped: Any = sampler.dataset
        return sampler, wrapped._sampler
    return sampler, sampler


def original_module(module: nn.Module) -> nn.Module:
    """Returns the module that `torch.compile` has wrapped (`_orig_mod`), or `module` itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner


def is_compiled(module: nn.Module) -> bool:
    """True if calls of the module are compiled, without hooks inside (`_compiled_call_impl`)."""
    by_lightning = isinstance(module, LightningModule) and module._compiler_ctx is not None
    return by_lightning or module._compiled_call_impl is not None


def shared_with_copies(module: nn.Module) -> list[object]:
    """Returns objects that a deep copy of a module must share: `_trainer` and `_compiler_ctx`."""
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    return [*(part._trainer for part in parts), *(part._compiler_ctx for part in parts)]


def release_copy(copy: nn.Module) -> None:
    """Detaches a deep copy of a module from its trainer, and undoes its compilation."""
    for part in copy.modules():
        if isinstance(part, LightningModule):
            part._trainer = part._current_fx_name = None
            part._metric_attributes = None
            if part._compiler_ctx is not None:
                part._compiler_ctx = None
                for name in COMPILED_STEPS:
                    vars(part).pop(name, None)


def starts_own_processes(trainer: Trainer) -> bool:
    """True if a trainer starts processes, as with `ddp_spawn` (class of `Strategy.launcher`)."""
    launcher = trainer.strategy.launcher
    multiprocessing = "pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher"
    return isinstance(launcher, class_for(trainer, multiprocessing))
