"""How much samples count: weights, slices, quotas, protected samples, and failures that are set aside."""

from lightning_nrl.importance.importance import DOUBTFUL, Focal, Importance

__all__ = ["DOUBTFUL", "Focal", "Importance"]
