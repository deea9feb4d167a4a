"""Serving the old and the new model side by side: the new one only where it is sure of its answer, or both at once.

An opt-in for deployment: some repairs are given up for fewer regressions, at the cost of running two models.
"""

from lightning_nrl.switch.ensemble import WeightChoice, WeightedEnsemble, WeightPoint, choose_weight
from lightning_nrl.switch.report import SwitchReport, SwitchSplit, Timing, report_switch
from lightning_nrl.switch.rule import UNKNOWN, MarginSwitch, margin_over
from lightning_nrl.switch.served import SwitchedModule
from lightning_nrl.switch.threshold import ThresholdChoice, ThresholdPoint, choose_threshold

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
