from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from plane import TRAIN, Moved, points, threshold
from ranks import Collective, on_ranks
from toy_problems import ByFunction, left_alone, shares
from toy_repairs import QUICK, known, right, trained, unseen

from lightning_nrl import ConfigurationError, Settings, Target
from lightning_nrl.analysis.baselines import BASELINES, FineTuning, Interpolation
from lightning_nrl.analysis.comparison import (
    Comparison,
    CurvePoint,
    Entry,
    compare_module,
    parse_methods,
)
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.methods import Method, Problem, Solution

NEW = points([0.6, 0.7, 0.5, 0.3], [0, 1, 1, 1], "new", failed=True)
LATER = points([0.65, 0.3], [1, 0], "later")


class Unsuitable(Method):
    def __call__(self, problem: Problem) -> Solution:
        raise ConfigurationError("`layer='0'` is a Conv2d.", "name a Linear.")


def counts(point: CurvePoint) -> tuple[Any, ...]:
    """Strength, targets that pass, known repaired and broken, unseen repaired and broken."""
    known, later = point.known, point.unseen
    flips = known.repaired, known.broken, later.repaired, later.broken
    return point.strength, point.targeted, *flips


def test_every_strength_is_counted_and_the_largest_that_breaks_none_is_found():
    # At strength t the threshold is 0.75 (1 - t). The one sample that breaks, 0.6, does so beyond t
    # = 0.2.
    comparison = compare_module(
        threshold(0.75), [TRAIN, NEW], unseen=[LATER], methods={"move": Moved(0.0)}
    )
    (entry,) = comparison.entries
    assert comparison.targets == 3
    assert [counts(point) for point in entry.curve] == [
        (0.0, 0, 0, 0, 0, 0),
        (0.25, 1, 1, 1, 1, 0),
        (0.5, 2, 2, 1, 1, 0),
        (0.75, 3, 3, 1, 1, 1),
        (1.0, 3, 3, 1, 1, 1),
    ]
    assert counts(entry.scaled) == (0.1875, 1, 1, 0, 1, 0)
    assert (entry.method, entry.given, entry.note) == ("move", entry.curve[-1], "by hand")
    with pytest.raises(
        ConfigurationError, match=r"`method='moved'` is unknown\.\nHINT: did you mean 'move'"
    ):
        comparison["moved"]
    bare = compare_module(threshold(0.75), [TRAIN, NEW], methods={"move": Moved(0.0)})
    assert "unseen" not in bare.render()
    assert len(bare.plot().axes) == 1


def test_what_cannot_be_done_is_left_out_and_says_why():
    methods = {"retraining": "retraining", "wrong layer": Unsuitable(), "move": Moved(0.65)}
    comparison = compare_module(threshold(0.75), [TRAIN, NEW], methods=methods)
    reasons = [(entry.method, entry.note) for entry in comparison.entries if entry.given is None]
    assert reasons == [
        ("retraining", "it is not known how the model was trained."),
        ("wrong layer", "`layer='0'` is a Conv2d."),
    ]
    assert re.search(r"^retraining +it is not known how", comparison.render(), re.MULTILINE)


def test_the_far_end_of_an_interpolation_is_made_once():
    end = Moved(0.0)
    comparison = compare_module(
        threshold(0.75), [TRAIN, NEW], methods={"end": end, "between": Interpolation(end)}
    )
    assert end.calls == 1
    assert counts(comparison["between"].given)[1:4] == (2, 2, 1)


def test_counts_are_those_of_the_model_and_the_model_is_left_as_found():
    model, sources, (later,) = trained(), known(), unseen()
    solutions = []

    def spied(problem: Problem) -> Solution:
        solutions.append(FineTuning(epochs=1)(problem))
        return solutions[0]

    methods = {"spied": ByFunction(spied), "swarm": QUICK["method"]}
    with left_alone(model):
        comparison = compare_module(model, sources, unseen=[later], methods=methods)
    old_known, old_later = torch.cat([right(model, x) for x in sources]), right(model, later)
    model.load_state_dict({**model.state_dict(), **solutions[0].proposal.state})
    new_known, new_later = torch.cat([right(model, x) for x in sources]), right(model, later)
    end = comparison["spied"].given
    assert end.known == FlipCounts.of(old_known, new_known)
    assert end.unseen == FlipCounts.of(old_later, new_later)
    assert comparison["swarm"].given.targeted > 0


def test_ranks_that_share_the_data_find_what_one_finds():
    def run(collective: Any) -> Comparison:
        model = Evaluator(trained(), collective=collective)
        sources = [*known(), *unseen()]
        *data, later = shares(sources, collective.rank, collective.world_size, batch_size=32)
        comparison = compare_module(model, data, unseen=[later], methods="distillation")
        (entry,) = comparison.entries
        return replace(comparison, entries=(replace(entry, seconds=0.0, scaling=0.0),))

    first, second = on_ranks(2, run)
    assert first == second == run(Collective())
    assert first["distillation"].given.targeted > 0


