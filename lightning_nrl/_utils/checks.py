"""Checks of user input."""

from __future__ import annotations

import operator
from collections.abc import Sized
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError

T = TypeVar("T")
Kind = Literal["bool", "number", "whole number from 0"]


def as_tensor(value: T) -> T | Tensor:
    """Converts an array or a list of numbers or bools to a tensor; returns other values as is."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return value  # ragged lists, or tensors on a GPU or with gradients
    if array.shape == (0,) and isinstance(value, (list, tuple)):
        return torch.zeros(0, dtype=torch.bool)
    if array.dtype.kind not in "biuf":
        return value
    return torch.as_tensor(array)


def check_per_sample(
    source: str,
    value: object,
    n: int,
    kind: Kind = "number",
    error: type[ConfigurationError] = ConfigurationError,
    *,
    tensors_only: bool = False,
) -> Tensor:
    """Returns `value` as a tensor with one entry per sample, `n`; refuses other shapes and kinds.

    A shape such as `n x 1` would be broadcast silently. Bools count as numbers. `source` names, in
    the message, the function that returned the value.
    """
    tensor = value if tensors_only else as_tensor(value)
    if isinstance(tensor, Tensor) and tensor.shape == (n,) and _is_kind(tensor, kind):
        return tensor
    raise error(
        f"{source} returned {described(value)} for a batch of {n} samples.",
        f"return one {kind} per sample, in the shape [{n}].",
    )


def _is_kind(value: Tensor, kind: Kind) -> bool:
    is_bool = value.dtype == torch.bool
    if kind == "bool":
        return is_bool
    if kind == "number":
        return True
    return not (is_bool or value.is_floating_point() or (value < 0).any())


def described(value: object) -> str:
    """Returns dtype and shape of a tensor or an array, or type and length of another value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    text = type(value).__name__
    if isinstance(value, Sized):
        text += f" of length {len(value)}"
    return text


def is_class(value: Any) -> bool:
    """True if `value` is a whole number from 0 and no bool."""
    try:
        return not isinstance(value, (bool, np.bool_)) and operator.index(value) >= 0
    except TypeError:
        return False


def check_class(argument: str, value: Any) -> int:
    if not is_class(value):
        raise ConfigurationError(
            f"`{argument}={value!r}` is no class.", "give a class as a whole number from 0."
        )
    return operator.index(value)


def count_or_share(value: object) -> int | float | None:
    """Returns a whole number from 0 as int, a share in [0, 1] as float, None for another value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral) and int(value) >= 0:
        return int(value)
    if isinstance(value, Real) and 0 <= float(value) <= 1:
        return float(value)
    return None


def read_number(where: str, text: str, hint: str) -> int | float:
    """Parses a whole number, a decimal number or a percentage: `5`, `0.5` or `50%` (0.5).

    Refuses a decimal number such as `1.0`, which may mean the number 1 or the share 100 %.
    """
    try:
        if text.endswith("%"):
            return float(Fraction(text[:-1].strip()) / 100)
        if text.lstrip("+-").isdigit():
            return int(text)
        decimal = float(text)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {text!r} is no number.", hint) from error
    if decimal.is_integer():
        raise ConfigurationError(
            f"{where}: {text!r} may be a number or a share.",
            f"write {decimal:.0f} for the number, {decimal:.0%} for the share.",
        )
    return decimal
