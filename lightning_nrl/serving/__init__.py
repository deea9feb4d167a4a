"""Serving the old and the new model side by side: the new one only where it is sure, or both at once.

An opt-in for deployment: some repairs are given up for fewer regressions, at the cost of running two models.
In: two models and calibration data. Out: one model, and the threshold or weight to run it with.
"""

from lightning_nrl.serving.ensemble import WeightChoice, WeightedEnsemble, WeightPoint, choose_weight
from lightning_nrl.serving.margin_switch import UNKNOWN, MarginSwitch, margin_over
from lightning_nrl.serving.switch_report import SwitchReport, SwitchSplit, Timing, report_switch
from lightning_nrl.serving.switched_module import SwitchedModule
from lightning_nrl.serving.threshold import ThresholdChoice, ThresholdPoint, choose_threshold

__all__ = [
    "UNKNOWN",
    "MarginSwitch",
    "SwitchReport",
    "SwitchSplit",
    "SwitchedModule",
    "ThresholdChoice",
    "ThresholdPoint",
    "Timing",
    "WeightChoice",
    "WeightPoint",
    "WeightedEnsemble",
    "choose_threshold",
    "choose_weight",
    "margin_over",
    "report_switch",
]
