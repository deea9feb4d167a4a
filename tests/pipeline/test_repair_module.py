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
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.errors import EmptyLocalizationError, EvaluationError
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.localization import AllWeights, Localizer
from lightning_nrl.pipeline import Outcome
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

    def __call__(self, recording: Any, evaluator: Any, **rest: Any) -> Any:
        raise EmptyLocalizationError(
            "`localizer` leaves no weight at N_g = 5 of 36.", "another layer."
        )


class Aliased(nn.Module):
    """One head under two names, as a model that shares modules has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(trained()[0], nn.ReLU())
        self.exit = self.head = trained()[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.body(x))


@pytest.mark.parametrize("layer", ["auto", "0", ["0", "2"]])
@pytest.mark.parametrize("include_bias", [False, True])
def test_the_counts_of_an_accepted_repair_are_those_of_the_written_model(
    layer: Any, include_bias: bool
) -> None:
    model, sources, later = trained(), known(), unseen()
    before = [right(model, source) for source in (*sources, *later)]
    outcome = repair_module(
        model,
        sources,
        quick(layer=layer, localizer=AllWeights(include_bias=include_bias)),
        unseen=later,
    )
    assert outcome.report.status == "repaired"
    assert outcome.write(model)
    for source, old, split in zip((*sources, *later), before, outcome.report.splits, strict=True):
        new = right(model, source)
        assert split.role == ("unseen" if source in later else "known")
        assert (split.split, split.n, split.passed) == (source.split, len(source), int(old.sum()))
        assert split.repaired_ids == tuple((~old & new).nonzero().flatten().tolist())
        assert split.broken_ids == tuple((old & ~new).nonzero().flatten().tolist())
        assert (split.kept, split.failing) == (int((old & new).sum()), int((~old & ~new).sum()))
        assert split.broken == 0 or split.role == "unseen"
    names = {"0": ["0"], "auto": ["2"]}.get(str(layer), ["0", "2"])
    kinds = ["weight", "bias"] if include_bias else ["weight"]
    assert list(outcome.parameters or ()) == [f"{name}.{kind}" for name in names for kind in kinds]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 9999),
    layer=st.sampled_from(["0", "auto"]),
    kind=st.sampled_from(["lexicographic", "eq1", "eq2"]),
)
def test_an_accepted_repair_has_broken_nothing_that_is_known(
    seed: int, layer: str, kind: Any
) -> None:
    model, sources = trained(seed=seed % 7), known(seed)
    before = [right(model, source) for source in sources]
    outcome = repair_module(model, sources, quick(layer=layer, seed=seed, fitness=Fitness(kind)))
    changed = outcome.write(model)
    assert changed is (outcome.report.status == "repaired")
    after = [right(model, source) for source in sources]
    assert not any((old & ~new).any() for old, new in zip(before, after, strict=True))
    assert changed is bool((~before[1] & after[1]).any())


def test_unseen_failures_of_the_target_are_counted_and_never_searched() -> None:
    model, later = trained(), unseen()
    wrong = ~right(model, later[0]) & (later[0].targets == 0)
    outcome = repair_module(model, known(), quick(target=Target.label(0)), unseen=later)
    without = repair_module(model, known(), quick(target=Target.label(0)))
    split = outcome.report.splits[2]
    assert split.targeted_ids == tuple(wrong.nonzero().flatten().tolist())
    assert torch.equal(outcome.change, without.change)
    marked = [replace(source, passed=True, failed=True) for source in later]
    assert repair_module(
        model, known(), quick(target=Target.label(0)), unseen=marked
    ).report.splits == (outcome.report.splits)


def test_refused_weights_stay_out_and_the_report_says_what_they_would_do() -> None:
    model, sources = trained(), known()
    outcome = repair_module(model, sources, quick(gate=Never()), unseen=unseen())
    report = outcome.report
    assert report.status == "refused"
    assert outcome.parameters is None
    assert not outcome.write(model)
    assert [(split.repaired, split.broken) for split in report.splits] == [(0, 0)] * 3
    assert [split.split for split in report.candidate] == ["train", "new"]
    assert report.candidate[1].repaired_in_target > 0
    assert report.hashes is not None
    assert (
        report.hashes.layers_before
        == report.hashes.layers_after
        == hash_tensors({"2.weight": model[2].weight})
    )
    assert (
        report.hashes.model_before == report.hashes.model_after == hash_tensors(model.state_dict())
    )
    assert report.change is not None
    assert report.change.changed == int((outcome.change != 0).sum())


@pytest.mark.parametrize("layer", ["auto", "head", "exit"])
def test_the_hash_after_is_that_of_the_written_model_under_all_its_names(layer: str) -> None:
    model = Aliased()
    before = hash_tensors(model.state_dict())
    outcome = repair_module(model, known(), quick(layer=layer, localizer=AllWeights()))
    hashes = outcome.report.hashes
    assert hashes is not None
    assert hashes.model_before == before == hash_tensors(model.state_dict())
    assert outcome.write(model)
    assert hashes.model_after == hash_tensors(model.state_dict()) != before
    assert sorted(outcome.parameters or ()) == ["exit.weight", "head.weight"]


def test_without_failures_there_is_nothing_to_repair() -> None:
    model = trained()

    def is_passed(batch: Any) -> Tensor:
        return model(batch[0]).argmax(1) == batch[1]

    outcome = repair_module(model, known(), quick(target=Target.where(is_passed)))
    assert outcome == Outcome(outcome.report)
    assert outcome.report.status == "nothing to repair"
    assert (
        "no failed sample of new is in the target (where is_passed); failures in all:"
        in outcome.report.reason
    )
    assert list(outcome.report.seconds) == ["collect"]
    assert outcome.report.localization is outcome.report.search is None


def test_a_class_that_does_not_occur_or_that_the_model_does_not_have_is_named() -> None:
    sources = [replace(source, targets=source.targets.clamp_max(1)) for source in known()]
    report = repair_module(trained(), sources, quick(target=Target.label(2))).report
    assert report.status == "nothing to repair"
    assert report.reason == "no sample of new, right or wrong, is in the target (label 2)."
    for target in (Target.label(7), Target.label(0) & ~Target.confusion(1, 7)):
        with pytest.raises(
            ConfigurationError,
            match=r"there is no class 7.\nHINT: the model has the classes 0 to 2",
        ):
            repair_module(trained(), known(), quick(target=target))


def test_without_passed_samples_a_warning_says_why() -> None:
    always_wrong = [
        replace(source, targets=torch.full_like(source.targets, 2)) for source in known()
    ]
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    model[0].bias.data = torch.tensor([1.0, 0, 0])
    with pytest.warns(UserWarning, match="not repaired: no known sample passes"):
        outcome = repair_module(model, always_wrong, quick())
    assert outcome.report.status == "not repaired"


def test_an_empty_localisation_is_a_report_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="not repaired: `localizer` leaves no weight") as caught:
        outcome = repair_module(trained(), known(), quick(localizer=Nowhere()), unseen=unseen())
    assert caught[0].filename == __file__
    assert outcome.report.status == "not repaired"
    assert outcome.report.localization is None
    assert list(outcome.report.seconds) == ["collect", "unseen", "localize"]
    assert [split.role for split in outcome.report.splits] == ["known", "known", "unseen"]


def test_a_search_that_finds_nothing_better_says_so() -> None:
    outcome = repair_module(trained(), known(), quick(fitness=Mute()))
    assert outcome.report.status == "not repaired"
    assert "nothing better than the original weights" in outcome.report.reason
    assert list(outcome.report.seconds) == ["collect", "localize", "search"]
    assert outcome.report.search is not None
    assert outcome.change is outcome.parameters is None


def test_a_loss_that_is_not_finite_names_the_samples() -> None:
    sources = known()
    sources[1].inputs[3:5] = float("nan")
    with pytest.raises(
        EvaluationError, match=r"NaN or infinite on 2 known samples \(new: \[3, 4\]\)"
    ):
        repair_module(trained(), sources, quick())


@pytest.mark.parametrize(
    ("sources", "arguments", "found"),
    [
        ([], {}, "`known`: no source is marked `failed`"),
        (known()[:1], {}, "`known`: no source is marked `failed`"),
        (known()[1:], {"n_passed": 3}, "`n_passed=3`: no known source is marked `passed`"),
        ([*known(), known()[0]], {}, r"the splits \['train', 'new', 'train'\]"),
        (known(), {"layer": "4"}, "`layer='4'` is not in the model"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_runs(
    sources: Any, arguments: Any, found: str
) -> None:
    model = trained()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ConfigurationError, match=found):
        repair_module(model, sources, quick(**arguments))


def test_stages_and_progress_are_told_in_order() -> None:
    told: list[Any] = []
    expected: list[Any] = []

    class Listener:
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            told.append(name)
            yield
            told.append(f"{name} done")

        def expect(self, seconds: Mapping[str, float], most: float) -> None:
            expected.append((set(seconds), most))

        def search(self, done: int, total: int, repaired: int, broken: int) -> None:
            told.append((done, total))

    outcome = repair_module(trained(), known(), quick(), observer=Listener())
    stages = ["collect", "localize", "search", "judge", "strength", "judge"]
    assert [word for word in told if isinstance(word, str)] == [
        w for s in stages for w in (s, f"{s} done")
    ]
    assert [word for word in told if isinstance(word, tuple)] == [(10, 12), (12, 12)]
    assert told.index("search") < told.index((10, 12)) < told.index("search done")
    assert list(outcome.report.seconds) == stages[:-1]
    assert expected == [({"strength", "judge"}, math.inf)]
