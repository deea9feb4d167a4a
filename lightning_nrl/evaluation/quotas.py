"""How many failures of a slice have to be repaired: quotas, what is still missing of them, and weights that help."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults

Quota = int | float | str
"""At least so many targets of a slice, or such a share of them: `5`, `0.5` or `"50%"`."""


def checked_quotas(quotas: Any) -> dict[str, int | float]:
    """The quotas by slice: whole numbers from 1, or shares above 0 and at most 1."""
    hint = "write `quotas={'night': 5, 'truck': 0.5}`: a whole number of targets from 1, or a share of them."
    if not isinstance(quotas, Mapping):
        raise ConfigurationError(f"`quotas`: found a {type(quotas).__name__}, not a mapping.", hint)
    found: dict[str, int | float] = {}
    for name, quota in quotas.items():
        given = read_number(f"`quotas[{name!r}]`", quota.strip(), hint) if isinstance(quota, str) else quota
        number = count_or_share(given)
        if not number:
            raise ConfigurationError(f"`quotas`: {quota!r} for {name!r} is no quota.", hint)
        found[str(name)] = number
    return found


def needed(before: SampleResults, quotas: Mapping[str, Quota]) -> tuple[dict[str, int], str]:
    """How many targets of each slice are to be repaired, and in words why that cannot be; empty if it can."""
    found: dict[str, int] = {}
    for name, quota in checked_quotas(quotas).items():
        if name not in before.names:
            return {}, f"`quotas` names the slice {name!r}; there are {', '.join(before.names) or 'none'}."
        n = int((before.targeted & _inside(before, name)).sum())
        # As a decimal fraction: in binary, 70 % of 10 would be more than 7.
        found[name] = quota if isinstance(quota, int) else math.ceil(Fraction(repr(quota)) * n)
        if found[name] > n:
            return {}, f"`quotas` asks for {found[name]:,} repairs in the slice {name!r}, which has {n:,} targets."
        if n == 0:
            return {}, f"`quotas` asks for repairs in the slice {name!r}, which has no target."
    return found, ""


def below(before: SampleResults, repaired: Tensor, needed: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Slices that lack repairs: how many targets of each pass now (`repaired`, `N` bool), and how many ought to."""
    got = {name: int((before.targeted & repaired & _inside(before, name)).sum()) for name in needed}
    return {name: (got[name], need) for name, need in needed.items() if got[name] < need}


def raised(before: SampleResults, names: Collection[str], factor: float) -> SampleResults:
    """The results with the targets of some slices weighing so much more, all of them again 1 on average."""
    inside = torch.zeros_like(before.targeted)
    for name in names:
        inside |= _inside(before, name)
    weight = torch.where(before.targeted & inside, factor * before.weight, before.weight)
    return normalised(replace(before, weight=weight))


def normalised(before: SampleResults) -> SampleResults:
    """The results with weights of targets that are 1 on average, and of other failures 1."""
    targeted = before.targeted
    mean = before.weight[targeted].mean() if targeted.any() else 1.0
    weight = torch.where(targeted, before.weight / mean, torch.where(before.passed, before.weight, 1.0))
    return replace(before, weight=weight)


def _inside(before: SampleResults, name: str) -> Tensor:
    return before.group == before.names.index(name)
