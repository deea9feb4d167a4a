"""A new model against the one that it replaces: what it broke is brought back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_repairs import known, right, trained, unseen

from lightning_nrl import RepairReport, SampleOptions, Settings, TensorSource, repair_module
from lightning_nrl._trainer.tracking.scalars import outcome
from lightning_nrl.methods import Polish
from lightning_nrl.updates.old_model import OldModel

LINE = torch.tensor([[value, 1.0] for value in (-2.0, -1.0, 0.3, 1.0, 2.0)])
CLASS = torch.tensor([0, 0, 1, 1, 1])


def threshold(at: float) -> nn.Module:
    """Says class 1 from there on."""
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict({"weight": torch.tensor([[0.0, at], [1.0, 0.0]])})
    return model


def line() -> list[TensorSource]:
    return [
        TensorSource(LINE[:3], CLASS[:3], split="train", passed=True),
        TensorSource(LINE[3:], CLASS[3:], split="new", failed=True),
    ]


def test_regressions_are_repaired_wherever_they_are_known() -> None:
    new = threshold(0.5)  # wrong on 0.3, a training sample; the replaced model was right there
    later = [TensorSource(torch.tensor([[0.4, 1.0], [-0.5, 1.0]]), torch.tensor([1, 0]), split="later")]
    outcome = repair_module(new, line(), unseen=later, reference=OldModel(threshold(0.1)))
    report = outcome.report
    assert report.status == "repaired"
    known, aside = report.pooled_update("known"), report.pooled_update("unseen")
    assert known is not None
    assert aside is not None
    assert (known.trained.kept, known.trained.broken, known.trained.repaired) == (4, 1, 0)
    assert (known.now.kept, known.now.broken) == (5, 0)
    assert known.trained.broken_ids == ()  # pooled; by split they are named
    assert report.update[0].trained.broken_ids == (2,)
    assert aside.trained.broken == 1
    assert aside.now.broken <= 1  # measured, not promised
    assert "Of 5 known samples that the replaced model gets right, the new one got 1 wrong and gets 0 wrong now." in (
        report.reason
    )
    assert outcome.write(new)
    assert new(LINE).argmax(1).tolist() == CLASS.tolist()


def test_what_the_replaced_model_got_wrong_too_is_no_target() -> None:
    report = repair_module(threshold(0.5), line(), reference=OldModel(threshold(0.4))).report
    assert report.status == "nothing to repair"
    assert report.reason.startswith("no known sample in the target (all failures) that the replaced model gets right")
    assert report.pooled_update("known").now.broken == 0  # type: ignore[union-attr]


def test_an_update_is_read_as_it_was_written_and_logged() -> None:
    report = repair_module(threshold(0.5), line(), reference=OldModel(threshold(0.1))).report
    again = RepairReport.from_json(report.to_json())
    assert again == report
    assert again.to_dict()["update"][0]["trained"]["negative_flip_rate"] == pytest.approx(1 / 3)
    text = report.to_markdown()
    assert "## Against the model that it replaces" in text
    assert "| regressions now" in text.replace("**", "")
    numbers = {"known_regressions_before": 1, "known_regressions": 0, "known_nfr": 0}
    found = outcome(report)
    assert {name: found[f"repair/{name}"] for name in numbers} == numbers


def updated(old: nn.Module, steps: int = 30) -> nn.Module:
    """The old model after more training on the new data alone, which makes it forget."""
    new = copy.deepcopy(old).train()
    source = known()[1]
    optimizer = torch.optim.Adam(new.parameters(), lr=0.03)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            assert isinstance(source.inputs, Tensor)
            F.cross_entropy(new(source.inputs), source.targets).backward()
            optimizer.step()
    return new


def rights(model: nn.Module) -> Tensor:
    return torch.cat([right(model, source) for source in known()])


@pytest.mark.parametrize("keep", ["both", "reference"])
@pytest.mark.parametrize("method", ["auto", Polish()])
def test_nothing_that_may_not_break_breaks(keep: Any, method: Any) -> None:
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
    assert torch.equal(rights(new), trained_new)
    outcome.write(new)
    now = rights(new)
    assert not (kept & ~now).any()
    assert now.sum() >= trained_new.sum()
    update = outcome.report.pooled_update("known")
    assert update is not None
    assert update.trained.broken == int((was & ~trained_new).sum())
    assert update.now.broken == int((was & ~now).sum())
    assert outcome.report.status == ("repaired" if update.now.broken < update.trained.broken else "not repaired")


def test_what_only_the_new_model_gets_right_may_break_for_as_many_regressions_alone() -> None:
    class Worse:
        """Brings one regression back, and breaks two samples that only the new model gets right."""

        def __call__(self, problem: Any) -> Any:
            from lightning_nrl.methods import Solution

            return Solution(problem.propose("worse", {"weight": threshold(0.1).weight.detach()}))

    x = torch.tensor([[value, 1.0] for value in (-1.0, 0.3, 0.2, 0.25, 1.0)])
    source = TensorSource(x, torch.tensor([0, 1, 0, 0, 1]), split="all", passed=True, failed=True)
    settings = Settings(samples=SampleOptions(keep="reference"), method=Worse())
    report = repair_module(threshold(0.5), [source], settings, reference=OldModel(threshold(0.1))).report
    assert report.status == "refused"
    assert "2 would break" in report.reason
