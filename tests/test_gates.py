"""Gates from text, how many samples they let break, and the decision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tables import sample_table

from lightning_nrl.errors import ConfigurationError, EvaluationError
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.gate import GATES, Accuracy, Gate, Instance, Tolerance, judge
from lightning_nrl.release import AtMostBroken
from lightning_nrl.release.rule_parsing import parse_rule


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("instance", Gate.instance()),
        (" Accuracy ", Gate.accuracy()),
        ("instance-in-target", Gate.instance_in_target()),
        ("tolerance: 3", Gate.tolerance(3)),
        ("tolerance:1e-3", Tolerance(0.001)),
        ("tolerance:0.5 %", Tolerance(0.005)),
        (Instance(), Instance()),
    ],
)
def test_parse_reads_every_form(text, gate):
    assert Gate.parse(text) == gate
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instanze", "`gate='instanze'` is no gate, did you mean 'instance'"),
        ("instance:3", "`gate='instance:3'` is no gate.\nHINT: write one of"),
        ("tolerance", "`gate='tolerance'` is no gate"),
        ("tolerance:x%", "'x%' is no number"),
        ("tolerance:-1", "`limit=-1` is no tolerance"),
        ("tolerance:150%", "`limit=1.5` is no tolerance"),
        (
            "tolerance:1.0",
            "'1.0' may be a number or a share.\nHINT: write 1 for .*, 100% for",
        ),
    ],
)
def test_parse_refuses_what_it_cannot_read(text, message):
    with pytest.raises(ConfigurationError, match=message):
        Gate.parse(text)


@pytest.mark.parametrize(
    ("gate", "allowed"),
    [
        (Instance(), 0),
        (Accuracy(), 7),
        (Tolerance(3), 3),
        (Tolerance(0.29), 29),  # 0.29 * 100 is 28.999999999999996
        (Tolerance(0.009), 0),
        (Tolerance(1.0), 100),
    ],
)
def test_how_many_may_break(gate, allowed):
    assert gate.allowed(FlipCounts(kept=90, broken=10, repaired=7, failing=5)) == allowed


# train: kept, kept, kept, failing; repair: kept, failing (targeted), failing (targeted), kept.
PASSED = [True, True, True, False, True, False, False, True]
TARGETED = [False, False, False, False, False, True, True, False]


def evidence(
    passed: list[bool], targeted: list[bool] | None = None, loss: list[float] | None = None
) -> SampleResults:
    n = len(passed)
    return sample_table(
        passed,
        {"train": n // 2, "repair": n - n // 2},
        index=torch.arange(n) + 100,
        targeted=torch.tensor(targeted or [False] * n),
        loss=torch.zeros(n) if loss is None else torch.tensor(loss),
    )


def after(*flipped: int, nan: tuple[int, ...] = ()) -> SampleResults:
    passed = [right != (i in flipped) for i, right in enumerate(PASSED)]
    return evidence(passed, loss=[float("nan") if i in nan else 0.5 for i in range(len(PASSED))])


BEFORE = evidence(PASSED, TARGETED)


def test_accepted_without_a_regression():
    decision = judge(BEFORE, after(3, 5), Instance())
    assert decision.accepted
    counts = decision.counts
    assert (counts.kept, counts.broken, counts.repaired, counts.failing) == (5, 0, 2, 1)
    assert (counts.targeted, counts.repaired_in_target) == (2, 1)
    assert decision.reason == (
        "1 of 2 targeted failures pass now. "
        "Of 5 known samples that passed before, none broke; the gate allows none."
    )


def test_refused_for_one_regression_of_any_known_split():
    for broken, split in ((0, "train"), (7, "repair")):
        decision = judge(BEFORE, after(5, 6, broken), Gate.instance())
        assert decision.status == "refused"
        assert not decision.accepted
        assert decision.reason == (
            f"Of 5 known samples that passed before, 1 would break (1 in {split}); "
            "the gate allows none. 2 of 2 targeted failures would pass."
        )


def test_of_the_target_none_may_break_and_of_the_others_any_that_is_not_protected():
    # Right before: 0, 1, 2, 4 and 7; of these 1 and 7 are in the target.
    before = replace(BEFORE, in_target=torch.tensor([i in (1, 5, 6, 7) for i in range(8)]))
    gate = Gate.instance_in_target()
    others = judge(before, after(0, 2, 5), gate)
    assert (others.status, others.counts.broken) == ("repaired", 2)
    assert others.reason.endswith(
        "2 broke (2 in train); the gate allows none in the target (none of 2 broke)."
    )
    refused = judge(before, after(0, 5, 7), gate)
    assert refused.status == "refused"
    assert "the gate allows none in the target (1 of 2 would break)." in refused.reason
    weight = torch.ones(8, dtype=torch.float64)
    heavy, protected = (
        replace(before, weight=weight.index_fill(0, torch.tensor(0), w)) for w in (3.0, torch.inf)
    )
    assert judge(heavy, after(0, 2, 5), gate).accepted
    assert judge(protected, after(0, 2, 5), gate).status == "refused"


@pytest.mark.parametrize("gate", ["instance", "accuracy", "tolerance:100%"])
def test_nothing_targeted_repaired_is_never_accepted(gate):
    decision = judge(BEFORE, after(3), Gate.parse(gate))
    assert (decision.status, decision.counts.repaired) == ("not repaired", 1)
    assert decision.reason == (
        "None of 2 targeted failures would pass. "
        "Of 5 known samples that passed before, none would break."
    )


def test_a_loss_that_is_not_finite_is_a_failure():
    decision = judge(BEFORE, after(5, 6, nan=(0, 6)), Gate.instance())
    counts = decision.counts
    assert (counts.kept, counts.broken, counts.repaired, counts.failing) == (4, 1, 1, 2)
    assert decision.reason.endswith(
        " The loss is not finite on 2 known samples; they count as wrong."
    )


def test_tables_of_other_samples_are_not_compared():
    shuffled = replace(after(5), index=BEFORE.index.flip(0))
    with pytest.raises(
        EvaluationError, match=r"before \(train: 4, repair: 4\).*of different samples"
    ):
        judge(BEFORE, shuffled, Gate.instance())
    with pytest.raises(EvaluationError, match=r"after \(train: 5, repair: 3\)"):
        judge(BEFORE, replace(after(5), sizes=(5, 3)), Gate.instance())


@dataclass(frozen=True)
class OneFor(Gate):
    repaired: int = 10

    def allowed(self, counts: FlipCounts) -> int:
        return counts.repaired // self.repaired

    @property
    def rule(self) -> str:
        return f"one for {self.repaired} repaired"

    def __str__(self) -> str:
        return f"one-for:{self.repaired}"


def test_a_registered_gate_of_ones_own_is_read_with_its_argument(monkeypatch):
    monkeypatch.setattr(GATES, "on_demand", {"one-for": f"{__name__}:OneFor"})
    assert Gate.parse("one-for:3") == OneFor(3)
    assert Gate.parse("one-for") == OneFor()
    assert parse_rule("one-for:3 in test") == AtMostBroken(OneFor(3), ("test",))
    assert judge(BEFORE, after(0, 5, 6), OneFor(2)).accepted
    assert judge(BEFORE, after(0, 5), OneFor(2)).status == "refused"
    with pytest.raises(ConfigurationError, match="'few' is no number"):
        Gate.parse("one-for:few")


def test_a_gate_of_ones_own_on_the_target_is_judged_alike_with_samples_and_with_counts():
    class OneInTarget(Tolerance):
        needs_target = True

    before = replace(BEFORE, in_target=torch.tensor([i in (1, 5, 6, 7) for i in range(8)]))
    for flipped, excess in (((0, 1, 5), 0), ((1, 5, 7), 1)):
        flips = Flips.between(before, after(*flipped))
        gate = OneInTarget(1)
        cost = gate.cost(before, flips.broken)
        assert (
            gate.excess_of(flips.counts(), cost)
            == gate.excess_of(flips.target_counts(before))
            == excess
        )
        assert judge(before, after(*flipped), gate).accepted is (excess == 0)


tables = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=2, max_size=30)


@settings(max_examples=80, deadline=None)
@given(tables, st.sampled_from(["instance", "accuracy", "tolerance:2", "tolerance:10%"]))
def test_accepted_means_what_it_says(rows, text):
    old = [row[0] for row in rows]
    new = [row[1] for row in rows]
    targeted = [row[2] and not row[0] for row in rows]
    gate = Gate.parse(text)
    decision = judge(evidence(old, targeted), evidence(new), gate)
    broken = sum(o and not n for o, n in zip(old, new, strict=True))
    repaired = sum(t and n for t, n in zip(targeted, new, strict=True))
    assert decision.accepted is (repaired > 0 and broken <= gate.allowed(decision.counts))
    assert decision.counts.broken == broken


@dataclass(frozen=True)
class Unlimited(OneFor):
    """Allows no finite number of broken samples."""

    limit: float = math.nan

    def allowed(self, counts: FlipCounts) -> int:
        return self.limit


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_gate_without_a_finite_limit_accepts_nothing(limit):
    decision = judge(BEFORE, after(0, 5, 6), Unlimited(limit=limit))
    assert decision.status == "refused"
    assert f"the gate allows {limit}, which is no number of samples" in decision.reason
    rule = AtMostBroken(Unlimited(limit=limit))
    assert rule.is_worse(FlipCounts(kept=5, broken=1, repaired=3, failing=0), 1)
