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
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.methods import Polish
from lightning_nrl.tasks import Regression


def evidence(passed: list[bool], **columns: Any) -> SampleResults:
    return sample_table(
        passed, targeted=~torch.tensor(passed), **{"loss": torch.ones(len(passed)), **columns}
    )


def counted(
    importance: SampleOptions, extras: tuple[Tensor, ...] = (), n: int = 6, **how: Any
) -> tuple[SampleResults, Tensor]:
    """Of a network that says class 1 to everything, samples 0, 2 and 4 of class 0 fail."""
    model = torch.nn.Linear(1, 2)
    model.load_state_dict({"weight": torch.zeros(2, 1), "bias": torch.tensor([0.0, 1.0])})
    labels = torch.arange(n) % 2
    source = TensorSource(
        torch.zeros(n, 1), labels, "new", passed=True, failed=True, extras=extras, batch_size=4
    )

    return importance.evaluate(Evaluator(model), [source], Target.all(), **how)


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
def test_a_column_a_function_or_ids_say_what_a_failure_is_worth(importance: Any) -> None:
    found, aside = counted(SampleOptions(importance=importance), (WEIGHTS,))
    assert found.weight.tolist() == [
        0.5,
        1,
        1,
        1,
        1.5,
        1,
    ]  # 1 on average over the failures; passed ones as ever
    assert found.value(torch.tensor([True, True, False, False, True, False])) == 2.0
    assert not aside.any()


def test_hard_failures_count_more_by_the_factor_of_the_focal_loss() -> None:
    # The model gives the truth the probabilities 1/2 and 1/10.
    loss = -torch.tensor([0.5, 0.1, 0.5, 0.1]).log()
    weight = Focal(2.0).weigh(evidence([False] * 4, loss=loss))
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.81, 0.25, 0.81]).double())
    assert Focal(0.0).weigh(evidence([False] * 4, loss=loss)).tolist() == [1.0] * 4
    found, _ = counted(SampleOptions(importance="focal"))
    assert found.weight.tolist() == [1.0] * 6  # all are equally hard


def test_protected_samples_and_those_that_count_for_several() -> None:
    marks = torch.tensor([True, True, False, False, False, False])
    assert counted(SampleOptions(protected=2), (marks,))[0].weight.tolist() == [
        1,
        torch.inf,
        1,
        1,
        1,
        1,
    ]
    assert counted(SampleOptions(protected=Target.label(1)))[0].protected.sum() == 3
    assert counted(SampleOptions(protected=[3]))[0].weight.tolist() == [1, 1, 1, torch.inf, 1, 1]
    assert counted(SampleOptions(protected={"new": {3: 5}}))[0].weight.tolist() == [
        1,
        1,
        1,
        5,
        1,
        1,
    ]
    several, _ = counted(SampleOptions(protected=2), (torch.tensor([7, 3, 7, 1, 7, 1]),))
    assert several.weight.tolist() == [1, 3, 1, 1, 1, 1]
    both = replace(several, weight=torch.tensor([1, torch.inf, 1, 3, 1, 1], dtype=torch.float64))
    assert both.finite_weight.tolist() == [1, 5, 1, 3, 1, 1]  # more than the 3 and the 1 together


@pytest.mark.parametrize("aside", [2, Target.where(lambda batch: batch[2]), [2, 3], {"new": [2]}])
def test_failures_that_are_set_aside_are_no_targets(aside: Any) -> None:
    found, left_out = counted(
        SampleOptions(set_aside=aside), (torch.tensor([0, 1, 1, 0, 0, 0]).bool(),)
    )
    assert found.targeted.nonzero().flatten().tolist() == [0, 4]
    assert left_out.nonzero().flatten().tolist() == [2]


def test_slices_by_a_column_a_function_or_a_target() -> None:
    codes = torch.tensor([0, 0, 1, 1, 2, 2])
    for slices in (2, lambda batch: batch[2].tolist()):
        found, _ = counted(SampleOptions(slices=slices), (codes,))
        assert found.names == ("0", "1", "2")
        assert found.group.tolist() == codes.tolist()
    one, _ = counted(SampleOptions(slices=Target.label(0)))
    assert one.names == ("label 0",)
    assert one.group.tolist() == [0, -1] * 3


