from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from options import with_options
from sample_tables import sample_table
from torch import Tensor, nn
from toy_problems import left_alone, threshold, together
from toy_repairs import blobs, known, quick, trained, unseen

from lightning_nrl import (
    Gate,
    ParticleSwarm,
    RepairReport,
    SampleOptions,
    Settings,
    Target,
    TensorSource,
    repair_module,
)
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Focal
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.gate import check_protected, judge
from lightning_nrl.localization import AllWeights
from lightning_nrl.methods import Polish
from lightning_nrl.tasks import Regression


def evidence(passed: list[bool], **columns: Any) -> SampleResults:
    return sample_table(
        passed, targeted=~torch.tensor(passed), **{"loss": torch.ones(len(passed)), **columns}
    )


def counted(
    options: SampleOptions, extras: tuple[Tensor, ...] = ()
) -> tuple[SampleResults, Tensor]:
    """Of a network that says class 1 to everything, samples 0, 2 and 4 of class 0 fail."""
    output, labels = torch.tensor([[0.0, 1.0]]).expand(6, 2), torch.arange(6) % 2
    source = TensorSource(output, labels, "new", True, True, extras=extras, batch_size=4)
    return options.evaluate(Evaluator(nn.Identity()), [source], Target.all())


WEIGHTS = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0])


@pytest.mark.parametrize(
    "importance",
    [
        2,
        lambda batch: batch[2],
        lambda batch: batch[2].tolist(),
        {0: 1, 2: 2.0, 4: 3},
        {"new": {2: 2, 4: 3}},
    ],
)
def test_a_column_a_function_or_ids_say_what_a_failure_is_worth(importance):
    results, aside = counted(SampleOptions(importance=importance), (WEIGHTS,))
    # 1 on average over the failures; passed samples keep their weight.
    assert results.weight.tolist() == [0.5, 1, 1, 1, 1.5, 1]
    assert results.value(torch.tensor([True, True, False, False, True, False])) == 2.0
    assert not aside.any()


def test_hard_failures_count_more_by_the_factor_of_the_focal_loss():
    # The model gives the truth the probabilities 1/2 and 1/10.
    loss = -torch.tensor([0.5, 0.1, 0.5, 0.1]).log()
    weight = Focal(2.0).weigh(evidence([False] * 4, loss=loss))
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.81, 0.25, 0.81]).double())
    assert Focal(0.0).weigh(evidence([False] * 4, loss=loss)).tolist() == [1.0] * 4
    results, _ = counted(SampleOptions(importance="focal"))
    assert results.weight.tolist() == [1.0] * 6  # all are equally hard


def test_protected_samples_and_those_that_count_for_several():
    def weights(protected: Any, *extras: Tensor) -> list[float]:
        return counted(SampleOptions(protected=protected), extras)[0].weight.tolist()

    assert weights(2, torch.arange(6) < 2) == [1, math.inf, 1, 1, 1, 1]
    assert weights(2, torch.tensor([7, 3, 7, 1, 7, 1])) == [1, 3, 1, 1, 1, 1]
    assert weights(Target.label(1)) == [1, math.inf] * 3
    assert weights([3]) == [1, 1, 1, math.inf, 1, 1]
    assert weights({"new": {3: 5}}) == [1, 1, 1, 5, 1, 1]
    weight = torch.tensor([1, math.inf, 3, 1]).double()
    # More than the 3 and the 1 of the other passed samples together.
    assert evidence([False, True, True, True], weight=weight).finite_weight.tolist() == [1, 5, 3, 1]


@pytest.mark.parametrize("aside", [2, Target.where(lambda batch: batch[2]), [2, 3], {"new": [2]}])
def test_failures_that_are_set_aside_are_no_targets(aside):
    marks = torch.tensor([False, True, True, False, False, False])
    results, left_out = counted(SampleOptions(set_aside=aside), (marks,))
    assert results.ids(results.targeted) == {"new": [0, 4]}
    assert results.ids(left_out) == {"new": [2]}


def test_slices_by_a_column_or_a_target():
    codes = torch.tensor([0, 0, 1, 1, 2, 2])
    results, _ = counted(SampleOptions(slices=2), (codes,))
    assert results.slices == ("0", "1", "2")
    assert results.slice_number.tolist() == codes.tolist()
    results, _ = counted(SampleOptions(slices=Target.label(0)))
    assert results.slices == ("label 0",)
    assert results.slice_number.tolist() == [0, -1] * 3