def test_methods_are_named_or_given():
    own = ["auto", "finetune-polish", "convex", "swarm"]
    assert list(parse_methods(None)) == [*own, *BASELINES]
    assert parse_methods("fine-tuning") == {"fine-tuning": FineTuning()}
    assert list(parse_methods(["distillation", FineTuning()])) == ["distillation", "FineTuning"]
    for wrong, message in (
        ("fine tuning", "did you mean 'fine-tuning'"),
        (["swarm", "swarm"], "name each method once"),
        ([], "name each method once"),
        ({"mine": 3}, "`methods=3` is no method"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            parse_methods(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"known": NEW}, "`known`: found a TensorSource, not one list"),
        ({"settings": Target.label(0)}, "is no Settings"),
        ({"model": torch.relu}, "`model=.*` is no torch module"),
        (
            {"settings": Settings(target=Target.label(0))},
            r"`known`: no sample fails in the target \(label 0\)",
        ),
        ({"methods": 3}, "`methods=3` is no list"),
    ],
)
def test_what_is_of_another_kind_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        compare_module(**{"model": threshold(0.75), "known": [TRAIN, NEW], **arguments})
    if "methods" not in arguments and "no sample" not in message:
        with pytest.raises(ConfigurationError, match=message):
            diagnose_module(**{"model": threshold(0.75), "known": [TRAIN, NEW], **arguments})


def test_each_method_has_all_the_time_and_knows_how_long_a_pass_over_known_data_takes():
    clocks = []

    def timed(problem: Problem) -> Solution:
        clocks.append(problem.clock)
        return Solution(None, "nothing was found.")

    methods = {"first": ByFunction(timed), "second": ByFunction(timed)}
    compare_module(threshold(0.75), [TRAIN, NEW], Settings(max_time=60), methods=methods)
    first, second = clocks
    assert first is not second
    assert first.seconds["collect"] == second.seconds["collect"] > 0
    assert 50 < second.left < first.left + 60


def made(method: str, *counted: tuple[float, int, int, int, int], scaled: int = -1) -> Entry:
    """An entry whose points are strength, known repaired and broken, unseen repaired and broken."""
    curve = tuple(
        CurvePoint(
            t,
            repaired,
            FlipCounts(5000 - broken, broken, repaired, 400 - repaired),
            FlipCounts(700, lost, won, 50),
        )
        for t, repaired, broken, won, lost in ((0.0, 0, 0, 0, 0), *counted)
    )
    return Entry(method, 12.0, curve, curve[scaled], 3.0)


COMPARISON = Comparison(
    (
        made("finetune-polish", (0.5, 150, 0, 120, 20), (1.0, 340, 0, 380, 58)),
        made("fine-tuning", (0.5, 120, 4, 95, 40), (1.0, 211, 21, 152, 75), scaled=1),
        made("interpolation", (0.5, 60, 2, 50, 30), (1.0, 120, 4, 95, 40), scaled=0),
        made("retraining", (0.5, 20, 4000, 10, 600), (1.0, 339, 11, 392, 86), scaled=0),
        Entry("convex", 0.0, note="`layer='0'` is a Conv2d."),
    ),
    targets=350,
    target="front or back",
    layer="auto",
    seed=0,
)


def test_the_table_has_a_second_line_where_weights_are_scaled_back():
    page = COMPARISON.render()
    assert max(map(len, page.splitlines())) <= 80
    lines = [line.split() for line in page.splitlines()]
    assert ["finetune-polish", "340", "340", "0", "380", "58", "+27.1", "12.0"] in lines
    assert ["scaled", "to", "0.50", "120", "120", "4", "95", "40", "+6.2", "15.0"] in lines
    starts = [line[0] for line in lines if len(line) > 6]
    assert starts.index("fine-tuning") > starts.index("finetune-polish")
    front = [entry.method for entry in COMPARISON.pareto()]
    assert front == ["interpolation", "finetune-polish"]
    assert "breaks no more: interpolation,\nfinetune-polish." in page
    assert "350 failures to repair, 5,000 of 5,400 known samples right before" in page
    assert "| fine-tuning | 211 |" in COMPARISON.to_markdown()


def test_json_is_read_back_and_csv_has_a_line_for_every_point(tmp_path):
    assert Comparison.from_json(COMPARISON.to_json()) == COMPARISON
    rows = list(csv.DictReader(io.StringIO(COMPARISON.to_csv())))
    assert len(rows) == 4 * 4
    (end,) = (row for row in rows if (row["method"], row["weights"]) == ("fine-tuning", "given"))
    assert (end["strength"], end["targeted"], end["known_broken"]) == ("1", "211", "21")
    COMPARISON.save(tmp_path / "new")
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".csv", ".json", ".md"}


def test_the_picture_names_every_curve(tmp_path):
    figure = COMPARISON.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["known samples", "unseen samples"]
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"finetune-polish", "fine-tuning", "interpolation", "retraining"}
    # A curve each but for retraining, whose way leads off the picture.
    styles = [line.get_linestyle() for line in panels[0].lines[1:] if len(line.get_xdata()) > 1]
    assert styles == ["-", "--", "--"]
    assert list(panels[1].lines[1].get_xdata()) == [0, 20, 58]
