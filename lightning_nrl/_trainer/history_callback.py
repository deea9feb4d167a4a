"""`HistoryCallback`, the base class of callbacks that record the history of a training."""

from __future__ import annotations

from pathlib import Path

from lightning_nrl._trainer.lightning.packages import CallbackBase


class HistoryCallback(CallbackBase):
    """Records a training in a folder, for localizers that need its history.

    Attributes:
        folder: folder with the records. None before training.
        recorded: names of the recorded splits. Empty before training.
    """

    folder: Path | None = None
    recorded: tuple[str, ...] = ()
