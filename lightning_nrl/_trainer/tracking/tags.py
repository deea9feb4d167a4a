"""The table of tags: every writer takes from here under which tag a logger gets something.

Loggers show the tags with the same part before the first slash as one group. `{name}` is the name
of a repair (`repair`, `repair-step-100`), a release decision or a sweep, or the `prefix` of a
callback. `{number}` is the name of a field or rate in a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lightning_nrl.errors import check_kind

Plain = bool | int | float | str
Value = TypeVar("Value")

# Numbers.
ROLE_NUMBER = "{role}_{number}"  # role: known, unseen, calibration, held_out, refused (weights)
NUMBER_TAG = "{name}/{number}"  # the few numbers for a decision; those of callbacks
PART_TAG = "{name}/{part}/{number}"  # part: a split, a slice, or a split and a slice
CLASS_TAG = "{name}_{split}/{number}/{label}"  # history of a training
FURTHER_TAG = "{name}_numbers/{number}"
DATA_TAG = "{name}_numbers/{split}_data/{number}"
SLICE_TAG = "{name}_numbers/slice_{slice}/{number}"
RUNG_TAG = "{name}_numbers/rung_{rung}/{number}"
LOCALIZATION_TAG = "{name}_numbers/localization/{number}"
SEARCH_TAG = "{name}_search/{number}"  # by iteration
STRENGTH_TAG = "{name}_strength/{number}"  # by strength in percent
WEIGHTS_TAG = "{name}_weights/change"  # a histogram

# Figures, pictures and texts.
SUMMARY_TAG = "{name}/Summary"  # the capital letter sorts the picture before the numbers
WANDB_SUMMARY_TAG = "{name}/summary"
REPORT_TAG = "{name}/report"
FIGURE_TAG = "{name}_figures/{title}"
SAMPLES_TAG = "{name}_samples/{title}"
FLIPPED_TAG = "{name}/flipped_samples"

# Columns of TensorBoard's HParams tab. The tab shows the first five of a kind.
ASKED: Mapping[str, Plain] = {
    "repair/gate": "",
    "repair/layer": "",
    "repair/method": "",
    "repair/target": "",
    "repair/with fitness": "",
    "repair/with task": "",
    "repair/seed": 0.0,
    "repair/with max_time": 0.0,
    "repair/with n_passed": 0.0,
    "repair/with n_weights": 0.0,
}
"""Columns for the settings of a repair, with a value of the right type."""
MEASURED = (
    "repair/accepted",
    "repair/known_repaired_in_target",
    "repair/known_broken",
    "repair/unseen_repaired",
    "repair/unseen_broken",
    "repair/known_repair_rate",
    "repair/known_accuracy",
    "repair/unseen_repair_rate",
    "repair/unseen_nfr",
    "repair/evidence",
    "repair/unseen_accuracy",
    "repair/known_regressions",
    "repair/unseen_regressions",
)
"""Columns for the results of a repair."""
LIGHTNINGS_METRIC = "hp_metric"


def tag(template: str, name: str, title: str = "") -> str:
    """Returns a tag without further fields."""
    return template.format(name=name, title=title)


def tagged(template: str, values: Mapping[str, Value], **fields: object) -> dict[str, Value]:
    """Returns values by tag: fills a template with `fields` and with each value's name."""
    return {template.format(number=name, **fields): value for name, value in values.items()}


def parse_prefix(prefix: str, default: str) -> str:
    """Removes slashes from the end of a prefix, and refuses an empty one with `default` as hint."""
    fits = isinstance(prefix, str) and bool(prefix.strip("/"))
    check_kind("prefix", prefix, fits, "name", f"prefix={default!r}")
    return prefix.rstrip("/")