def test_each_name_is_a_slice_of_its_own_and_an_empty_one_is_none() -> None:
    names = ["<30", ">30", "a b", "a/b", "", None]
    found, _ = counted(
        SampleOptions(slices=lambda batch: [names[i] for i in batch[2]], quotas={">30": 1}),
        (torch.arange(6),),
    )
    assert found.names == ("<30", ">30", "a b", "a/b")
    assert found.group.tolist() == [0, 1, 2, 3, -1, -1]


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
def test_what_means_nothing_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings(**with_options(arguments))


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (
            SampleOptions(importance=5),
            "has no column 5; it is a tuple with 3 columns, which are counted from 0",
        ),
        (SampleOptions(importance="weight"), "has no column 'weight'"),
        (
            SampleOptions(importance=lambda batch: batch[2] - 3),
            r"`importance` is -2.0 for 3 failed samples \(new: \[0, 2, 4\]",
        ),
        (
            SampleOptions(importance=lambda batch: batch[2][:1]),
            r"returned torch.float32 \[1\] for a batch of 4",
        ),
        (SampleOptions(importance={99: 1.0}), "'new' data have no sample 99"),
        (
            SampleOptions(protected=lambda batch: batch[2] / 2),
            "`protected` is 4.5 for 3 passed samples",
        ),
        (SampleOptions(set_aside={"old": [1]}), "`set_aside` names the split 'old'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_with_a_name(
    importance: SampleOptions, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        counted(importance, (WEIGHTS,))


def flipped(before: SampleResults, *rows: int) -> SampleResults:
    passed = before.passed.clone()
    passed[list(rows)] ^= True
    return replace(before, passed=passed)


def test_the_gate_counts_by_weight_and_spares_the_protected() -> None:
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


def test_a_quota_that_is_not_met_is_a_reason() -> None:
    before = evidence(
        [True, True, True, False, False, False],
        names=("night",),
        group=torch.tensor([-1, 0, 0, 0, 0, -1]),
    )
    assert judge(before, flipped(before, 3, 4), Gate.instance(), {"night": 2}).accepted
    decision = judge(before, flipped(before, 3, 5), Gate.instance(), {"night": 2})
    assert decision.status == "refused"
    assert "Of the slice 'night' 1 is repaired; its quota is 2." in decision.reason


def either_or(copies: int = 1) -> list[TensorSource]:
    """With the threshold at 0.75, 0.7 of class 1 and 0.8 of class 0 fail; no threshold is right
    about both.
    """
    x = torch.tensor([[value, 1.0] for value in (-2, -1, 1, 2, 0.7, 0.8)])
    return [
        TensorSource(
            x.repeat(copies, 1), torch.tensor([0, 0, 1, 1, 1, 0]).repeat(copies), "all", True, True
        )
    ]


METHODS: dict[str, dict[str, Any]] = {
    "swarm": {"method": ParticleSwarm(particles=40, iterations=40), "localizer": AllWeights()},
    "convex": {"method": "convex"},
    "linearized": {"method": "linearized"},
    "polish": {"method": Polish()},
    "auto": {"localizer": AllWeights()},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("worthy", [4, 5])
def test_of_two_failures_every_method_repairs_the_one_that_counts_more(
    method: str, worthy: int
) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.75))
    with left_alone(model):
        outcome = repair_module(
            model,
            either_or(),
            Settings(
                samples=SampleOptions(importance={worthy: 9, 9 - worthy: 1}),
                **with_options(METHODS[method]),
            ),
        )
    assert outcome.report.splits[0].repaired_ids == (worthy,)
    assert outcome.report.splits[0].broken == 0


@pytest.mark.parametrize("name", ["low", "high"])
def test_of_two_slices_the_one_with_a_quota_is_repaired(name: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.75))
    source = replace(either_or()[0], extras=(torch.arange(6),))
    slices = lambda batch: [{4: "low", 5: "high"}.get(i) for i in batch[2].tolist()]  # noqa: E731
    outcome = repair_module(
        model,
        [source],
        Settings(method="convex", samples=SampleOptions(slices=slices, quotas={name: 1})),
    )
    assert outcome.report.splits[0].repaired_ids == ({"low": 4, "high": 5}[name],)
    assert {one.name: (one.repaired_in_target, one.quota) for one in outcome.report.slices}[
        name
    ] == (1, 1)


@pytest.mark.parametrize("method", ["swarm", "convex", "linearized"])
def test_equal_weights_change_nothing_to_the_bit(method: str) -> None:
    arguments = METHODS[method] | (
        {"localizer": NeuRecoverLite(n_weights=12)} if method == "swarm" else {}
    )
    alike = repair_module(trained(), known(), Settings(**with_options(arguments)))
    constant = repair_module(
        trained(),
        known(),
        Settings(
            **with_options(arguments),
            samples=SampleOptions(importance=lambda batch: [3.0] * len(batch[1])),
        ),
    )
    assert torch.equal(alike.change, constant.change)
    assert alike.report.splits == constant.report.splits


