"""Searches of localised weights: the published methods, other parts, and very many samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_problems import Deadline, StageTimer, make_problem, snapshot
from toy_repairs import QUICK as TOY
from toy_repairs import known, trained
from toy_searcher import RandomLocalSearch, Walk

from lightning_nrl import (
    ConfigurationError,
    ParticleSwarm,
    RegressionFreeRepair,
    SearchOptions,
    Settings,
    Target,
    repair_module,
)
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization import (
    LOCALIZERS,
    AllWeights,
    ByGradient,
    Localization,
    NeuRecoverLite,
    RandomWeights,
)
from lightning_nrl.localization.localizer import Replay
from lightning_nrl.methods import (
    METHODS,
    Auto,
    Convex,
    LocalSearch,
    Problem,
    Solution,
)
from lightning_nrl.methods.budget import FEWEST_SAMPLES
from lightning_nrl.methods.local_search import constrained_search
from lightning_nrl.methods.search_samples import choose_samples, n_to_score, preparation_seconds
from lightning_nrl.published import (
    ArachneFitness,
    NeuRecover,
    bundle,
)
from lightning_nrl.search import FITNESSES, SEARCHERS, Fitness, RandomStream, SearchOrigin
from lightning_nrl.study import paper_arguments

QUICK = ParticleSwarm(particles=12, iterations=12)


def test_parts_are_replaced_by_name_or_object():
    method = bundle("arachne", localizer="random", searcher=QUICK)
    assert method == LocalSearch(QUICK, localizer=RandomWeights(), fitness=ArachneFitness())
    assert LocalSearch("swarm", localizer="all", fitness="eq2") == LocalSearch(
        ParticleSwarm(), localizer=AllWeights(), fitness=Fitness("eq2")
    )
    for wrong in ({"localizer": "arachnid"}, {"fitness": 3}, {"searcher": "swarmed"}):
        with pytest.raises(ConfigurationError):
            bundle("arachne", **wrong)
    with pytest.raises(ConfigurationError, match="did you mean 'arachne'"):
        bundle("arachnes")


def test_what_the_options_say_goes_before_the_parts_of_the_method():
    search = SearchOptions(localizer="gradient")
    settings = Settings(method="arachne", search=search)
    assert settings.method == bundle("arachne", localizer="gradient")
    assert (settings.localizer, settings.fitness) == (ByGradient(), ArachneFitness())
    assert settings.plain()["localizer"]["class"] == "ByGradient"
    assert Settings(method="neurecover").localizer == NeuRecover()
    assert Settings().plain()["localizer"]["class"] == "NeuRecoverLite"
    callback = RegressionFreeRepair(
        method="arachne-de", search=SearchOptions(fitness="lexicographic")
    )
    assert callback.settings.fitness == Fitness()


OWN = """
from dataclasses import dataclass
from lightning_nrl.localization import RandomWeights
from lightning_nrl.published import bundle
from lightning_nrl.search import FitnessFunction, ParticleSwarm

@dataclass(frozen=True)
class Mine(RandomWeights):
    seed: int = 7

class Small(ParticleSwarm):
    pass

def method():
    return bundle("arachne", localizer=Mine())

class Counting(FitnessFunction):
    def __call__(self, scores, original):
        return scores.patched

