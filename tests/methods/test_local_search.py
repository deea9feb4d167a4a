"""The paper's method with any searcher: localise, then search from the original weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from toy_problems import make_problem
from toy_repairs import known, trained
from toy_searcher import RandomLocalSearch, Walk

from lightning_nrl import ConfigurationError, ParticleSwarm, SearchOptions, Settings, Target, repair_module
from lightning_nrl._utils.state import snapshot
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights, Localization, NeuRecoverLite
from lightning_nrl.localization.localizer import Replay
from lightning_nrl.methods import LocalSearch
from lightning_nrl.pipeline.presets import paper_arguments
from lightning_nrl.search import RandomStreams, SearchOrigin

SWARM = ParticleSwarm(particles=12, iterations=12)


def settings(method: object, **more: object) -> Settings:
    arguments = {"layer": "2", "search": SearchOptions(localizer=NeuRecoverLite(n_weights=12)), "method": method}
    return Settings(**(arguments | more))  # type: ignore[arg-type]


def test_a_searcher_of_ones_own_is_a_method_of_a_repair() -> None:
    first, again, other = (repair_module(trained(), known(), settings(RandomLocalSearch(), seed=s)) for s in (0, 0, 1))
    report = first.report
    assert report.status == "repaired"
    assert report.splits[0].broken == report.splits[1].broken == 0
    assert report.search is not None
    assert report.search.iterations <= 40
    assert report.settings["method"]["class"] == "RandomLocalSearch"
    assert torch.equal(first.parameters["2.weight"], again.parameters["2.weight"])
    assert not torch.equal(first.parameters["2.weight"], other.parameters["2.weight"])


def test_weights_are_localised_on_the_passed_samples_that_are_scored() -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    @dataclass(frozen=True)
    class Recorder(AllWeights):
        def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
            asked.append((failed, passed))
            return super().__call__(recording, evaluator, failed=failed, passed=passed)

    sources, arguments = known(), paper_arguments("EXP-C1")
    search = replace(arguments["search"], localizer=Recorder(), n_passed=30)
    repair_module(trained(), sources, Settings(**{**arguments, "layer": "2", "search": search, "seed": 3}))
    (failed, passed), before = asked[0], Evaluator(trained().eval()).run(sources, Target.all())
    assert torch.equal(failed, before.targeted)
    # Thirty of those that pass of the training data, none of the repair data.
    assert int(passed.sum()) == int((passed & before.passed)[before.of("train")].sum()) == 30


class Forgetful(RandomLocalSearch):
    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        state = super().init(origin, streams)
        return state._replace(candidates=state.candidates + 1)


def test_a_searcher_that_does_not_score_the_original_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Forgetful\.init does not begin with the original weights"):
        repair_module(trained(), known(), settings(Forgetful()))


def test_nothing_better_is_no_proposal_and_the_model_is_left_alone() -> None:
    own = make_problem(trained(), known(), "2")
    before = snapshot(own.model)
    solution = LocalSearch(ParticleSwarm(particles=2, iterations=0, scale_min=1e-9, scale_max=1e-9))(own)
    assert solution.proposal is None
    assert "nothing better than the original weights" in solution.reason
    assert solution.localization is not None
    assert all(torch.equal(value, before[name]) for name, value in snapshot(own.model).items())


def test_it_ends_when_its_seconds_are_over() -> None:
    solution = LocalSearch(SWARM, seconds=0)(make_problem(trained(), known(), "2"))
    assert solution.result is not None
    assert (solution.result.iterations, solution.result.stopped) == (0, "time was over")
