"""Models and tasks of all kinds, without Lightning: a module, tensors, and an outcome to write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import Within, known, quick, right, trained

from lightning_nrl import ConfigurationError, Settings, Target, TensorSource, repair_module
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights
from lightning_nrl.pipeline.input_checks import run_sanity_check
from lightning_nrl.records import hash_tensors
from lightning_nrl.tasks import Custom


@dataclass
class Output:
    """What many models return."""

    logits: Tensor
    loss: Tensor | None = None


class ByName(nn.Module):
    """Called by keywords, with a mask; gives an object, or a mapping, with logits."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.body = trained()
        self.kind = kind

    def forward(self, *, x: Tensor, mask: Tensor) -> Any:
        return self.kind(logits=self.body(x * mask[:, None]))


@pytest.mark.parametrize("kind", [Output, dict])
def test_models_that_take_keywords_and_return_an_object(kind):
    model = ByName(kind)
    sources = [replace(s, inputs={"x": s.inputs, "mask": torch.ones(len(s))}) for s in known()]
    outcome = repair_module(model, sources, quick())
    plain = repair_module(trained(), known(), quick())
    assert [(s.repaired_ids, s.broken_ids) for s in outcome.report.splits] == [
        (s.repaired_ids, s.broken_ids) for s in plain.report.splits
    ]
    assert list(outcome.parameters) == ["body.2.weight"]


def test_a_task_of_the_user_s_own_without_classes():
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    model[0].bias.data.zero_()
    x = torch.eye(4).repeat(5, 1) * torch.linspace(0.8, 1.2, 20)[:, None]
    y = x.sum(1)  # the last input counts too, and the model leaves it out
    sources = [TensorSource(x, y, split="data", failed=True)]
    evaluator = Evaluator(model, Within())
    outcome = repair_module(evaluator, sources, quick(localizer=AllWeights()))
    assert outcome.report.status == "repaired"
    assert outcome.report.task == "Within"
    assert outcome.report.splits[0].targeted_ids == tuple(range(3, 20, 4))
    assert outcome.report.splits[0].broken == 0
    with pytest.raises(ConfigurationError, match="asks for classes, and the task has none"):
        repair_module(evaluator, sources, quick(target=Target.label(0)))


@pytest.mark.parametrize("method", ["swarm", "neurecover-lite", "arachne", "auto"])
def test_counts_and_a_loss_of_0_and_1_suffice_for_a_search(method):
    def passed(output: Tensor, target: Tensor) -> Tensor:
        return output.argmax(1) == target

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) != target).float()

    model, data = trained(), known()
    before = torch.cat([right(model, source) for source in data])
    evaluator, settings = Evaluator(model, Custom(passed, loss)), Settings(method=method)
    run_sanity_check(evaluator, data, settings)
    with pytest.warns(DataWarning, match="`task`: its loss has no gradient"):
        outcome = repair_module(evaluator, data, settings)
    assert outcome.write(model)
    after = torch.cat([right(model, source) for source in data])
    assert (
        0 < int((after & ~before).sum()) == sum(split.repaired for split in outcome.report.splits)
    )
    assert bool(after[before].all())
    is_said = "Only a search ran" in outcome.report.to_markdown()
    assert is_said == (method == "auto")


def test_double_and_half_precision_are_repaired_as_they_are():
    for dtype in (torch.float64, torch.bfloat16):
        model = trained().to(dtype)
        sources = [replace(s, inputs=s.inputs.to(dtype)) for s in known()]
        before = [right(model, s) for s in sources]
        outcome = repair_module(model, sources, quick())
        assert outcome.report.status == "repaired"
        assert outcome.parameters["2.weight"].dtype == dtype
        outcome.write(model)
        for source, old, split in zip(sources, before, outcome.report.splits, strict=True):
            assert split.repaired == int((~old & right(model, source)).sum())


def test_the_gate_judges_in_the_precision_that_is_deployed():
    def deployed() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    model, sources = trained(), known()
    with deployed():
        before = [right(model, source) for source in sources]
    outcome = repair_module(Evaluator(model, context=deployed), sources, quick())
    assert outcome.write(model)
    for source, old, split in zip(sources, before, outcome.report.splits, strict=True):
        with deployed():
            new = right(model, source)
        assert (split.repaired, split.broken) == (int((~old & new).sum()), int((old & ~new).sum()))
    assert model[2].weight.dtype == torch.float32


def test_an_outcome_is_written_whole_or_not_at_all():
    model = trained()
    outcome = repair_module(model, known(), quick(layer=["0", "2"], localizer=AllWeights()))
    other = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4))
    before = hash_tensors(other.state_dict())
    with pytest.raises(ConfigurationError, match=r"tensor '2.weight' has the shape \[4, 12\]"):
        outcome.write(other)
    with pytest.raises(ConfigurationError, match=r"tensor '0.weight' is missing"):
        outcome.write(nn.Linear(4, 3))
    assert hash_tensors(other.state_dict()) == before
    assert outcome.write(model.double())
    assert torch.equal(model[2].weight, outcome.parameters["2.weight"].double())
