from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import Gate, RepairReport, TensorSource, repair_module
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization import AllWeights
from lightning_nrl.pipeline import Outcome
from lightning_nrl.pipeline.problem_builder import passed_rows
from lightning_nrl.search import Fitness, WeightStats, search


def timeless(report: RepairReport) -> str:
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    return replace(report, seconds={}, steps=steps).to_json()


def test_the_same_seed_gives_the_same_report_to_the_bit() -> None:
    reports = [repair_module(trained(), known(), quick(seed=3), unseen=unseen()) for _ in range(2)]
    assert timeless(reports[0].report) == timeless(reports[1].report)
    assert torch.equal(reports[0].change, reports[1].change)
    other = repair_module(trained(), known(), quick(seed=4), unseen=unseen())
    assert not torch.equal(other.change, reports[0].change)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_of_the_data_does_not_matter(batch_size: int) -> None:
    expected = repair_module(trained(), known(), quick())
    found = repair_module(trained(), known(batch_size=batch_size), quick())
    for one, other in zip(found.report.splits, expected.report.splits, strict=True):
        assert (one.counts, one.targeted_ids, one.confusion) == (other.counts, other.targeted_ids, other.confusion)
        assert (one.repaired_ids, one.broken_ids) == (other.repaired_ids, other.broken_ids)
    torch.testing.assert_close(found.change, expected.change, rtol=1e-4, atol=1e-6)


def test_the_global_random_state_does_not_matter() -> None:
    expected = repair_module(trained(), known(), quick())
    torch.rand(3)
    assert torch.equal(repair_module(trained(), known(), quick()).change, expected.change)


@dataclass(frozen=True)
class Share:
    """One rank's share of a split."""

    whole: TensorSource
    rank: int
    world_size: int

    @property
    def split(self) -> str:
        return self.whole.split

    @property
    def passed(self) -> bool:
        return self.whole.passed

    @property
    def failed(self) -> bool:
        return self.whole.failed

    @property
    def index(self) -> Tensor:
        return self.whole.index

    @property
    def positions(self) -> Tensor:
        return self.index[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        yield from self.draw(self.positions.split(8))

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for position in batches:
            yield Batch((self.whole.inputs[position],), self.whole.targets[position], position)


def test_all_ranks_end_with_the_outcome_of_one_process() -> None:
    alone = repair_module(trained(), known(), quick(n_passed=50))

    models = [trained(), trained()]

    def run(collective: Any) -> Outcome:
        sources = [Share(source, collective.rank, 2) for source in known()]
        return repair_module(Evaluator(models[collective.rank], collective=collective), sources, quick(n_passed=50))

    deterministic = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with warnings.catch_warnings():
        first, second = on_ranks(2, run)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic
    assert timeless(first.report) == timeless(second.report)
    assert torch.equal(first.change, second.change)
    assert first.report.splits == alone.report.splits
    assert first.report.search.n_passed == alone.report.search.n_passed == 50


def test_all_ranks_go_on_with_the_values_of_the_first() -> None:
    def run(collective: Any) -> Tensor:
        return collective.agreed(torch.tensor([1.0, -2.0]) + 1e-7 * collective.rank)

    assert [values.tolist() for values in on_ranks(3, run)] == [[1.0, -2.0]] * 3


def test_each_weight_is_searched_in_the_range_of_its_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[WeightStats] = []

    def listen(*args: Any, stats: WeightStats, **kwargs: Any) -> Any:
        given.append(stats)
        return search(*args, stats=stats, **kwargs)

    monkeypatch.setattr("lightning_nrl.methods.local_search.search", listen)
    model = trained()
    repair_module(model, known(), quick(layer=["0", "2"], localizer=AllWeights(include_bias=True)))
    parameters = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    expected = torch.cat([p.detach().max().expand(p.numel()) for p in parameters])
    assert torch.equal(torch.as_tensor(given[0].highest), expected)


def test_passed_samples_are_drawn_without_replacement_from_passed_sources() -> None:
    model, sources = trained(), known()
    evidence = collected(model, sources)
    rows = passed_rows(evidence, sources, quick(n_passed=40, seed=1))
    assert int(rows.sum()) == 40
    assert not (rows & ~evidence.passed).any()
    assert not rows[evidence.of("new")].any()
    assert torch.equal(rows, passed_rows(evidence, sources, quick(n_passed=40, seed=1)))
    assert not torch.equal(rows, passed_rows(evidence, sources, quick(n_passed=40, seed=2)))


def test_more_than_there_are_is_all_of_them_and_none_given_is_every_known_one() -> None:
    sources = known()
    evidence = collected(trained(), sources)
    train = evidence.of("train")
    n = int(evidence.passed[train].sum())
    with pytest.warns(DataWarning, match=f"`n_passed=9999`: only {n} samples of train pass"):
        rows = passed_rows(evidence, sources, quick(n_passed=9999))
    assert torch.equal(rows[train], evidence.passed[train])
    assert not rows[evidence.of("new")].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(passed_rows(evidence, sources, quick(n_passed=n)), rows)
    assert torch.equal(passed_rows(evidence, sources, quick()), evidence.passed)


def test_the_gate_counts_known_samples_that_were_not_drawn() -> None:
    model, sources = trained(), known()
    outcome = repair_module(model, sources, quick(n_passed=1, fitness=Fitness("eq1", alpha=0.0), gate=Gate.instance()))
    assert outcome.report.search.n_passed == 1
    assert outcome.report.status == "refused"
    assert sum(split.broken for split in outcome.report.candidate) > 0


def collected(model: nn.Module, sources: Any) -> SampleResults:
    return Evaluator(model.eval()).run(sources)