def test_each_name_is_a_slice_of_its_own_and_an_empty_one_is_none():
    names = ["<30", ">30", "a b", "a/b", "", None]
    slices = SampleOptions(slices=lambda batch: [names[i] for i in batch[2]])
    results, _ = counted(slices, (torch.arange(6),))
    assert results.slices == ("<30", ">30", "a b", "a/b")
    assert results.slice_number.tolist() == [0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slices": 2, "quotas": {1: 5, "1": 3}}, "`quotas` names the slice '1' twice"),
        ({"importance": 1.5}, "`importance`: a value of type float is not a column"),
        ({"importance": "no.such:function"}, "`importance='no.such:function'`"),
        ({"importance": True}, "type bool is not a column"),
        ({"quotas": {"night": 3}}, "needs slices, but `slices` is not given"),
        ({"slices": 2, "quotas": {"night": 0}}, "0 for 'night' is no quota"),
        ({"slices": 2, "quotas": {"night": "half"}}, "`quotas.'night'.`: 'half' is no number"),
        ({"slices": 2, "quotas": [3]}, "`quotas`: found a list"),
    ],
)
def test_what_means_nothing_is_refused_at_once(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Settings(**with_options(arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": 5}, "has no column 5; it is a tuple with 3 columns"),
        ({"importance": lambda batch: batch[2] - 3}, r"is -2.0 for 3 failed .* \[0, 2, 4\]"),
        ({"importance": lambda batch: batch[2][:1]}, r"float32 \[1\] for a batch of 4"),
        ({"importance": {99: 1.0}}, "'new' data have no sample 99"),
        ({"protected": lambda batch: batch[2] / 2}, "`protected` is 4.5 for 3 passed samples"),
        ({"set_aside": {"old": [1]}}, "`set_aside` names the split 'old'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_with_a_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        counted(SampleOptions(**options), (WEIGHTS,))


def flipped(before: SampleResults, *rows: int) -> SampleResults:
    passed = before.passed.clone()
    passed[list(rows)] ^= True
    return replace(before, passed=passed)


def test_the_gate_counts_by_weight_and_spares_the_protected():
    weight = torch.tensor([1, 4, torch.inf, 1, 1, 1], dtype=torch.float64)
    before = evidence([True, True, True, False, False, False], weight=weight)
    assert judge(before, flipped(before, 0, 3), Gate.tolerance(3)).accepted
    several = judge(before, flipped(before, 1, 3), Gate.tolerance(3))
    assert several.status == "refused"
    assert several.reason.endswith("The weights of the broken samples add up to 4.")
    protected = judge(before, flipped(before, 2, 3), Gate.tolerance(1.0))
    assert protected.status == "refused"
    assert protected.reason.endswith("Protected samples would break: 1 in train.")
    good = judge(before, flipped(before, 3), Gate.instance())
    assert check_protected(good, before, flipped(before, 1)) == good
    assert check_protected(good, before, flipped(before, 2)).status == "refused"


def test_a_quota_that_is_not_met_is_a_reason():
    before = evidence(
        [True, True, True, False, False, False],
        slices=("night",),
        slice_number=torch.tensor([-1, 0, 0, 0, 0, -1]),
    )
    assert judge(before, flipped(before, 3, 4), Gate.instance(), {"night": 2}).accepted
    decision = judge(before, flipped(before, 3, 5), Gate.instance(), {"night": 2})
    assert decision.status == "refused"
    assert "Of the slice 'night' 1 is repaired; its quota is 2." in decision.reason


def either_or() -> TensorSource:
    """With the threshold at 0.75, 0.7 of class 1 and 0.8 of class 0 fail.

    No threshold is right about both.
    """
    x = torch.tensor([[value, 1.0] for value in (-2, -1, 1, 2, 0.7, 0.8)])
    return TensorSource(x, torch.tensor([0, 0, 1, 1, 1, 0]), "all", True, True)


def at_threshold() -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.75))
    return model


METHODS = {
    "swarm": {"method": ParticleSwarm(particles=40, iterations=40), "localizer": AllWeights()},
    "convex": {"method": "convex"},
    "polish": {"method": Polish()},
    "auto": {"localizer": AllWeights()},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("worthy", [4, 5])
def test_of_two_failures_every_method_repairs_the_one_that_counts_more(method, worthy):
    model = at_threshold()
    samples = SampleOptions(importance={worthy: 9, 9 - worthy: 1})
    settings = Settings(samples=samples, **with_options(METHODS[method]))
    with left_alone(model):
        (split,) = repair_module(model, [either_or()], settings).report.splits
    assert (split.repaired_ids, split.broken) == ((worthy,), 0)


@pytest.mark.parametrize("name", ["0", "1"])
def test_of_two_slices_the_one_with_a_quota_is_repaired(name):
    source = replace(either_or(), extras=(torch.tensor([-1, -1, -1, -1, 0, 1]),))
    samples = SampleOptions(slices=2, quotas={name: 1})
    settings = Settings(method="convex", samples=samples)
    report = repair_module(at_threshold(), [source], settings).report
    assert report.splits[0].repaired_ids == (4 + int(name),)
    (row,) = [row for row in report.slices if row.name == name]
    assert (row.repaired_in_target, row.quota) == (1, 1)


def test_equal_weights_change_nothing_to_the_bit():
    equal = SampleOptions(importance=lambda batch: [3.0] * len(batch[1]))
    plain, weighted = (
        repair_module(trained(), known(), Settings(method="convex", samples=samples))
        for samples in (SampleOptions(), equal)
    )
    assert torch.equal(plain.change, weighted.change)
    assert plain.report.splits == weighted.report.splits


def test_the_report_has_a_row_for_each_slice_and_survives_json():
    calibration = TensorSource(*blobs(60, 1.5, 9), split="cal")
    sources = [replace(s, extras=(s.targets % 2,)) for s in (*known(), *unseen(), calibration)]
    settings = quick(method="convex", slices=2, quotas={"0": 2}, set_aside=[0, 1, 2, 3])
    report = repair_module(
        trained(), sources[:2], settings, unseen=sources[2:-1], calibration=sources[-1:]
    ).report
    rows = {(row.name, row.role): row for row in report.slices}
    assert len(rows) == 6
    for role in ("known", "calibration", "unseen"):
        pooled, even, odd = report.pooled(role), rows["0", role], rows["1", role]
        assert even.n + odd.n == pooled.n
        assert even.targeted + odd.targeted == pooled.targeted
        assert even.repaired + odd.repaired == pooled.repaired
    assert rows["0", "known"].quota == 2
    assert rows["0", "known"].repaired_in_target >= 2
    again = RepairReport.from_json(report.to_json())
    assert (again.slices, again.set_aside) == (report.slices, report.set_aside)
    assert "By slice" in report.to_markdown()


def test_a_quota_that_cannot_be_met_ends_early_and_says_so():
    slices = [replace(s, extras=(s.targets,)) for s in known()]
    with pytest.warns(UserWarning, match="names the slice 'night'"):
        outcome = repair_module(trained(), slices, quick(slices=2, quotas={"night": 1}))
    assert outcome.parameters is None
    assert outcome.report.status == "not repaired"


def test_samples_of_two_processes_have_the_same_weights():
    options = SampleOptions(importance=lambda batch: batch[1] + 1.0, slices=1)

    def weights(evaluator: Evaluator, sources: Any) -> list[float]:
        results, _ = options.evaluate(evaluator, sources, Target.all())
        return [*results.weight.tolist(), *results.slice_number.tolist()]

    alone = weights(Evaluator(trained().eval()), known(n=30))
    of_ranks = together(trained(), known(n=30), lambda p: weights(p.evaluator, p.known))
    assert of_ranks == [alone] * 2


def test_risks_of_confusions_are_what_repairs_are_worth_and_breaking_costs():
    # Samples 0, 2 and 4 of class 0 are taken for 1; 1, 3 and 5 of class 1 are right.
    for risk in ({(0, 1): 4, 1: 2, (1, 0): 3}, {"0 -> 1": 4, "1": 2, "1 -> 0": 3}):
        results, _ = counted(SampleOptions(risk=risk))
        # All targets are alike; breaking a sample costs the highest level of its class.
        assert results.weight.tolist() == [1, 3] * 3
    options = SampleOptions(risk={0: 2}, importance={0: 1, 2: 2, 4: 3}, protected=Target.label(1))
    assert counted(options)[0].weight.tolist() == [0.5, math.inf, 1, math.inf, 1.5, math.inf]
    numbers = TensorSource(torch.zeros(2, 1), torch.zeros(2, 1), "new", failed=True)
    with pytest.raises(ConfigurationError, match="`risk` is for confusions of classes"):
        SampleOptions(risk={0: 5}).evaluate(Evaluator(nn.Linear(1, 1), Regression(0.5)), [numbers])


@pytest.mark.parametrize(
    "risk", [[3], {(3, 3): 2}, {"3 > 5": 2}, {3: 0}, {3: 1.5}, {True: 2}, {"²": 2}]
)
def test_what_is_no_risk_is_refused(risk):
    with pytest.raises(ConfigurationError, match="risk"):
        SampleOptions(risk=risk)
