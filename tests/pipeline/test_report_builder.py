from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, trained

from lightning_nrl import repair_module
from lightning_nrl._model.layers import find_layers
from lightning_nrl._utils.hashing import hash_tensors
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.gate import Verdict, judge
from lightning_nrl.localization import AllWeights
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.report_builder import ReportBuilder
from lightning_nrl.report import Hashes


class Aliased(nn.Module):
    """One head under two names, as a model that shares modules has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(trained()[0], nn.ReLU())
        self.head = trained()[2]
        self.exit = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.body(x))


def builder(model: nn.Module, layer: str, **settings: Any) -> ReportBuilder:
    evaluator = Evaluator(model)
    results = evaluator.run(known())
    baseline = Baseline(results, results, {}, torch.zeros_like(results.passed))
    return ReportBuilder(
        evaluator, find_layers(model, layer), quick(layer=layer, **settings), baseline, {"collect": 0.5}
    )


def judged(model: nn.Module, new: dict[str, Tensor], gate: Any = None) -> tuple[ReportBuilder, Verdict, SampleResults]:
    own = builder(model, "2")

    def changed(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, new, (x,))

    after = Evaluator(model).run(known(), forward=changed)
    return own, judge(own.baseline.known, after, own.settings.gate), after


def hashed(model: nn.Module) -> str:
    return hash_tensors(model.state_dict())


@pytest.mark.parametrize("layer", ["auto", "head", "exit"])
def test_the_hash_after_is_that_of_the_written_model_under_all_its_names(layer: str) -> None:
    model = Aliased()
    before = hashed(model)
    outcome = repair_module(model, known(), quick(layer=layer, localizer=AllWeights()))
    hashes = outcome.report.hashes
    assert hashes is not None
    assert hashes.model_before == before == hashed(model)
    assert outcome.write(model)
    assert hashes.model_after == hashed(model) != before
    assert torch.equal(model.head.weight, model.exit.weight)
    assert list(outcome.parameters) == ["head.weight", "exit.weight"]


def test_a_repair_without_a_candidate_has_unchanged_weights_and_what_was_reached() -> None:
    model = trained()
    report = builder(model, "2").without_candidate("nothing to repair", "no failures.")
    layers = hash_tensors({"2.weight": model[2].weight})
    assert report.hashes == Hashes(layers, layers, hashed(model), hashed(model))
    assert (report.localization, report.search, report.change) == (None, None, None)
    assert report.candidate == ()
    assert report.seconds == {"collect": 0.5}
    assert [(split.split, split.broken, split.repaired) for split in report.splits] == [("train", 0, 0), ("new", 0, 0)]
    assert report.layers == ("2",)
    assert report.settings["layer"] == "2"


def test_a_candidate_that_repairs_nothing_is_reported_beside_the_unchanged_model() -> None:
    model = trained()
    own, verdict, after = judged(model, {"2.weight": torch.zeros(3, 12)})
    assert verdict.status == "not repaired"
    report = own.with_candidate(verdict, {"2.weight": torch.zeros(3, 12)}, after)
    assert sum(split.broken for split in report.candidate) == verdict.counts.broken > 0
    assert sum(split.broken for split in report.splits) == 0
    assert report.hashes.layers_after == report.hashes.layers_before
    assert report.change.changed == 36
    assert report.change.l2 == pytest.approx(float(model[2].weight.detach().norm()))


def test_the_slices_of_a_refused_candidate_are_counted() -> None:
    new = {"2.weight": torch.zeros(3, 12)}
    own, verdict, after = judged(trained(), new)
    known_data = replace(own.baseline.known, names=("all",), group=torch.zeros(len(after), dtype=torch.int64))
    (row,) = replace(own, baseline=replace(own.baseline, known=known_data)).with_candidate(verdict, new, after).slices
    assert verdict.status == "not repaired"
    assert (row.role, row.counts.broken) == ("known", verdict.counts.broken)
    assert row.counts.broken > 0


def test_a_layer_that_is_the_model_itself_goes_by_its_kind() -> None:
    model = nn.Linear(4, 3)
    report = builder(model, "auto").without_candidate("not repaired", "a reason")
    assert report.layers == ("Linear",)
    assert report.hashes.layers_before == hash_tensors({"weight": model.weight})
