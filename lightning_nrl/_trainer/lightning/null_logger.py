"""`NullLogger`, a logger that writes nothing."""

from __future__ import annotations

from typing import Any

from lightning_nrl._trainer.lightning.packages import DummyLoggerBase


class NullExperiment:
    """A logger experiment that accepts any call and does nothing."""

    def __getattr__(self, name: str) -> NullExperiment:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> NullExperiment:
        return self

    def __getitem__(self, key: object) -> NullExperiment:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass


class NullLogger(DummyLoggerBase):
    """A logger that writes nothing.

    Lightning's `DummyLogger` fails on `self.logger.experiment.config.update(...)`.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    @property
    def save_dir(self) -> str:
        return self._folder

    @property
    def log_dir(self) -> str:
        return self._folder

    @property
    def experiment(self) -> Any:
        return NullExperiment()

    def __getattr__(self, name: str) -> NullExperiment:
        return NullExperiment().__getattr__(name)
