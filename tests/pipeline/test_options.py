from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_nrl import BoundOptions, ConfigurationError, Gate, SampleOptions, SearchOptions
from lightning_nrl.evaluation import Focal
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.pipeline.settings import changed_options
from lightning_nrl.search import Fitness


def my_fitness(scores: Any, original: Any) -> Any:
    return scores.patched


def test_texts_and_objects_say_the_same() -> None:
    assert SearchOptions(fitness="eq1") == SearchOptions(fitness=Fitness("eq1"))
    assert SearchOptions(localizer="neurecover-lite") == SearchOptions(localizer=NeuRecoverLite())
    assert BoundOptions(limit="tolerance:1%") == BoundOptions(limit=Gate.tolerance(0.01))
    assert SampleOptions(slices=2, quotas={"night": "50%"}) == SampleOptions(slices=2, quotas={"night": 0.5})


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions("eq2", NeuRecoverLite(n_weights=5), n_passed=7, budget=10**6),
        BoundOptions(limit="tolerance:3", sparse=0.1, confidence=0.9),
        SampleOptions(importance=Focal(3.0), slices="camera", quotas={"night": 5}, protected={"train": [1]}),
    ],
)
def test_they_are_pickled_and_shown_as_they_are(options: Any) -> None:
    again = pickle.loads(pickle.dumps(options))
    assert again == options
    assert repr(again) == repr(options)
    assert " at 0x" not in repr(options)
    with pytest.raises(AttributeError):
        options.seed = 3


def test_what_is_not_as_by_default() -> None:
    assert changed_options(SearchOptions()) == {}
    assert changed_options(SearchOptions("eq1", n_passed=3)) == {"fitness": Fitness("eq1"), "n_passed": 3}
    assert changed_options(BoundOptions(confidence=0.95, sparse=0.0)) == {"sparse": 0.0}
    assert changed_options(SampleOptions(importance=0)) == {"importance": 0}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: SearchOptions(fitness="eq3"), "`fitness='eq3'` is unknown"),
        (lambda: SearchOptions(fitness=3), "`fitness=3` is no Fitness"),
        (lambda: SearchOptions(fitness=Fitness), "is no Fitness"),
        (lambda: SearchOptions(localizer="al"), "`localizer='al'` is unknown"),
        (lambda: SearchOptions(localizer=my_fitness), "is no Localizer"),
        (lambda: SearchOptions(localizer=NeuRecoverLite), "is no Localizer"),
        (lambda: SearchOptions(n_passed=0), "`n_passed=0` is out of range"),
        (lambda: SearchOptions(n_passed=2.5), "`n_passed=2.5` is out of range"),
        (lambda: SearchOptions(n_passed=True), "`n_passed=True` is out of range"),
        (lambda: SearchOptions(budget=0), "`budget=0` is out of range"),
        (lambda: BoundOptions(strength=0), "`strength=0` is no strength"),
        (lambda: BoundOptions(strength=2.1), r"`strength=2\.1` is no strength"),
        (lambda: BoundOptions(strength=math.nan), "`strength=nan` is no strength"),
        (lambda: BoundOptions(strength=True), "`strength=True` is no strength"),
        (lambda: BoundOptions(sparse=1), "`sparse=1` is no share"),
        (lambda: BoundOptions(sparse=-0.1), r"`sparse=-0\.1` is no share"),
        (lambda: BoundOptions(strength=0.5, limit="instance"), r"`strength=0\.5` and `limit='instance'` both"),
        (lambda: BoundOptions(limit="tollerance:1%"), "did you mean 'tolerance'"),
        (lambda: BoundOptions(confidence=1), "`confidence=1`"),
        (lambda: SampleOptions(keep="all"), r"`keep='all'` is unknown"),
    ],
)
def test_a_value_without_a_meaning_is_refused_where_it_is_given(make: Callable[[], Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{found}[\s\S]*HINT: "):
        make()


def test_the_ends_of_each_range_will_do() -> None:
    assert BoundOptions(strength=2).strength == 2
    assert BoundOptions(sparse=0).sparse == 0
    assert SearchOptions(n_passed=1, budget=1).n_passed == 1
