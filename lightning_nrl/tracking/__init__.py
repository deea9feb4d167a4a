"""Writing a repair to loggers: numbers to any of them, and to TensorBoard what else helps to judge it."""

from lightning_nrl.tracking.scalars import before_after, search_curves, verdict
from lightning_nrl.tracking.tensorboard import write_extras
from lightning_nrl.tracking.track import track

__all__ = ["before_after", "search_curves", "track", "verdict", "write_extras"]
