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
    return torch.as_tensor(array) if array.dtype.kind in "biuf" else value


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
    if kind == "number":
        return not value.is_complex()
    if kind == "bool":
        return value.dtype == torch.bool
    is_whole = (
        not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    )
    return is_whole and not bool((value < 0).any())


def described(value: object) -> str:
    """Returns dtype and shape of a tensor or an array, or type and length of another value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    name = type(value).__name__
    return f"{name} of length {len(value)}" if isinstance(value, Sized) else name


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
    if isinstance(value, Integral):
        return int(value) if int(value) >= 0 else None
    return float(value) if isinstance(value, Real) and 0 <= float(value) <= 1 else None


def read_number(where: str, text: str, hint: str) -> int | float:
    """Parses a whole number, a decimal number or a percentage: `5`, `0.5` or `50%` (0.5)."""
    try:
        if text.endswith("%"):
            return float(Fraction(text[:-1].strip()) / 100)
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {text!r} is no number.", hint) from error
