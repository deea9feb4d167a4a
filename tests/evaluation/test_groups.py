"""Samples of one group, such as a patient, count once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_tables import sample_table
from toy_problems import together
from toy_repairs import blobs, known, trained

from lightning_nrl import SampleOptions, TensorSource
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Evaluator, FlipCounts, Flips, SampleResults
from lightning_nrl.evaluation.sample_results import GroupCounts

PATIENTS = ["ann", "bob", "ann", "7", "bob", "cay"]


def name_of(batch: Any) -> list[str]:
    return [PATIENTS[place] for place in batch[2]]


def evaluated(groups: Any, *extras: torch.Tensor) -> SampleResults:
    """`later` has the samples of `new` in reverse order."""
    sources = []
    for split, order in (("new", torch.arange(6)), ("later", torch.arange(6).flip(0))):
        x, y = blobs(6)
        columns = tuple(extra[order] for extra in extras)
        sources.append(TensorSource(x[order], y[order], split, extras=columns, batch_size=4))
    return SampleOptions(groups=groups).evaluate(Evaluator(trained()), sources)[0]


def groups_of(results: SampleResults) -> list[int]:
    """Numbers the groups by first appearance."""
    numbers = {}
    return [numbers.setdefault(group, len(numbers)) for group in results.group.tolist()]


@pytest.mark.parametrize("groups", [2, name_of, f"{__name__}:name_of"])
def test_a_value_is_the_same_group_in_all_splits(groups):
    places = torch.arange(6) if groups != 2 else torch.tensor([4, 5, 4, 7, 5, 6])
    results = evaluated(groups, places)
    assert groups_of(results) == [0, 1, 0, 2, 1, 3, 3, 1, 2, 0, 1, 0]


def test_names_of_groups_need_not_be_utf_8():
    results = evaluated(lambda batch: [f"\udcff{number}" for number in batch[2]], torch.arange(6))
    assert groups_of(results) == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]


def test_samples_have_no_groups_unless_they_are_given():
    results = evaluated(None)
    assert results.group is None
    assert Flips.between(results, results).counts().groups is None


@pytest.mark.parametrize(
    ("groups", "problem", "hint"),
    [
        (3, "`groups` raised LookupError", "a function gets the batch"),
        (2, "`groups` returned Tensor tensor([0.0000", "return one name, whole number"),
        (lambda batch: ["a"], "`groups` returned list ['a'] for a batch of 4", "return one name"),
        (lambda batch: [None] * len(batch[0]), "a sample of `new` has the group None", "a name"),
        (lambda batch: [" "] * len(batch[0]), "a sample of `new` has the group ' '", "a name"),
    ],
)
def test_columns_that_give_no_groups_are_refused(groups, problem, hint):
    with pytest.raises(ConfigurationError) as error:
        evaluated(groups, torch.linspace(0, 1, 6))
    assert problem in error.value.problem
    assert hint in error.value.hint


def test_a_value_that_is_no_column_is_refused_at_once():
    with pytest.raises(ConfigurationError, match="`groups`: a value of type float"):
        SampleOptions(groups=0.5)


def test_two_processes_number_groups_alike():
    options = SampleOptions(groups=1)

    def group(evaluator: Evaluator, sources: Any) -> Any:
        results, _ = options.evaluate(evaluator, sources)
        return results.group.tolist()

    alone = group(Evaluator(trained().eval()), known(n=30))
    assert together(trained(), known(n=30), lambda p: group(p.evaluator, p.known)) == [alone] * 2


#                       group 0            group 1         2     3
BEFORE = torch.tensor([1, 1, 1, 0, 0, 0,   1, 1, 0, 0,     0, 0, 1]).bool()  # fmt: skip
AFTER = torch.tensor([1, 0, 0, 1, 1, 1,    0, 1, 1, 0,     0, 1, 1]).bool()  # fmt: skip
GROUP = torch.tensor([0, 0, 0, 0, 0, 0,    1, 1, 1, 1,     2, 2, 3])  # fmt: skip


def flips(group: torch.Tensor | None) -> Flips:
    before = sample_table(BEFORE.tolist(), {"a": 8, "b": 5}, group=group)
    return Flips.between(before, sample_table(AFTER.tolist(), {"a": 8, "b": 5}))


def test_a_group_counts_once():
    counts = flips(GROUP).counts()
    assert (counts.kept, counts.broken, counts.repaired, counts.failing) == (3, 3, 5, 2)
    # Net repairs: 3 - 2, 1 - 1, 1 and 0. Right samples: 0, 1, 3. Wrong samples: 0, 1, 2.
    expected = GroupCounts(
        passed=3, broken=2, failed=3, repaired=3, better=2, worse=0, squared_net=2
    )
    assert counts.groups == counts.units == expected


def test_a_group_in_two_splits_counts_once_in_each_and_once_in_all():
    # Split `a` has two samples of group 1, split `b` the other two.
    by_split = [flips(GROUP).counts(rows).units for rows in (slice(0, 8), slice(8, 13))]
    assert [units.passed for units in by_split] == [2, 1]
    assert [units.failed for units in by_split] == [1, 2]
    assert (by_split[0].worse, by_split[1].better) == (1, 2)


def test_no_samples_are_no_groups():
    assert flips(GROUP).counts(torch.zeros(13).bool()).groups == GroupCounts(0, 0, 0, 0, 0, 0, 0)


def test_without_groups_each_sample_is_a_unit():
    counts = flips(None).counts()
    assert counts == FlipCounts(3, 3, 5, 2)
    assert counts.units == GroupCounts(
        passed=6, broken=3, failed=7, repaired=5, better=5, worse=3, squared_net=8
    )
    one_each = flips(torch.arange(13)).counts()
    assert one_each.groups == counts.units
