"""Risk levels of confusions: how bad it is to take one class for another (Athena, DRWeightMerge)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.checks import is_class
from lightning_nrl.errors import ConfigurationError, check_whole
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["RiskTable"]

PAIR = re.compile(r"\s*(\d+)\s*->\s*(\d+)\s*")


@dataclass(frozen=True)
class RiskTable:
    """Levels by (true, predicted) pair and by true class; a pair goes before its class, all others have 1."""

    pairs: Mapping[tuple[int, int], int]
    classes: Mapping[int, int]

    @classmethod
    def parse(cls, risk: Any) -> RiskTable:
        """From a mapping with keys such as `3`, `"3"`, `(3, 5)` and `"3 -> 5"`.

        Raises:
            ConfigurationError: it is no mapping, a key is neither, or a level is no whole number from 1.
        """
        if not isinstance(risk, Mapping):
            raise ConfigurationError(f"`risk={risk!r}` is no mapping.", "write `risk={(3, 5): 4, 7: 2}`.")
        pairs: dict[tuple[int, int], int] = {}
        classes: dict[int, int] = {}
        for key, level in risk.items():
            check_whole(f"risk[{key!r}]", level, 1)
            match = PAIR.fullmatch(key) if isinstance(key, str) else None
            number = int(key) if isinstance(key, str) and key.strip().isdecimal() else key
            pair = (int(match[1]), int(match[2])) if match else key
            if isinstance(pair, tuple) and len(pair) == 2 and all(map(is_class, pair)) and pair[0] != pair[1]:
                pairs[pair[0], pair[1]] = level
            elif is_class(number):
                classes[number] = level
            else:
                raise ConfigurationError(
                    f"`risk` has the key {key!r}.",
                    "give a true class, or the pair of a true class and another one that it is taken for: "
                    "`risk={7: 2, (3, 5): 4}`, in YAML `'3 -> 5': 4`.",
                )
        return cls(pairs, classes)

    def of(self, label: Tensor, prediction: Tensor) -> Tensor:
        """The level of each confusion, `N` float64."""
        level = torch.ones(len(label), dtype=torch.float64)
        for true, own in self.classes.items():
            level[label == true] = own
        for (true, predicted), own in self.pairs.items():
            level[(label == true) & (prediction == predicted)] = own
        return level

    def worst(self, label: Tensor) -> Tensor:
        """The highest level that a sample of each class can come to, `N` float64."""
        level = torch.ones(len(label), dtype=torch.float64)
        for true in {*self.classes, *(true for true, _ in self.pairs)}:
            own = [level for (other, _), level in self.pairs.items() if other == true]
            level[label == true] = max(self.classes.get(true, 1), *own, 1)
        return level

    def weigh(self, results: SampleResults) -> tuple[Tensor, Tensor]:
        """What repairs are worth and what breaking costs, `N` float64 each.

        Raises:
            ConfigurationError: the task has no classes.
        """
        if bool((results.label < 0).all()):
            raise ConfigurationError(
                "`risk` is for confusions of classes, and the task has none.", "use `importance` and `protected`."
            )
        return self.of(results.label, results.prediction), self.worst(results.label)
