"""A switch that Lightning's Trainer can test, validate, predict with, save and load."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_nrl._lightning import LightningModule, LightningModuleMixin
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.serving.margin_switch import Classes, SwitchRule

__all__ = ["SwitchedModule"]


class SwitchedModule(LightningModuleMixin):
    """A copy of the user's new LightningModule whose `forward` is a `MarginSwitch`.

    It is an instance of the new module's class too: its steps, metrics, hooks, data loaders and hyperparameters are
    those of the new module, and whatever calls `self(x)` gets what the switch serves. The old model and the threshold
    are in its submodule `margin_switch`, and so in its `state_dict` and checkpoints. The new module's own weights keep
    their names, so that its class still loads them from such a checkpoint with `strict=False`.

    A step that calls an inner network, such as `self.net(x)`, goes past `forward` and so past the switch. It is found
    out at the end of the epoch and refused. Put a `MarginSwitch` in place of that network instead: `served.net =
    MarginSwitch(old.net, new.net, threshold)` on a copy of the new module.

    It cannot be trained: `fit` is refused, and `train()` leaves it in evaluation mode.

    Args:
        old: the model in use, a LightningModule or any other module; it is held, not copied, and put into evaluation
            mode. Of a LightningModule only `forward` is used.
        new: its update; it is copied, and left as it is.
        threshold: see `MarginSwitch`.
        classes: see `MarginSwitch`.

    Raises:
        ConfigurationError: see `MarginSwitch`; or `new` is no LightningModule, or a `SwitchedModule` itself.
    """

    margin_switch: _OldModel
    _was_asked: bool

    def __new__(
        cls, old: nn.Module, new: LightningModule, threshold: float = math.inf, classes: Classes | None = None
    ) -> Self:
        """Makes an instance of a class that is both this one and that of the new module."""
        check_kind("new", new, isinstance(new, LightningModule), "LightningModule", "new=<a LightningModule>")
        if isinstance(new, SwitchedModule):
            raise ConfigurationError(
                "`new` is a `SwitchedModule` itself.", "give the new module alone; `old` may be a `SwitchedModule`."
            )
        served: Self = _blank(type(new))
        return served

    def __init__(
        self, old: nn.Module, new: LightningModule, threshold: float = math.inf, classes: Classes | None = None
    ) -> None:
        # Not `super().__init__()`: the new module is there already, with all that its own constructor did.
        self.__dict__.update(copy.deepcopy(new).__dict__)
        self._was_asked = False
        self.margin_switch = _OldModel(old, threshold, classes)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs both models and serves one of them for each sample: logits `n x C`."""
        if not torch.compiler.is_compiling():
            self._was_asked = True
        logits: Tensor = self.margin_switch(super().forward(*args, **kwargs), *args, **kwargs)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: what is served is the models in evaluation mode."""
        return super().train(False)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        old: nn.Module,
        new: LightningModule,
    ) -> SwitchedModule:
        """Reads a checkpoint that a Trainer saved of such a module, with its threshold and classes.

        Args:
            checkpoint_path: a file, or its path.
            map_location: as for `torch.load`.
            hparams_file: not used; the hyperparameters are those of `new`.
            strict: whether every weight must be there and no other; None: as `new` wants it.
            weights_only: whether only tensors and plain values may be in the file; None: yes.
            old: a model built like the old one. Its weights become those of the file.
            new: a module built like the new one. It is copied and left as it is.
        """
        safe = True if weights_only is None else weights_only
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=safe)
        state = checkpoint["state_dict"]
        if "margin_switch.threshold" not in state:
            raise ConfigurationError(
                "`checkpoint_path` holds a checkpoint without a switch.",
                "load it with its own class, and pass both modules to `SwitchedModule(old, new, threshold)`.",
            )
        classes = state.get("margin_switch.classes")
        served = SwitchedModule(old, new, classes=None if classes is None else classes.tolist())
        served.configure_model()
        served.on_load_checkpoint(checkpoint)
        served.load_state_dict(state, strict=served.strict_loading if strict is None else strict)
        return served.to(state["margin_switch.threshold"].device)

    def setup(self, stage: str) -> None:
        """Refuses to be trained."""
        if stage == "fit":
            raise ConfigurationError(
                "`model`: a `SwitchedModule` cannot be trained.",
                "fit the new module alone, and put it behind a switch afterwards.",
            )
        super().setup(stage)

    def on_validation_epoch_start(self) -> None:
        """Begins to watch whether the steps ask the switch."""
        self._was_asked = False
        super().on_validation_epoch_start()

    def on_test_epoch_start(self) -> None:
        """Begins to watch whether the steps ask the switch."""
        self._was_asked = False
        super().on_test_epoch_start()

    def on_predict_epoch_start(self) -> None:
        """Begins to watch whether the steps ask the switch."""
        self._was_asked = False
        super().on_predict_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Refuses steps that went past the switch."""
        self._check_asked("validation_step")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Refuses steps that went past the switch."""
        self._check_asked("test_step")
        super().on_test_epoch_end()

    def on_predict_epoch_end(self) -> None:
        """Refuses steps that went past the switch."""
        self._check_asked("predict_step")
        super().on_predict_epoch_end()

    def _check_asked(self, step: str) -> None:
        if not self._was_asked:
            raise ConfigurationError(
                f"`new`: its `{step}` never called `self(...)`, so the new model answered alone, not the switch.",
                f"call `self(...)` in `{step}`, or put a `MarginSwitch` in place of the network that it calls, "
                "such as `served.net = MarginSwitch(old.net, new.net, threshold)`.",
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so that copying and pickling cannot find it by its name.
        return _blank, (type(self).__mro__[2],), self.__getstate__()


class _OldModel(SwitchRule):
    """The old model behind a new one."""

    def __init__(self, old: nn.Module, threshold: float, classes: Classes | None) -> None:
        super().__init__(threshold, classes)
        check_kind("old", old, isinstance(old, nn.Module), "module", "old=<an `nn.Module`>")
        self.old = old

    def forward(self, new: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.choose(self.old(*args, **kwargs), new)


@cache
def _joined(kind: type[LightningModule]) -> type[SwitchedModule]:
    """The class of a module of this kind behind a switch."""
    return type(f"Switched{kind.__name__}", (SwitchedModule, kind), {"__module__": kind.__module__})


def _blank(kind: type[LightningModule]) -> Any:
    """An object of that class without a state."""
    return object.__new__(_joined(kind))  # type: ignore[arg-type]  # mypy takes no class of modules for hashable
