"""Two classes from one logit a sample, as binary cross entropy trains them, without a word about
the task.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_repairs import blobs, quick

from lightning_nrl import Settings, Target, TensorSource, repair_module
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Binary


def points(n: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """`n x 4` points and whether they are of the class that `shift` moves, as `n x 1` floats."""
    x, label = blobs(n, shift, seed)
    return x, (label == 0)[:, None].float()


def learned(*end: nn.Module) -> nn.Module:
    """Ends after the only logit, which was trained, as the modules say."""
    x, y = points(120, 0.0, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
    return nn.Sequential(*model, *end)


def known() -> list[TensorSource]:
    return [
        TensorSource(*points(120, 0.0, 0), "train", passed=True),
        TensorSource(*points(60, 1.5, 1), "new", failed=True),
    ]


@torch.no_grad()
def right(model: nn.Module) -> Tensor:
    x, y = torch.cat([s.inputs for s in known()]), torch.cat([s.targets for s in known()])
    return (model.eval()(x).view(-1) > 0) == y.view(-1).bool()


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ({"method": "auto"}, ()),
        ({"method": "finetune-polish"}, (nn.Flatten(0),)),
        ({"method": "convex"}, ()),
        ({}, ()),  # a swarm
    ],
)
def test_every_method_repairs_what_a_plain_threshold_counts(method, end):
    model = learned(*end)
    before, is_1 = right(model), torch.cat([source.targets.view(-1) == 1 for source in known()])
    outcome = repair_module(model, known(), quick(target=Target.label(1), **method))
    assert outcome.write(model)
    after = right(model)
    assert not (before & ~after).any()
    assert sum(split.repaired for split in outcome.report.splits) == int((after & ~before).sum())
    assert (after & ~before & is_1).any()


def test_a_diagnosis_knows_the_last_layer():
    diagnosis = diagnose_module(learned(nn.Flatten(0)), known())
    assert diagnosis.head == "2"
    assert set(diagnosis.costs) >= {"convex", "swarm", "auto"}


def test_labels_have_any_dtype():
    settings = Settings(method="convex")
    expected = repair_module(learned(), known(), settings).report.splits
    for form in (
        lambda y: y[:, 0],
        lambda y: y.long(),
        lambda y: y[:, 0].bool(),
        lambda y: y.byte(),
    ):
        sources = [replace(source, targets=form(source.targets)) for source in known()]
        assert repair_module(learned(), sources, settings).report.splits == expected


def test_probabilities_are_not_taken_for_logits_without_a_word():
    with pytest.warns(
        DataWarning, match=r"all outputs on `new` data are from 0 to 1, but count as logits"
    ):
        repair_module(learned(nn.Sigmoid()), known(), quick())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        repair_module(learned(), known(), quick())


def test_a_report_says_binary_where_it_was_asked_for():
    model = learned()
    asked = repair_module(Evaluator(model, Binary()), known(), Settings(method="convex")).report
    assert asked.task == "Binary"
    assert asked.splits == repair_module(model, known(), Settings(method="convex")).report.splits
