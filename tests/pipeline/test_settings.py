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
    Gate,
    ParticleSwarm,
    SampleOptions,
    SearchOptions,
    Settings,
    Target,
)
from lightning_nrl.localization import AllWeights, Localizer, NeuRecoverLite
from lightning_nrl.pipeline.options import changed_options
from lightning_nrl.search import Fitness, FitnessFunction


class ByHand(Localizer):
    """A localizer that is no dataclass."""

    include_bias = False

    def __init__(self) -> None:
        self.weights = [1, 2]
        self.strength = 0.5
        self._model = torch.nn.Linear(1, 1)

    def __call__(self, recording: Any, evaluator: Any, **rest: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Learned(Localizer):
    """A localizer with fields of all kinds."""

    include_bias: bool = True
    names: frozenset[str] = frozenset({"b", "a"})
    rule: Callable[..., Any] = max
    scale: Any = field(default_factory=lambda: torch.tensor([0.5]))
    inner: ParticleSwarm = field(default_factory=ParticleSwarm)
    limit: float = math.inf

    def __call__(self, recording: Any, evaluator: Any, **rest: Any) -> Any:
        raise NotImplementedError


class MyFitness(FitnessFunction):
    def __call__(self, scores: Any, original: Any) -> Any:
        return scores.patched


@pytest.mark.parametrize(
    ("text", "gate"), [("instance", Gate.instance()), ("tolerance:1%", Gate.tolerance(0.01))]
)
def test_a_gate_may_be_given_as_text(text: str, gate: Gate) -> None:
    assert Settings(gate=text).gate == gate  # type: ignore[arg-type]


def test_settings_are_told_as_plain_values() -> None:
    settings = Settings(
        target=Target.label(3) | Target.confusion(1, 2),
        layer=["a", "b"],
        gate=Gate.tolerance(0.01),
        search=SearchOptions(
            fitness=Fitness("eq2", alpha=8), localizer=NeuRecoverLite(n_weights=32)
        ),
        seed=7,
    )
    plain = settings.plain()
    assert list(plain) == [
        "target", "layer", "gate", "method", "max_time", "seed", "fitness", "localizer", "n_passed", "memory_limit",
        "save_every", "n_scored", "strength", "limit", "sparse", "confidence",
        "importance", "slices", "quotas", "protected", "risk", "set_aside", "keep",
    ]  # fmt: skip
    assert plain["target"] == "label 3 or confusion 1 -> 2"
    assert plain["layer"] == ["a", "b"]
    assert plain["gate"] == "tolerance:0.01"
    assert plain["fitness"]["class"] == "Fitness"
    assert plain["fitness"]["kind"] == "eq2"
    assert plain["fitness"]["alpha"] == 8
    assert plain["localizer"]["n_weights"] == 32
    assert plain["method"]["class"] == "Auto"
    assert plain["method"]["swarm"]["particles"] == 100
    assert plain["seed"] == 7


@pytest.mark.parametrize("localizer", [NeuRecoverLite(), AllWeights(), ByHand(), Learned()])
@pytest.mark.parametrize("fitness", [Fitness("eq1"), MyFitness()])
def test_plain_values_are_json_and_the_same_for_equal_settings(
    localizer: Any, fitness: Any
) -> None:
    plain = Settings(search=SearchOptions(localizer=localizer, fitness=fitness)).plain()
    again = Settings(search=SearchOptions(localizer=type(localizer)(), fitness=fitness)).plain()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(again))
    assert " at 0x" not in json.dumps(plain)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"target": 3}, "`target=3` is no Target"),
        ({"gate": "instanse"}, "`gate='instanse'` is no gate, did you mean 'instance'"),
        ({"gate": 3}, "`gate=3` is no gate"),
        ({"method": "swam"}, "`method='swam'` is unknown"),
        ({"method": ParticleSwarm}, "ParticleSwarm'>` is no method"),
        ({"search": {"n_passed": 5}}, "is no SearchOptions"),
        ({"bounds": SearchOptions()}, "is no BoundOptions"),
        ({"samples": "focal"}, "`samples='focal'` is no SampleOptions"),
        ({"layer": []}, r"`layer=\[\]` names no layer"),
        ({"layer": 3}, "`layer=3` names no layer"),
        ({"seed": -1}, "`seed=-1` is out of range"),
        ({"seed": 2**32}, "`seed=4294967296` is out of range"),
        ({"seed": None}, "`seed=None` is out of range"),
        ({"seed": True}, "`seed=True` is out of range"),
        ({"max_time": 0}, "`max_time=0` is no time"),
        ({"max_time": math.inf}, "`max_time=inf` is no time"),
        ({"max_time": math.nan}, "`max_time=nan` is no time"),
        ({"max_time": True}, "`max_time=True` is no time"),
        ({"max_time": "60"}, "`max_time='60'` is no time"),
    ],
)
def test_a_value_without_a_meaning_is_refused_at_once(
    arguments: dict[str, Any], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT: "):
        Settings(**arguments)


def test_what_is_not_as_by_default() -> None:
    assert changed_options(SearchOptions()) == {}
    assert changed_options(SearchOptions("eq1", n_passed=3)) == {
        "fitness": Fitness("eq1"),
        "n_passed": 3,
    }
    assert changed_options(BoundOptions(confidence=0.95, sparse=0.0)) == {"sparse": 0.0}
    assert changed_options(SampleOptions(importance=0)) == {"importance": 0}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: SearchOptions(fitness="eq3"), "`fitness='eq3'` is unknown"),
        (lambda: SearchOptions(fitness=3), "`fitness=3` is no Fitness"),
        (lambda: SearchOptions(fitness=Fitness), "is no Fitness"),
        (lambda: SearchOptions(localizer="al"), "`localizer='al'` is unknown"),
        (lambda: SearchOptions(localizer=MyFitness()), "is no Localizer"),
        (lambda: SearchOptions(localizer=NeuRecoverLite), "is no Localizer"),
        (lambda: SearchOptions(n_passed=0), "`n_passed=0` is out of range"),
        (lambda: SearchOptions(n_passed=2.5), "`n_passed=2.5` is out of range"),
        (lambda: SearchOptions(n_passed=True), "`n_passed=True` is out of range"),
        (lambda: SearchOptions(memory_limit=0), "`memory_limit=0` is out of range"),
        (lambda: BoundOptions(strength=0), "`strength=0` is no strength"),
        (lambda: BoundOptions(strength=2.1), r"`strength=2\.1` is no strength"),
        (lambda: BoundOptions(strength=math.nan), "`strength=nan` is no strength"),
        (lambda: BoundOptions(strength=True), "`strength=True` is no strength"),
        (lambda: BoundOptions(sparse=1), "`sparse=1` is no share"),
        (lambda: BoundOptions(sparse=-0.1), r"`sparse=-0\.1` is no share"),
        (
            lambda: BoundOptions(strength=0.5, limit="instance"),
            r"`strength=0\.5` and `limit='instance'` both",
        ),
        (lambda: BoundOptions(limit="tollerance:1%"), "did you mean 'tolerance'"),
        (lambda: BoundOptions(confidence=1), "`confidence=1`"),
        (lambda: SampleOptions(keep="all"), r"`keep='all'` is unknown"),
    ],
)
def test_a_value_without_a_meaning_is_refused_where_it_is_given(
    make: Callable[[], Any], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT: "):
        make()
