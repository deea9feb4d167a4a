"""A new model against the one that it replaces: regressions are repaired or trained on more."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plane import points, threshold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy_problems import left_alone
from toy_repairs import known, right, trained, unseen

from lightning_nrl import ConfigurationError, SampleOptions, Settings, repair_module
from lightning_nrl.methods import Method, Polish, Solution
from lightning_nrl.updates import Oversampler
from lightning_nrl.updates.old_model import OldModel

LINE = [
    points([-2.0, -1.0, 0.3], [0, 0, 1], "train", passed=True),
    points([1.0, 2.0], [1, 1], "new", failed=True),
]


def test_regressions_are_repaired_wherever_they_are_known():
    new = threshold(0.5)  # wrong on 0.3, a training sample; the replaced model was right there
    later = [points([0.4, -0.5], [1, 0], "later")]
    outcome = repair_module(new, LINE, unseen=later, reference=OldModel(threshold(0.1)))
    report = outcome.report
    assert report.status == "repaired"
    known, aside = report.pooled_update("known"), report.pooled_update("unseen")
    assert (known.trained.kept, known.trained.broken, known.trained.repaired) == (4, 1, 0)
    assert (known.final.kept, known.final.broken) == (5, 0)
    assert known.trained.broken_ids == ()  # pooled; by split they are named
    assert report.update[0].trained.broken_ids == (2,)
    assert aside.trained.broken == 1
    assert aside.final.broken <= 1  # measured, not promised
    assert "the new one got 1 wrong and gets 0 wrong now." in report.reason
    assert outcome.write(new)
    assert right(new, LINE[0]).all()


def test_what_the_replaced_model_got_wrong_too_is_no_target():
    report = repair_module(threshold(0.5), LINE, reference=OldModel(threshold(0.4))).report
    assert report.status == "nothing to repair"
    assert report.reason.startswith(
        "no known sample in the target (all failures) is right under the replaced model"
    )
    assert report.pooled_update("known").final.broken == 0


def updated(old: nn.Module, steps: int = 30, seed: int = 0) -> nn.Module:
    """The old model after more training on the new data alone, which makes it forget."""
    new = copy.deepcopy(old).train()
    source = known(seed)[1]
    optimizer = torch.optim.Adam(new.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(new(source.inputs), source.targets).backward()
        optimizer.step()
    return new


def rights(model: nn.Module) -> Tensor:
    return torch.cat([right(model, source) for source in known()])


@pytest.mark.parametrize("keep", ["both", "reference"])
@pytest.mark.parametrize("method", ["auto", Polish()])
def test_nothing_that_may_not_break_breaks(keep, method):
    old = trained()
    new = updated(old)
    was, trained_new = rights(old), rights(new)
    assert (was & ~trained_new).any()
    kept = was & trained_new if keep == "reference" else trained_new
    outcome = repair_module(
        new,
        known(),
        Settings(samples=SampleOptions(keep=keep), method=method),
        unseen=unseen(),
        reference=OldModel(old),
    )
    outcome.write(new)
    now = rights(new)
    assert not (kept & ~now).any()
    assert now.sum() >= trained_new.sum()
    update = outcome.report.pooled_update("known")
    assert update.trained.broken == int((was & ~trained_new).sum())
    assert update.final.broken == int((was & ~now).sum())
    assert outcome.report.status == (
        "repaired" if update.final.broken < update.trained.broken else "not repaired"
    )


def test_what_only_the_new_model_gets_right_may_break_for_as_many_regressions_alone():
    class Worse(Method):
        """Brings one regression back, and breaks two samples that only the new model gets right."""

        def __call__(self, problem: Any) -> Any:
            return Solution(problem.propose("worse", {"weight": threshold(0.05).weight.detach()}))

    # The old model gets 0.07 wrong, too: its repair brings no regression back.
    inputs, labels = [-1.0, 0.3, 0.2, 0.25, 0.07, 1.0], [0, 1, 0, 0, 1, 1]
    source = points(inputs, labels, "all", passed=True, failed=True)
    settings = Settings(samples=SampleOptions(keep="reference"), method=Worse())
    report = repair_module(
        threshold(0.5), [source], settings, reference=OldModel(threshold(0.1))
    ).report
    assert report.status == "refused"
    assert "2 would break (2 in all); the gate allows one per repaired regression, here 1" in (
        report.reason
    )


def test_a_method_that_breaks_too_many_runs_again_and_keeps_all():
    old = trained(seed=1)
    new = updated(old, seed=1)
    settings = Settings(samples=SampleOptions(keep="reference"))
    report = repair_module(new, known(1), settings, reference=OldModel(old)).report
    counts = report.known_counts
    assert (report.status, counts.broken) == ("repaired", 0)
    assert counts.repaired_in_target > 0
    assert report.steps[-1].name == "polish, keeping all"


PASSED = torch.tensor([True, True, True, False, True])
MARGIN = torch.tensor([8.0, 2.9, 10.0, -1.0, 8.0])


def test_failed_and_near_border_samples_come_more_often():
    # The median margin of the passed samples is 8, and 3/8 of it are 3.
    sampler = Oversampler(PASSED, MARGIN, oversample=3)
    assert sampler.times.tolist() == [1, 3, 1, 3, 1]
    assert len(sampler) == 9
    assert Counter(sampler) == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert Oversampler(PASSED, oversample=2).times.tolist() == [1, 1, 1, 2, 1]
    assert Oversampler(~torch.ones(2, dtype=torch.bool), torch.zeros(2)).times.tolist() == [3, 3]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-5, 20)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_epoch_has_each_sample_as_often_as_it_says(rows, oversample, seed):
    passed, margin = torch.tensor([p for p, _ in rows]), torch.tensor([m for _, m in rows])
    first, again = (Oversampler(passed, margin, oversample, seed) for _ in range(2))
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(again) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(first)
        assert Counter(epoch) == {i: int(n) for i, n in enumerate(first.times)}
    again.set_epoch(1)
    assert list(again) == epochs[1]
    assert (first.times[~passed] == oversample).all()
    assert set(first.times.tolist()) <= {1, oversample}


def test_one_pass_of_a_model_over_the_data_tells_what_is_hard():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2, bias=False))
    model[1].load_state_dict({"weight": torch.eye(2)})
    x = torch.tensor([[8.0, 0.0], [0.0, 8.0], [8.0, 0.0], [2.0, 0.0], [0.0, 1.0], [math.nan, 0.0]])
    data = TensorDataset(x, torch.tensor([0, 1, 0, 0, 0, 0]))
    with left_alone(model):
        sampler = Oversampler.of(model, data, oversample=2, batch_size=4)
    assert sampler.times.tolist() == [1, 1, 1, 2, 2, 2]
    assert sum(len(batch[0]) for batch in DataLoader(data, 2, sampler=sampler)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passed": torch.ones(3)}, "is no tensor with one bool per sample"),
        ({"margin": torch.ones(4)}, r"`margin` has the shape \[4\], `passed` \[5\]"),
        ({"oversample": 0}, "`oversample=0` is out of range"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Oversampler(**{"passed": PASSED, "margin": MARGIN, **arguments})