nothing = 3
"""


def look_again_for_entry_points() -> None:
    registries = (METHODS, LOCALIZERS, SEARCHERS, FITNESSES)
    for registry in registries:
        vars(registry).pop("_added", None)


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
        "no-localizer = nrl_plugin:method\n"
        "[lightning_nrl.searchers]\nsmall = nrl_plugin:Small\n"
        "[lightning_nrl.fitnesses]\ncounting = nrl_plugin:Counting\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    look_again_for_entry_points()
    yield tmp_path
    look_again_for_entry_points()
    sys.modules.pop("nrl_plugin", None)


@pytest.mark.usefixtures("installed")
def test_other_distributions_add_names_by_entry_points():
    assert {"ours", "small"} <= set(METHODS)
    search = SearchOptions(fitness="counting")
    settings = Settings(method="ours", search=search)
    assert isinstance(settings.method, LocalSearch)
    assert type(settings.localizer).__name__ == "Mine"
    assert type(METHODS.parse("method", "small")).__name__ == "Small"
    assert (
        type(METHODS.parse("method", "auto")).__name__ == "Auto"
    )  # the package's own names stay its own
    assert "mine" in LOCALIZERS.forms


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"'nrl_plugin:missing' of nrl-plugin cannot be loaded \(AttributeError"),
        ("no-localizer", "gave a LocalSearch, which is no Localizer"),
        ("min", "did you mean 'mine'"),
    ],
)
def test_an_entry_point_that_gives_nothing_of_use_says_whose_it_is(name, message):
    with pytest.raises(ConfigurationError, match=message):
        SearchOptions(localizer=name)


def settings_of(method: object, **more: object) -> Settings:
    arguments = {
        "layer": "2",
        "search": SearchOptions(localizer=NeuRecoverLite(n_weights=12)),
        "method": method,
    }
    return Settings(**(arguments | more))


def test_a_searcher_of_ones_own_is_a_method_of_a_repair():
    first, again, other = (
        repair_module(trained(), known(), settings_of(RandomLocalSearch(), seed=s))
        for s in (0, 0, 1)
    )
    report = first.report
    assert report.status == "repaired"
    assert report.splits[0].broken == report.splits[1].broken == 0
    assert report.search.iterations <= 40
    assert report.settings["method"]["class"] == "RandomLocalSearch"
    assert torch.equal(first.parameters["2.weight"], again.parameters["2.weight"])
    assert not torch.equal(first.parameters["2.weight"], other.parameters["2.weight"])


def test_weights_are_localised_on_the_passed_samples_that_are_scored():
    asked = []

    @dataclass(frozen=True)
    class Recorder(AllWeights):
        def __call__(
            self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
        ) -> Localization:
            asked.append((failed, passed))
            return super().__call__(recording, evaluator, failed=failed, passed=passed)

    sources, arguments = known(), paper_arguments("EXP-C1")
    search = replace(arguments["search"], localizer=Recorder(), n_passed=30)
    repair_module(
        trained(), sources, Settings(**{**arguments, "layer": "2", "search": search, "seed": 3})
    )
    (failed, passed), before = asked[0], Evaluator(trained().eval()).run(sources, Target.all())
    assert torch.equal(failed, before.targeted)
    # Thirty of those that pass of the training data, none of the repair data.
    assert int(passed.sum()) == int((passed & before.passed)[before.of("train")].sum()) == 30


class Forgetful(RandomLocalSearch):
    def init(self, origin: SearchOrigin, random: RandomStream) -> Walk:
        state = super().init(origin, random)
        return state._replace(candidates=state.candidates + 1)


def test_a_searcher_that_does_not_score_the_original_weights_is_refused():
    with pytest.raises(
        ConfigurationError, match=r"Forgetful\.init does not begin with the original weights"
    ):
        repair_module(trained(), known(), settings_of(Forgetful()))


def test_nothing_better_is_no_proposal_and_the_model_is_left_alone():
    problem = make_problem(trained(), known(), "2")
    before = snapshot(problem.model)
    solution = LocalSearch(
        ParticleSwarm(particles=2, iterations=0, scale_min=1e-9, scale_max=1e-9)
    )(problem)
    assert solution.proposal is None
    assert "nothing better than the original weights" in solution.reason
    assert solution.localization is not None
    assert all(torch.equal(value, before[name]) for name, value in snapshot(problem.model).items())


def few_weights() -> Problem:
    return replace(make_problem(trained(), known(), "2"), localizer=NeuRecoverLite(n_weights=12))


def total(solution: Solution) -> tuple[int, int]:
    return solution.proposal.broken, solution.proposal.repaired


def test_every_known_passed_sample_counts_however_few_were_drawn():
    problem = few_weights()
    drawn = torch.zeros_like(problem.passed)
    drawn[problem.passed.nonzero()[:2]] = True
    few = replace(problem, passed=drawn)
    of_few = LocalSearch(QUICK)(few).proposal
    assert of_few.broken > 0
    solution = constrained_search(few, QUICK, Deadline())
    assert total(solution)[0] == 0
    assert solution.search.n_passed == int(problem.before.passed.sum())


def test_passed_samples_keep_half_of_their_margin_or_what_is_enough():
    problem = few_weights()
    searcher = ParticleSwarm(particles=20, iterations=40)
    solution = constrained_search(problem, searcher, Deadline())
    assert solution.proposal.repaired > 0
    passed = problem.before.passed
    margin = problem.before.margin[passed]
    least = (margin / 2).clamp(max=0.04 * float(margin.median()))
    assert (solution.proposal.after.margin[passed] >= least - 1e-5).all()


def results(margin: list[float]) -> SampleResults:
    """Samples with these margins; those below 0 are targets."""
    m = torch.tensor(margin)
    index = torch.arange(len(m))
    return SampleResults(("a",), (len(m),), index, index * 0, index * 0, -m, m > 0, m < 0, m)


def test_of_many_those_nearest_to_the_border_are_taken_and_a_draw_of_the_others():
    before = results([0.1, -5.0, 9.0, -0.5, 8.0, 0.2, 7.0, 6.0, -0.1, 5.0])
    choices = [choose_samples(before, before.passed, 6, seed) for seed in range(9)]
    for choice in choices:
        # Half of them may be targets: all three. Of the passed ones the nearest two, and one drawn
        # of the others.
        assert choice.recorded[[1, 3, 8, 0, 5]].all()
        assert int(choice.recorded.sum()) == 6
        assert int(choice.representative.sum()) == 1
        assert (choice.recorded & before.passed)[choice.representative].all()
        assert not choice.representative[[0, 5]].any()
        assert choice.note == "on 6 of 10 samples"
    assert len({int(choice.representative.int().argmax()) for choice in choices}) > 1
    fewer = choose_samples(before, before.passed, 4, 0)
    assert fewer.recorded[before.targeted].tolist() == [False, True, True]
    assert int(fewer.recorded.sum()) == 4


def timed(max_time: float | None, one_pass: float, **changes: object) -> Problem:
    """A problem of which a pass is said to have taken so long."""
    problem = make_problem(trained(), known(), "2", clock=StageTimer(max_time=max_time))
    problem.clock.seconds["collect"] = one_pass
    return replace(problem, **changes)


def test_the_number_of_samples_depends_on_the_clock_only_where_time_is_short():
    many = results([1.0] * 1_000_000)
    for problem in (timed(None, 99.0, before=many), timed(1e6, 1.0, before=many), timed(30.0, 3.0)):
        assert n_to_score(problem, problem.deadline_of_method()) == 100_000
    # Half of what is left of 100 s when a pass has been kept, at 3 passes of 1 us and 30 us each.
    problem = timed(100.0, 1.0, before=many, n_scored=2_000_000)
    assert 0.9 * 49.5 / 33e-6 < n_to_score(problem, problem.deadline_of_method()) < 49.5 / 33e-6
    assert preparation_seconds(problem, 2_000_000) == pytest.approx(33.0)
    late = timed(2.0, 1.6, before=many)
    assert n_to_score(late, late.deadline_of_method()) == FEWEST_SAMPLES


@pytest.mark.parametrize("method", [LocalSearch(QUICK), Convex(), Auto(QUICK)])
def test_what_no_time_is_left_for_is_not_begun(method):
    problem = timed(60.0, 19.9)
    solution = method(problem)
    assert "no time" in solution.reason.lower()
    assert not set(problem.clock.seconds) & {"localize", "search", "record", "solve", "fit"}


@pytest.mark.parametrize("method", [Auto(QUICK), QUICK])
def test_a_search_on_some_samples_is_judged_on_all(method):
    search = replace(TOY["search"], n_scored=60)
    report = repair_module(
        trained(), known(), Settings(layer="2", method=method, search=search)
    ).report
    assert report.status == "repaired"
    assert report.search.n_passed is not None
    assert report.search.n_passed < 60
    assert any("on 60 of 1" in step.note for step in report.steps)
    assert sum(split.counts.n for split in report.splits) == 180
    assert [split.broken for split in report.splits] == [0, 0]
