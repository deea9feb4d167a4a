"""Settings and their options: as plain values, and refused where a value has no meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lightning_nrl import (
    BoundOptions,
    ConfigurationError,
    ParticleSwarm,
    SampleOptions,
    SearchOptions,
    Settings,
    Target,
)
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.pipeline.options import changed_options
from lightning_nrl.search import Fitness, FitnessFunction


class ByHand(AllWeights):
    """A localizer that is no dataclass."""

    def __init__(self) -> None:
        self.strength = 0.5
        self._model = torch.nn.Linear(1, 1)

    __repr__ = object.__repr__


@dataclass(frozen=True)
class Learned(AllWeights):
    """A localizer with fields of all kinds."""

    names: frozenset[str] = frozenset({"b", "a"})
    rule: Callable[..., Any] = max
    scale: Any = field(default_factory=lambda: torch.tensor([0.5]))
    inner: ParticleSwarm = field(default_factory=ParticleSwarm)
    limit: float = math.inf


class MyFitness(FitnessFunction):
    def __call__(self, scores: Any, original: Any) -> Any:
        return scores.patched


def test_settings_are_told_as_plain_values():
    search = SearchOptions(Fitness("eq2", alpha=8), NeuRecoverLite(n_weights=32))
    target = Target.label(3) | Target.confusion(1, 2)
    plain = Settings(target, layer=["a", "b"], gate="tolerance:1%", search=search).plain()
    assert list(plain) == [
        "target", "layer", "gate", "method", "max_time", "seed", "fitness", "localizer",
        "n_passed", "memory_limit", "save_every", "n_scored",
        "strength", "limit", "sparse", "confidence",
        "importance", "slices", "quotas", "protected", "risk", "set_aside", "groups", "keep",
        "sample_id",
    ]  # fmt: skip
    assert plain["target"] == "label 3 or confusion 1 -> 2"
    assert plain["layer"] == ["a", "b"]
    assert plain["gate"] == "tolerance:1%"
    assert plain["fitness"]["alpha"] == 8
    assert plain["localizer"]["n_weights"] == 32
    assert plain["method"]["swarm"]["particles"] == 100


@pytest.mark.parametrize("localizer", [NeuRecoverLite, ByHand, Learned])
def test_equal_settings_have_equal_json(localizer):
    first, second = (
        json.dumps(Settings(search=SearchOptions(MyFitness(), localizer())).plain())
        for _ in range(2)
    )
    assert first == second
    assert " at 0x" not in first


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"target": 3}, "`target=3` is no Target"),
        ({"gate": "instanse"}, "`gate='instanse'` is no gate, did you mean 'instance'"),
        ({"gate": 3}, "`gate=3` is no gate"),
        ({"method": "swam"}, "`method='swam'` is unknown"),
        ({"method": ParticleSwarm}, "ParticleSwarm'>` is no method"),
        ({"search": {"n_passed": 5}}, "is no SearchOptions"),
        ({"layer": []}, r"`layer=\[\]` names no layer"),
        ({"layer": 3}, "`layer=3` names no layer"),
        ({"seed": 2**32}, "`seed=4294967296` is out of range"),
        ({"seed": -1}, "`seed=-1` is out of range"),
        ({"seed": True}, "`seed=True` is out of range"),
        ({"max_time": 0}, "`max_time=0` is no time"),
        ({"max_time": math.nan}, "`max_time=nan` is no time"),
        ({"max_time": "60"}, "`max_time='60'` is no time"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(arguments, problem):
    with pytest.raises(ConfigurationError, match=rf"{problem}[\s\S]*HINT: "):
        Settings(**arguments)


def test_options_that_differ_from_the_defaults():
    assert changed_options(SearchOptions()) == {}
    assert changed_options(SearchOptions("eq1", n_passed=3)) == {
        "fitness": Fitness("eq1"),
        "n_passed": 3,
    }
    assert changed_options(BoundOptions(confidence=0.95, sparse=0.0)) == {"sparse": 0.0}
    assert changed_options(SampleOptions(importance=0)) == {"importance": 0}


@pytest.mark.parametrize(
    ("options", "arguments", "problem"),
    [
        (SearchOptions, {"fitness": "eq3"}, "`fitness='eq3'` is unknown"),
        (SearchOptions, {"fitness": Fitness}, "is no Fitness"),
        (SearchOptions, {"localizer": "al"}, "`localizer='al'` is unknown"),
        (SearchOptions, {"localizer": MyFitness()}, "is no Localizer"),
        (SearchOptions, {"n_passed": 2.5}, "`n_passed=2.5` is out of range"),
        (SearchOptions, {"memory_limit": 0}, "`memory_limit=0` is out of range"),
        (BoundOptions, {"strength": 2.1}, r"`strength=2\.1` is no strength"),
        (BoundOptions, {"strength": True}, "`strength=True` is no strength"),
        (BoundOptions, {"sparse": 1}, "`sparse=1` is no share"),
        (BoundOptions, {"strength": 0.5, "limit": "instance"}, "and `limit='instance'` both"),
        (BoundOptions, {"limit": "tollerance:1%"}, "did you mean 'tolerance'"),
        (BoundOptions, {"confidence": 1}, "`confidence=1`"),
        (SampleOptions, {"keep": "all"}, r"`keep='all'` is unknown"),
    ],
)
def test_a_wrong_option_is_refused_at_once(options, arguments, problem):
    with pytest.raises(ConfigurationError, match=rf"{problem}[\s\S]*HINT: "):
        options(**arguments)
