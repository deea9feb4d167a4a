"""The Repair tab of TensorBoard, which finds it by an entry point.

In: a log folder. Out: its repairs (`repair_folders`), one of them as JSON (`tab_data`), and the browser's files
(`repair_plugin`, `static/`). torch is imported only when a repair is opened.
"""

from lightning_nrl.report.tensorboard_plugin.repair_plugin import RepairPlugin

__all__ = ["RepairPlugin"]
