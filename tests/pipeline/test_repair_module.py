from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_repairs import known, quick, right, trained, unseen

from lightning_nrl import ConfigurationError, Gate, Target, repair_module
from lightning_nrl.errors import EmptyLocalizationError, EvaluationError
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.localization import AllWeights, Localizer
from lightning_nrl.pipeline import Outcome
from lightning_nrl.records import Hashes, hash_tensors
from lightning_nrl.search import Fitness, FitnessFunction


class Mute(FitnessFunction):
    """A fitness by which no candidate is better than another."""

    def __call__(self, scores: Any, original: Any) -> Tensor:
        return torch.zeros_like(scores.patched)


@dataclass(frozen=True)
class Never(Gate):
    """Accepts nothing."""

    rule = "less than none"

    def allowed(self, counts: FlipCounts) -> int:
        return -1

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Nowhere(Localizer):
    """A localizer that finds no weight."""

    include_bias: bool = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise EmptyLocalizationError("`localizer` leaves no weight.", "another layer.")


class Aliased(nn.Module):
    """A model whose head has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(trained()[0], nn.ReLU())
        self.exit = self.head = trained()[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.body(x))


@pytest.mark.parametrize(
    ("layer", "include_bias", "names"),
    [
        ("auto", True, ["2.weight", "2.bias"]),
        ("0", False, ["0.weight"]),
        (["0", "2"], False, ["0.weight", "2.weight"]),
    ],
)
def test_the_counts_of_an_accepted_repair_are_those_of_the_written_model(
    layer, include_bias, names
):
    model, sources = trained(), [*known(), *unseen()]
    before = [right(model, source) for source in sources]
    settings = quick(layer=layer, localizer=AllWeights(include_bias=include_bias))
    outcome = repair_module(model, sources[:2], settings, unseen=sources[2:])
    assert outcome.report.status == "repaired"
    assert outcome.write(model)
    for source, old, split in zip(sources, before, outcome.report.splits, strict=True):
        new = right(model, source)
        assert (split.split, split.n) == (source.split, len(source))
        assert FlipCounts.of(old, new) == FlipCounts(
            split.kept, split.broken, split.repaired, split.failing
        )
        assert split.repaired_ids == tuple((~old & new).nonzero().flatten().tolist())
        assert split.broken_ids == tuple((old & ~new).nonzero().flatten().tolist())
        assert split.broken == 0 or split.role == "unseen"
    assert list(outcome.parameters) == names


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 9999),
    layer=st.sampled_from(["0", "auto"]),
    kind=st.sampled_from(["lexicographic", "eq1", "eq2"]),
)
def test_an_accepted_repair_has_broken_nothing_that_is_known(seed, layer, kind):
    model, sources = trained(seed=seed % 7), known(seed)
    before = [right(model, source) for source in sources]
    outcome = repair_module(model, sources, quick(layer=layer, seed=seed, fitness=Fitness(kind)))
    changed = outcome.write(model)
    assert changed is (outcome.report.status == "repaired")
    after = [right(model, source) for source in sources]
    assert not any((old & ~new).any() for old, new in zip(before, after, strict=True))
    assert changed is bool((~before[1] & after[1]).any())


def test_unseen_failures_of_the_target_are_counted_and_never_searched():
    model, settings = trained(), quick(target=Target.label(0))
    (later,) = (replace(source, passed=True, failed=True) for source in unseen())
    wrong = ~right(model, later) & (later.targets == 0)
    outcome = repair_module(model, known(), settings, unseen=[later])
    without = repair_module(model, known(), settings)
    assert outcome.report.splits[2].targeted_ids == tuple(wrong.nonzero().flatten().tolist())
    assert torch.equal(outcome.change, without.change)


def test_refused_weights_stay_out_and_the_report_says_what_they_would_do():
    model, sources = trained(), known()
    outcome = repair_module(model, sources, quick(gate=Never()), unseen=unseen())
    report = outcome.report
    assert report.status == "refused"
    assert outcome.parameters is None
    assert not outcome.write(model)
    assert [(split.repaired, split.broken) for split in report.splits] == [(0, 0)] * 3
    assert [split.split for split in report.candidate] == ["train", "new"]
    assert report.candidate[1].repaired_in_target > 0
    layer, state = hash_tensors({"2.weight": model[2].weight}), hash_tensors(model.state_dict())
    assert report.hashes == Hashes(layer, layer, state, state)
    assert report.change.changed == len(outcome.change)


@pytest.mark.parametrize("layer", ["auto", "head", "exit"])
def test_the_hash_after_is_that_of_the_written_model_under_all_its_names(layer):
    model = Aliased()
    before = hash_tensors(model.state_dict())
    outcome = repair_module(model, known(), quick(layer=layer, localizer=AllWeights()))
    hashes = outcome.report.hashes
    assert hashes.model_before == before == hash_tensors(model.state_dict())
    assert outcome.write(model)
    assert hashes.model_after == hash_tensors(model.state_dict()) != before
    assert sorted(outcome.parameters) == ["exit.weight", "head.weight"]


def test_without_failures_there_is_nothing_to_repair():
    model = trained()

    def is_passed(batch: Any) -> Tensor:
        return model(batch[0]).argmax(1) == batch[1]

    outcome = repair_module(model, known(), quick(target=Target.where(is_passed)))
    assert outcome == Outcome(outcome.report)
    assert outcome.report.status == "nothing to repair"
    reason = "no failed sample of new is in the target (where is_passed); failures in all:"
    assert outcome.report.reason.startswith(reason)


def test_a_class_that_does_not_occur_or_that_the_model_does_not_have_is_named():
    sources = [replace(source, targets=source.targets.clamp_max(1)) for source in known()]
    report = repair_module(trained(), sources, quick(target=Target.label(2))).report
    assert report.status == "nothing to repair"
    assert report.reason == "no sample of new, right or wrong, is in the target (label 2)."
    with pytest.raises(ConfigurationError, match=r"no class 7.\nHINT: .* classes 0 to 2"):
        repair_module(trained(), known(), quick(target=Target.label(7)))


def test_without_passed_samples_a_warning_says_why():
    model = trained()
    model[2].bias.data[0] = 100.0
    sources = [replace(source, targets=torch.full((len(source),), 2)) for source in known()]
    with pytest.warns(UserWarning, match="not repaired: no known sample passes"):
        outcome = repair_module(model, sources, quick())
    assert outcome.report.status == "not repaired"


def test_an_empty_localisation_is_a_report_with_a_warning():
    with pytest.warns(UserWarning, match="not repaired: `localizer` leaves no weight") as caught:
        outcome = repair_module(trained(), known(), quick(localizer=Nowhere()), unseen=unseen())
    assert caught[0].filename == __file__
    assert outcome.report.status == "not repaired"
    assert [split.role for split in outcome.report.splits] == ["known", "known", "unseen"]


def test_a_search_that_finds_nothing_better_says_so():
    outcome = repair_module(trained(), known(), quick(fitness=Mute()))
    assert outcome.report.status == "not repaired"
    assert "nothing better than the original weights" in outcome.report.reason
    assert outcome.change is outcome.parameters is None


def test_a_loss_that_is_not_finite_names_the_samples():
    sources = known()
    sources[1].inputs[3:5] = float("nan")
    with pytest.raises(
        EvaluationError, match=r"NaN or infinite on 2 known samples \(new: \[3, 4\]\)"
    ):
        repair_module(trained(), sources, quick())


@pytest.mark.parametrize(
    ("sources", "arguments", "problem"),
    [
        (known()[:1], {}, "`known`: no source is marked `failed`"),
        (known()[1:], {"n_passed": 3}, "`n_passed=3`: no known source is marked `passed`"),
        ([*known(), known()[0]], {}, r"the splits \['train', 'new', 'train'\]"),
        (known(), {"layer": "4"}, "`layer='4'` is not in the model"),
    ],
)
def test_wrong_data_or_layers_are_refused_before_the_model_runs(sources, arguments, problem):
    model = trained()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ConfigurationError, match=problem):
        repair_module(model, sources, quick(**arguments))


def test_stages_and_progress_are_told_in_order():
    events = []

    class Listener:
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            events.append(name)
            yield

        def expect(self, seconds: Mapping[str, float], most: float) -> None:
            events.append((set(seconds), most))

        def search(self, done: int, total: int, repaired: int, broken: int) -> None:
            events.append((done, total))

    outcome = repair_module(trained(), known(), quick(), observer=Listener())
    expected = ({"judge"}, math.inf)
    search = ["localize", "search", (10, 12), (12, 12)]
    assert events == ["collect", expected, *search, "judge", "strength", "judge", "judge"]
    assert list(outcome.report.seconds) == ["collect", "localize", "search", "judge", "strength"]
