"""Held-out data: a target that cannot be asked there is a warning; samples that are known too are
refused or named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ranks import Collective, on_ranks
from toy_repairs import blobs, known, mlp, quick, trained, unseen

from lightning_nrl import ConfigurationError, Target, TensorSource, repair_module
from lightning_nrl.data import Batch
from lightning_nrl.errors import DataWarning, EvaluationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.pipeline.baseline import LeakCheck, evaluate_other_data


@dataclass(frozen=True)
class Torn(TensorSource):
    """Cannot be read."""

    def __iter__(self) -> Iterator[Batch]:
        raise OSError("a file is torn")


def test_unseen_data_that_one_rank_cannot_read_stop_every_rank():
    def run(collective: Collective) -> str:
        later = [(Torn if collective.rank else TensorSource)(*blobs(8), split="later")]
        with pytest.raises((OSError, EvaluationError)) as error:
            evaluate_other_data(Evaluator(mlp(), collective=collective), later, quick())
        return str(error.value)

    other, torn = on_ranks(2, run)
    assert other.startswith(
        "`later` data could not be read on another rank. OSError: a file is torn"
    )
    assert torn == "a file is torn"


def missing(batch: Any) -> Any:
    raise KeyError("camera")


@pytest.mark.parametrize("where", [missing, lambda batch: None])
def test_a_target_that_cannot_be_asked_is_a_warning(where):
    later = TensorSource(*blobs(8), split="later")
    settings = quick(target=Target.where(where))
    with pytest.warns(DataWarning, match="not counted on held-out data: `target`: the pred"):
        results = evaluate_other_data(Evaluator(mlp()), [later], settings)
    assert len(results) == 8
    assert not results.targeted.any()


def test_a_target_that_one_rank_cannot_ask_is_left_out_on_all():
    def run(collective: Collective) -> int:
        target = Target.where(
            missing
            if collective.rank
            else lambda batch: torch.ones(len(batch[0]), dtype=torch.bool)
        )
        later = Half(*blobs(8), split="later", extras=(torch.full((8,), collective.rank),))
        results = evaluate_other_data(
            Evaluator(mlp(), collective=collective), [later], quick(target=target)
        )
        return int(results.targeted.sum())

    with pytest.warns(DataWarning):
        assert on_ranks(2, run) == [0, 0]


class Half(TensorSource):
    """One rank's half of the samples; `extras` says of which rank."""

    def __iter__(self) -> Iterator[Batch]:
        return self.draw([self.index[int(self.extras[0][0]) :: 2]])


def test_whatever_else_is_wrong_is_no_warning():
    x, y = blobs(8)
    negative = TensorSource(x, y - 3, split="later")
    with pytest.raises(EvaluationError, match="have labels below 0"):
        evaluate_other_data(Evaluator(mlp()), [negative], quick())
    lacking = TensorSource(x, y, split="later")
    with pytest.raises(ConfigurationError, match=r"`protected`.*no column 5"):
        evaluate_other_data(Evaluator(mlp()), [lacking], quick(protected=5))


def calibration() -> list[TensorSource]:
    return [TensorSource(*blobs(60, 1.5, 9), split="calibration")]


def leaking(own: TensorSource, other: TensorSource, rows: list[int]) -> TensorSource:
    """A source with some samples of another one, in a new data set."""
    inputs = torch.cat([own.inputs, other.inputs[rows]])
    return replace(own, inputs=inputs, targets=torch.cat([own.targets, other.targets[rows]]))


def test_calibration_data_that_are_known_too_are_refused():
    (data,) = calibration()
    n = len(data)
    message = rf"2 of the {n + 2} samples of `{data.split}` are known data too \(\[{n}, {n + 1}\]"
    with pytest.raises(ConfigurationError, match=message):
        repair_module(trained(), known(), quick(), calibration=[leaking(data, known()[0], [3, 5])])


def test_unseen_data_that_are_known_too_are_a_warning_and_are_named_in_the_report():
    (data,) = unseen()
    sources = [leaking(leaking(data, known()[1], [0, 1]), calibration()[0], [5])]
    message = rf"`unseen`: 3 of the {len(data) + 3} samples of `{data.split}` are known"
    with pytest.warns(DataWarning, match=message):
        outcome = repair_module(
            trained(), known(), quick(), unseen=sources, calibration=calibration()
        )
    assert outcome.report.leaked == {data.split: 3}
    assert f"leak into {data.split}" in outcome.report.to_markdown()


def test_known_samples_count_for_nothing_in_unseen_data():
    (data,), first = unseen(), known()[1]
    report = repair_module(trained(), known(), quick(), unseen=[data]).report
    with pytest.warns(DataWarning, match="remove them; they are not counted"):
        leaky = repair_module(
            trained(), known(), quick(), unseen=[leaking(data, first, list(range(len(first))))]
        ).report
    assert leaky.unseen.counts == report.unseen.counts
    assert leaky.verdict.evidence == report.verdict.evidence
    assert leaky.unseen_limit == report.unseen_limit


def test_repeated_unseen_samples_are_tested_once():
    (data,) = unseen()
    report = repair_module(trained(), known(), quick(), unseen=[data]).report
    with pytest.warns(DataWarning, match=rf"`unseen`: {len(data)} of {2 * len(data)} samples rep"):
        twice = repair_module(
            trained(), known(), quick(), unseen=[data, replace(data, split="again")]
        ).report
    assert twice.verdict.repaired == 2 * report.verdict.repaired > 0
    assert twice.verdict.p_value == report.verdict.p_value
    assert twice.unseen_limit == report.unseen_limit
    page = " ".join(twice.to_markdown().split())
    passed = report.unseen.passed
    assert f"that were right will break (here 0 of {passed} distinct samples)" in page
    assert "(sign test of distinct samples, 8 better, 0 worse," in page


def test_data_without_leaks_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        report = repair_module(
            trained(), known(), quick(), unseen=unseen(), calibration=calibration()
        ).report
    assert report.leaked == {}


class Placed(TensorSource):
    """Samples of a data set that gives them another look each time; only the place tells which they
    are.
    """

    @property
    def identity(self) -> torch.Tensor:
        return torch.stack([torch.zeros_like(self.targets), self.extras[0]], 1)


def test_samples_are_known_by_their_place_where_it_is_known():
    zeros = torch.zeros(3, dtype=torch.int64)
    first = Placed(torch.randn(3, 2), zeros, "train", extras=(torch.tensor([4, 5, 6]),))
    later = Placed(torch.randn(3, 2), zeros, "later", extras=(torch.tensor([6, 7, 5]),))
    leaks = LeakCheck([first], {"unseen": [later]})
    for source in (*leaks.known, *leaks.other_data["unseen"]):
        assert len(list(source)) == 1
    with pytest.warns(DataWarning, match=r"\(\[0, 2\]\)"):
        leaked = leaks.leaked(Collective())
    assert leaked["later"].tolist() == [True, False, True]
