"""Data for an interpolation: to choose the share by, to estimate statistics of batch norm from; and its numbers."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_nrl._trainer.data_splits import Found, SplitLoaders, find_data
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.reference.interpolation import ShareChoice


def find_calibration(given: str | DataLoader[Any] | None, loaders: SplitLoaders, *, needed: bool) -> Found | None:
    """The calibration data; None where there are none and none are needed to choose a share by."""
    missing = given is None or (isinstance(given, str) and loaders.get(given) in (None, []))
    if missing and not needed:
        return None
    do_without = "a number as `share=` with `calibration=None`" if needed else "None"
    return find_one("calibration", given, loaders, f", or {do_without}")


def find_one(argument: str, given: Any, loaders: SplitLoaders, do_without: str = "") -> Found:
    """The one data loader that is meant, and its name."""
    try:
        return find_data(argument, given, loaders)
    except ConfigurationError as error:
        found = str(error).partition("\nHINT:")[0]
        hint = f"give one DataLoader over a data set with an index as `{argument}=`{do_without}."
        raise ConfigurationError(found, hint) from error


def choice_numbers(choice: ShareChoice) -> dict[str, float]:
    """What is logged of a choice: accuracy and negative flip rate on calibration data, before and after."""
    before, after = choice.curve[0], choice.chosen
    return {
        "share": choice.share,
        "accuracy_before": before.accuracy,
        "accuracy": after.accuracy,
        "nfr_before": before.negative_flip_rate,
        "nfr": after.negative_flip_rate,
    }
