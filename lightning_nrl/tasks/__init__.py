"""Tasks, which define when a sample is right.

In: the model's outputs and the targets. Out: for each sample whether it passed, its loss and its
margin.
"""

from lightning_nrl.tasks.classification import Binary, Multiclass, Multilabel
from lightning_nrl.tasks.custom import Custom, NamedHead
from lightning_nrl.tasks.elements import Segmentation, Sequence
from lightning_nrl.tasks.ordinal import Ordinal
from lightning_nrl.tasks.regression import Regression
from lightning_nrl.tasks.task import TASKS, Task, class_logits, parse_task

__all__ = [
    "TASKS",
    "Binary",
    "Custom",
    "Multiclass",
    "Multilabel",
    "NamedHead",
    "Ordinal",
    "Regression",
    "Segmentation",
    "Sequence",
    "Task",
    "class_logits",
    "parse_task",
]
