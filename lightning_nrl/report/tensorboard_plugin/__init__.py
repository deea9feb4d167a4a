"""The Repair tab of TensorBoard, which finds the tab by an entry point.

In: a log folder. Out: the repairs in it (`repair_folders`), a repair as JSON (`tab_data`), and the
browser's files (`repair_plugin`, `static/`). torch is imported only when a repair is opened.
"""

from lightning_nrl.report.tensorboard_plugin.repair_plugin import RepairPlugin

__all__ = ["RepairPlugin"]
