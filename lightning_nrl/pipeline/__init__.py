"""A repair from end to end, without Lightning: baseline, method, sparse patch, line search, verdict, report.

In: a model, its known data and `Settings`. Out: an `Outcome`, the report and the repaired weights. The live model is
left as it is found.
"""

from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import BoundOptions, SearchOptions, Settings

__all__ = ["BoundOptions", "Outcome", "SearchOptions", "Settings", "repair_module"]
