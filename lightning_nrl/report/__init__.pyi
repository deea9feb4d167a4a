from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Page
from lightning_nrl.report.repair_plot import draw_repair, repair_figures
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.verdicts import Verdict

__all__ = ["Page", "RepairReport", "Report", "Verdict", "draw_repair", "repair_figures"]
