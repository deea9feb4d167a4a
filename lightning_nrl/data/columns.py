"""Columns of a batch: further values per sample, such as slices and sample weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.batch import Batch, RawBatch
from lightning_nrl.data.targets import Classes, Target, target_in
from lightning_nrl.errors import ConfigurationError, first_line

Column = Callable[[RawBatch], object] | Target
"""Function from a raw batch to one value per sample, or a target, which gives a bool per sample."""


@dataclass(frozen=True)
class Field:
    """Column of a batch, found by key in a mapping or by position in a sequence.

    Example:
        >>> Field(2)(([0.1, 0.2], [3, 5], ["day", "night"]))
        ['day', 'night']
    """

    name: str | int

    @property
    def __name__(self) -> str:
        """Name of the column in reports, such as `column 2`."""
        if isinstance(self.name, str):
            return self.name
        return f"column {self.name}"

    def __call__(self, raw: RawBatch) -> object:
        columns = "no columns"
        if isinstance(raw, Mapping):
            if self.name in raw:
                return raw[self.name]
            columns = f"the keys {sorted(map(str, raw))}"
        elif isinstance(raw, (list, tuple)):
            if isinstance(self.name, int) and -len(raw) <= self.name < len(raw):
                return raw[self.name]
            columns = f"{len(raw)} columns, which are counted from 0"
        raise LookupError(
            f"a batch has no column {self.name!r}; it is a {type(raw).__name__} with {columns}"
        )


def find_column(argument: str, value: object) -> Column:
    """Parses a column. `argument` is the name of the argument in errors.

    Accepts a key (`"camera"`) or position (`2`) in the batch, a function of the batch or its
    address (`package.module:function`), and a target, also as text (`"label 3"`). Other text with a
    colon or dot is an address.
    """
    if isinstance(value, Target):
        return value
    if isinstance(value, str):
        target = target_in(value)
        if target is not None:
            return target
        if ":" in value or "." in value:
            return import_function(argument, value)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return Field(value)
    if callable(value) and not isinstance(value, type):
        return value
    raise ConfigurationError(
        f"`{argument}`: a value of type {type(value).__name__} is not a column of a batch.",
        "give a key or a position in the batch, a function of the batch, its address, or a Target.",
    )


def column_values(argument: str, column: Column, batch: Batch, label: Classes) -> object:
    """Returns a column's values for a batch, unchecked.

    Columns that are targets need the true classes, `label`.
    """
    try:
        if isinstance(column, Target):
            return column.select(batch, label, None)
        return column(batch.raw)
    except Exception as error:
        raise ConfigurationError(
            f"`{argument}` raised {type(error).__name__}: {first_line(error)}",
            "a function gets the batch as the data loader returns it; a target cannot use "
            "predictions (no confusions).",
        ) from error


def numbers(argument: str, column: Column, batch: Batch, label: Classes) -> Tensor:
    """Evaluates a column on `n` samples as `n` float64 on the CPU. Bools become 1 and 0."""
    values = column_values(argument, column, batch, label)
    return check_per_sample(f"`{argument}`", values, len(batch)).cpu().double()
