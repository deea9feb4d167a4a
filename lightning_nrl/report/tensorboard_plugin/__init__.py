"""The Repair tab of TensorBoard, which finds it by an entry point of the package.

In: a log folder. Out: the repairs in it (`repair_folders`), one of them as JSON (`tab_data`), and what a browser needs
to show it (`repair_plugin`, `static/`). Nothing here imports torch before a repair is looked at.
"""

from lightning_nrl.report.tensorboard_plugin.repair_plugin import RepairPlugin

__all__ = ["RepairPlugin"]