def test_the_report_has_a_row_for_each_slice_and_survives_json() -> None:
    slices = [replace(s, extras=(s.targets % 2,)) for s in (*known(), *unseen())]
    later = [
        replace(s, extras=(s.targets % 2,), split="cal")
        for s in (TensorSource(*blobs(60, 1.5, 9), split="cal"),)
    ]
    outcome = repair_module(
        trained(),
        slices[:2],
        quick(
            method="convex",
            slices=2,
            quotas={"0": 2},
            protected=Target.label(2),
            set_aside=[0, 1, 2, 3],
        ),
        unseen=slices[2:],
        calibration=later,
    )
    report = outcome.report
    rows = {(one.name, one.role): one for one in report.slices}
    assert set(rows) == {
        (name, role) for name in ("0", "1") for role in ("known", "calibration", "unseen")
    }
    for role in ("known", "calibration", "unseen"):
        pooled = report.pooled(role)
        for count in ("n", "targeted", "repaired_in_target", "repaired", "broken"):
            assert sum(getattr(rows[name, role], count) for name in ("0", "1")) == getattr(
                pooled, count
            )
    assert rows["0", "known"].quota == 2
    assert rows["0", "known"].repaired_in_target >= 2
    assert RepairReport.from_json(report.to_json()).slices == report.slices
    assert RepairReport.from_json(report.to_json()).set_aside == report.set_aside
    assert "By slice" in report.to_markdown()
    assert "By slice" in report.render()


def test_a_quota_that_cannot_be_met_ends_early_and_says_so() -> None:
    slices = [replace(s, extras=(s.targets,)) for s in known()]
    with pytest.warns(UserWarning, match="names the slice 'night'"):
        outcome = repair_module(trained(), slices, quick(slices=2, quotas={"night": 1}))
    assert outcome.parameters is None
    assert outcome.report.status == "not repaired"


def test_samples_of_two_processes_have_the_same_weights() -> None:
    def gather(problem: Any) -> list[float]:
        spec = SampleOptions(importance=lambda batch: batch[1] + 1.0, slices=1)
        found, _ = spec.evaluate(problem.evaluator, problem.known, Target.all())
        return [*found.weight.tolist(), *found.group.tolist()]

    one, two = together(trained(), known(n=30), gather)
    assert one == two
    alone = SampleOptions(importance=lambda batch: batch[1] + 1.0, slices=1)
    model = trained().eval()
    found, _ = alone.evaluate(Evaluator(model), known(n=30), Target.all())
    assert one == [*found.weight.tolist(), *found.group.tolist()]


def test_risks_of_confusions_are_what_repairs_are_worth_and_breaking_costs() -> None:
    # Samples 0, 2 and 4 of class 0 are taken for 1; 1, 3 and 5 of class 1 are right.
    for risk in ({(0, 1): 4, 1: 2, (1, 0): 3}, {"0 -> 1": 4, "1": 2, "1 -> 0": 3}):
        found, _ = counted(SampleOptions(risk=risk))
        assert found.weight.tolist() == [
            1,
            3,
            1,
            3,
            1,
            3,
        ]  # all targets are alike; a class costs its worst
    both = SampleOptions(risk={0: 2}, importance={0: 1, 2: 2, 4: 3}, protected=Target.label(1))
    assert counted(both)[0].weight.tolist() == [0.5, math.inf, 1, math.inf, 1.5, math.inf]
    worst = SampleOptions(risk={0: 5, (0, 2): 9, 1: 2, (1, 2): 7})
    assert counted(worst)[0].weight.tolist() == [1, 7, 1, 7, 1, 7]
    numbers = TensorSource(torch.zeros(2, 1), torch.zeros(2, 1), "new", failed=True)
    with pytest.raises(ConfigurationError, match="`risk` is for confusions of classes"):
        SampleOptions(risk={0: 5}).evaluate(Evaluator(nn.Linear(1, 1), Regression(0.5)), [numbers])


@pytest.mark.parametrize(
    "risk", [[3], {(3, 3): 2}, {"3 > 5": 2}, {3: 0}, {3: 1.5}, {True: 2}, {"²": 2}]
)
def test_what_is_no_risk_is_refused(risk: Any) -> None:
    with pytest.raises(ConfigurationError, match="risk"):
        SampleOptions(risk=risk)
