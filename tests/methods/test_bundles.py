"""The published methods by name, their parts replaced, and names that other distributions add."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_repairs import blobs, known, trained

from lightning_nrl import RegressionFreeRepair, SearchOptions, Settings, repair_module
from lightning_nrl._utils.registry import Registry
from lightning_nrl.analysis.comparison import compare_module
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.localization import LOCALIZERS, AllWeights, Arachne, ArachneV2, ByGradient, NeuRecover, RandomWeights
from lightning_nrl.methods import BUNDLES, METHODS, LocalSearch, bundle
from lightning_nrl.search import (
    FITNESSES,
    SEARCHERS,
    ArachneDEFitness,
    ArachneFitness,
    DifferentialEvolution,
    Fitness,
    NeuRecoverFitness,
    ParticleSwarm,
)

QUICK = ParticleSwarm(particles=12, iterations=12)


def earlier(steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """The network as a few more steps on shifted data would make it, the oldest first: it gets the failures right."""
    model = copy.deepcopy(trained())
    x, y = blobs(60, 1.5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    states = []
    for _ in range(steps):
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states[::-1]


@pytest.mark.parametrize("name", BUNDLES)
def test_each_is_a_method_with_the_parts_of_its_paper(name: str) -> None:
    method = METHODS.parse("method", name)
    assert isinstance(method, LocalSearch)
    kinds = tuple(type(part) for part in (method.localizer, method.fitness, method.searcher))
    expected = {
        "neurecover": (NeuRecover, NeuRecoverFitness, ParticleSwarm),
        "arachne": (Arachne, ArachneFitness, ParticleSwarm),
        "arachne-de": (ArachneV2, ArachneDEFitness, DifferentialEvolution),
    }
    assert kinds == expected.get(name, kinds)


def test_parts_are_replaced_by_name_or_object() -> None:
    made = bundle("arachne", localizer="random", searcher=QUICK)
    assert made == LocalSearch(QUICK, localizer=RandomWeights(), fitness=ArachneFitness())
    assert LocalSearch("swarm", localizer="all", fitness="eq2") == LocalSearch(
        ParticleSwarm(), localizer=AllWeights(), fitness=Fitness("eq2")
    )
    for wrong in ({"localizer": "arachnid"}, {"fitness": 3}, {"searcher": "swarmed"}):
        with pytest.raises(ConfigurationError):
            bundle("arachne", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="did you mean 'arachne'"):
        bundle("arachnes")


def test_what_the_options_say_goes_before_the_parts_of_the_method() -> None:
    settings = Settings(method="arachne", search=SearchOptions(localizer="gradient"))  # type: ignore[arg-type]
    assert settings.method == bundle("arachne", localizer="gradient")
    assert (settings.localizer, settings.fitness) == (ByGradient(), ArachneFitness())
    assert settings.plain()["localizer"]["class"] == "ByGradient"
    assert Settings(method="neurecover").localizer == NeuRecover()  # type: ignore[arg-type]
    assert Settings().plain()["localizer"]["class"] == "NeuRecoverLite"
    callback = RegressionFreeRepair(method="arachne-de", search=SearchOptions(fitness="lexicographic"))
    assert callback.settings.fitness == Fitness()


@pytest.mark.parametrize("name", BUNDLES)
def test_all_solve_a_shared_problem(name: str) -> None:
    searcher: Any = BUNDLES[name]().searcher
    small = {"population": 30} if isinstance(searcher, DifferentialEvolution) else {"particles": 30}
    method = bundle(name, searcher=replace(searcher, iterations=30, **small))
    if name == "neurecover":
        method = replace(method, localizer=NeuRecover(earlier(), n_weights=12))
    sources = known()
    compared = compare_module(trained(), sources, Settings(layer="2"), methods={name: method})
    (entry,) = compared.entries
    whole = entry.curve[-1]
    assert whole.targeted > 5
    again = compare_module(trained(), sources, Settings(layer="2"), methods={name: method}).entries[0]
    assert again.curve == entry.curve


def test_a_report_says_which_parts_searched() -> None:
    settings = Settings(method=bundle("arachne", searcher=QUICK, fitness="lexicographic"), layer="2")
    report = repair_module(trained(), known(), settings).report
    assert report.settings["method"]["localizer"]["class"] == "Arachne"
    assert report.localization is not None
    assert set(report.localization.sizes) == {"localized", "total"}
    assert "Arachne" in report.to_json()
    assert report.splits[0].broken == 0


OWN = """
from dataclasses import dataclass
from lightning_nrl.localization import RandomWeights
from lightning_nrl.methods import bundle
from lightning_nrl.search import ParticleSwarm

@dataclass(frozen=True)
class Mine(RandomWeights):
    seed: int = 7

class Small(ParticleSwarm):
    pass

def method():
    return bundle("arachne", localizer=Mine())

def fitness():
    return lambda scores, original: scores.patched

nothing = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with entry points, as pip leaves it in site-packages."""
    (tmp_path / "nrl_plugin.py").write_text(OWN)
    info = tmp_path / "nrl_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nrl-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lightning_nrl.methods]\nours = nrl_plugin:method\nauto = nrl_plugin:method\n"
        "[lightning_nrl.localizers]\nmine = nrl_plugin:Mine\nbroken = nrl_plugin:missing\n"
        "no-localizer = nrl_plugin:fitness\n"
        "[lightning_nrl.searchers]\nsmall = nrl_plugin:Small\n"
        "[lightning_nrl.fitnesses]\ncounting = nrl_plugin:fitness\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registries: tuple[Registry[Any], ...] = (METHODS, LOCALIZERS, SEARCHERS, FITNESSES)
    for registry in registries:
        monkeypatch.delitem(registry.__dict__, "_added", raising=False)
    yield tmp_path  # type: ignore[misc]
    for registry in registries:
        registry.__dict__.pop("_added", None)
    sys.modules.pop("nrl_plugin", None)


@pytest.mark.usefixtures("installed")
def test_other_distributions_add_names_by_entry_points() -> None:
    assert {"ours", "small"} <= set(METHODS)
    settings = Settings(method="ours", search=SearchOptions(fitness="counting"))  # type: ignore[arg-type]
    assert isinstance(settings.method, LocalSearch)
    assert type(settings.localizer).__name__ == "Mine"
    assert type(METHODS.parse("method", "small")).__name__ == "Small"
    assert type(METHODS.parse("method", "auto")).__name__ == "Auto"  # the package's own names stay its own
    assert "mine" in LOCALIZERS.forms


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"entry point 'nrl_plugin:missing' of nrl-plugin cannot be loaded \(AttributeError"),
        ("no-localizer", "gave a function, which is no Localizer"),
        ("min", "did you mean 'mine'"),
    ],
)
def test_an_entry_point_that_gives_nothing_of_use_says_whose_it_is(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SearchOptions(localizer=name)


def test_nothing_is_imported_for_names_that_nobody_uses(installed: Path) -> None:
    assert "mine" in LOCALIZERS
    assert "nrl_plugin" not in sys.modules
    assert isinstance(LOCALIZERS._added["mine"], EntryPoint)
