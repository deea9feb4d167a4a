from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.localization import Localization
from lightning_nrl.pipeline.report_parts import localization_report, search_report
from lightning_nrl.report import (
    Hashes,
    LocalizationReport,
    RepairReport,
    SearchReport,
    SplitReport,
    Step,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.report._formatting import percent
from lightning_nrl.report.sample_records import FlippedSample
from lightning_nrl.search.search_log import SearchHistory, SearchResult


def flipped(repaired: Iterable[int] = (), broken: Iterable[int] = ()) -> tuple[FlippedSample, ...]:
    """Samples of class 3 that were taken for 5 and are not any more, and those that are now."""
    return (
        *(FlippedSample(i, "repaired", True, 3, 5, 3, -0.5, 0.25 + i) for i in repaired),
        *(FlippedSample(i, "broken", False, 3, 3, 5, 1.5, -0.125) for i in broken),
    )


STATES = ("repaired", "refused", "nothing")
TRAIN = SplitReport("train", "known", TargetCounts(1172, 0, 9, 17, 0, 0), (), flipped((1, 5, 7, 8, 9, 33, 44, 55, 66)))
VAL = SplitReport("val", "known", TargetCounts(288, 0, 14, 16, 30, 14), tuple(range(30)), flipped(range(14)))
TEST = SplitReport("test", "unseen", TargetCounts(270, 1, 12, 14, 22, 11), tuple(range(22)), flipped(range(12), (17,)))


@pytest.fixture
def repaired() -> RepairReport:
    return RepairReport(
        status="repaired",
        reason="14 of 30 targeted failures pass now. Of 1,460 known samples that passed before, none broke.",
        layers=("classifier",),
        target="confusion 3 -> 5",
        gate="instance",
        task="Multiclass",
        splits=(TRAIN, VAL, TEST),
        localization=LocalizationReport(
            32, 210, {"failed": 80, "passed": 90, "both": 49, "localized": 31, "total": 640}
        ),
        search=SearchReport(62, "no better fitness for 20 iterations", 0.25, 1.5, {"best": [0.25, 1.5]}, 30, 1460),
        change=WeightChange(31, 640, 0.123, 0.0123, 0.04),
        hashes=Hashes("a" * 64, "b" * 64, "c" * 64, "d" * 64),
        seed=7,
        seconds={"collect": 0.3, "search": 3.21},
        versions={"python": "3.12.0", "torch": "2.9.0"},
        files={"checkpoint": "logs/version_0/repair/repaired.ckpt", "json": "logs/version_0/repair/report.json"},
        settings={"n_passed": None, "method": {"particles": 100}},
    )


@pytest.fixture
def refused(repaired: RepairReport) -> RepairReport:
    return replace(
        repaired,
        status="refused",
        reason="Of 1,460 known samples that passed before, 3 would break (3 in val); the gate allows none.",
        splits=(
            SplitReport("train", "known", TargetCounts(1172, 0, 0, 26, 0, 0)),
            SplitReport("val", "known", TargetCounts(288, 0, 0, 30, 30, 0), tuple(range(30))),
            SplitReport("test", "unseen", TargetCounts(271, 0, 0, 26, 22, 0), tuple(range(22))),
        ),
        candidate=(
            TRAIN,
            replace(VAL, counts=replace(VAL.counts, kept=285, broken=3), flipped=flipped(range(14), (27, 99, 130))),
        ),
        hashes=Hashes("a" * 64, "a" * 64),
        files={},
    )


@pytest.fixture
def nothing(refused: RepairReport) -> RepairReport:
    return replace(
        refused,
        status="nothing to repair",
        reason="no failed sample of val is in the target",
        candidate=(),
        localization=None,
        search=None,
        change=None,
    )


@pytest.fixture(params=STATES)
def report(request: pytest.FixtureRequest) -> RepairReport:
    return request.getfixturevalue(request.param)


def test_json_is_strict_and_comes_back_the_same(report: RepairReport) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = report.to_json()
    json.loads(text, parse_constant=refuse)
    assert RepairReport.from_json(text) == report
    assert RepairReport.from_dict(report.to_dict()) == report


def test_what_is_not_finite_is_null_and_comes_back_as_nan(repaired: RepairReport) -> None:
    search = SearchReport(3, "stopped", math.nan, -math.inf, {"best": [1.0, math.nan]})
    odd = replace(repaired, search=search, change=WeightChange(0, 4, 0.0, math.nan, 0.0))
    data = json.loads(odd.to_json())
    assert data["search"]["fitness"] is data["search"]["original_fitness"] is data["change"]["relative"] is None
    assert data["search"]["history"]["best"] == [1.0, None]
    back = RepairReport.from_json(odd.to_json())
    assert back.search is not None
    assert back.change is not None
    assert math.isnan(back.search.fitness)
    assert math.isnan(back.change.relative)
    assert math.isnan(back.search.history["best"][1])
    assert back.to_json() == odd.to_json()


def test_json_gives_every_number_of_a_split_with_its_name_and_role(repaired: RepairReport) -> None:
    test = json.loads(repaired.to_json())["splits"][2]
    assert (test["split"], test["role"], test["n"], test["broken"]) == ("test", "unseen", 297, 1)
    assert [one["id"] for one in test["flipped"] if one["flip"] == "broken"] == [17]
    assert test["negative_flip_rate"] == pytest.approx(1 / 297)
    assert test["accuracy_after"] == pytest.approx(282 / 297)
    assert '      {"id": 17, "flip": "broken", "in_target": false, "label": 3,' in repaired.to_json()


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (("a", "b"), ["a", "b"]),
        (Path("x"), "x"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.device("cpu"), "cpu"),
        (WeightChange(1, 2, 0.5, 0.5, 0.5), {"changed": 1, "total": 2, "l2": 0.5, "relative": 0.5, "largest": 0.5}),
        ({3: None}, {"3": None}),
    ],
    ids=str,
)
def test_settings_become_plain_values(repaired: RepairReport, value: Any, kept: Any) -> None:
    report = replace(repaired, settings={"option": value})
    assert report.settings["option"] == kept
    assert type(report.settings["option"]) is type(kept)
    assert RepairReport.from_json(report.to_json()) == report


def test_it_travels_in_a_checkpoint_that_loads_with_weights_only(report: RepairReport, tmp_path: Path) -> None:
    torch.save(report.to_dict(), tmp_path / "report.pt")
    assert RepairReport.from_dict(torch.load(tmp_path / "report.pt", weights_only=True)) == report


def test_pooled_adds_up_the_splits_of_a_role(repaired: RepairReport, refused: RepairReport) -> None:
    assert repaired.pooled("known") == SplitReport("all", "known", TargetCounts(1460, 0, 23, 33, 30, 14))
    assert repaired.pooled("unseen") == SplitReport("all", "unseen", TargetCounts(270, 1, 12, 14, 22, 11))
    assert replace(repaired, splits=repaired.splits[:2]).pooled("unseen") is None


def test_parts_are_taken_from_the_arrows() -> None:
    sizes = {"failed": 3, "passed": 2, "both": 1, "localized": 2, "total": 9}
    localization = localization_report(Localization(torch.tensor([1, 4]), 5, 2, sizes))
    assert localization == LocalizationReport(2, 5, sizes)
    history = SearchHistory(*(torch.tensor([float(i), 0.5]) for i in range(7)))
    search = search_report(SearchResult(torch.zeros(2), 1.0, 0.5, 1, "done", history, 0.1), 4, 6)
    assert (search.iterations, search.n_failed, search.n_passed) == (1, 4, 6)
    assert search.history["diversity"] == [6.0, 0.5]


def test_markdown_begins_with_the_verdict_and_its_reason(report: RepairReport) -> None:
    heading, _, reason = report.to_markdown().split("\n")[:3]
    assert heading == f"# {report.status.capitalize()}"
    assert reason.lower().startswith(report.reason.lower())
    assert ("weights are unchanged" in reason) is (report.status != "repaired")


def test_markdown_of_a_repair_has_counts_ids_rates_and_hashes(repaired: RepairReport) -> None:
    text = repaired.to_markdown()
    for line in (
        "|  | train (known) | val (known) | all (known) | test (unseen) |",
        "| accuracy after | 98.58 % | 94.97 % | 97.82 % | 94.95 % |",
        "| **repaired of these** | **0** | **14** | **14** | **11** |",
        "| repaired (was wrong, now right) | 9 | 14 | 23 | 12 |",
        "| **broken (was right, now wrong)** | **0** | **0** | **0** | **1** |",
        "- **weights searched**: 31 of 640, the nearest to the 32 asked for; 80 matter for the failed data, "
        "90 for the passed, 49 for both (the top 210 by each impact)",
        "- **search**: 62 iterations in 3.2 s, scored on 30 failed and 1,460 passed samples, fitness 1.5 -> 0.25; "
        "stopped: no better fitness for 20 iterations",
        "- **weights changed**: 31 of 640, by at most 0.04; norm of the change 0.123 (1.23 % of the layers' norm)",
        "## Broken in test, by position in the data set",
        "| 17 | 3 | 3 | 5 | 1.5 | -0.125 |  |",
        "## Repaired in test, by position in the data set, 10 of 12",
        "| 11 | 3 | 5 | 3 | -0.5 | 11.25 | yes |",
        "| break rate: broken of those right before | 0.00 % | 0.00 % | 0.00 % | 0.37 % |",
        f"- **sha256 of the layers before**: {'a' * 64}",
        "- **seed**: 7",
        "- **torch**: 2.9.0",
        "- **method**: particles=100",
    ):
        assert line in text.splitlines()


def test_markdown_of_a_refusal_tells_what_would_have_broken(refused: RepairReport) -> None:
    text = refused.to_markdown()
    assert "| **broken (was right, now wrong)** | **0** | **3** | **3** |" in text
    assert "| 99 | 3 | 3 | 5 | 1.5 | -0.125 |  |" in text
    assert "| right | 1,172 | 288 | 1,460 | 271 |" in text
    assert f"- **sha256 of the layers, unchanged**: {'a' * 64}" in text


def test_markdown_of_no_candidate_has_no_table_of_flips(nothing: RepairReport) -> None:
    assert "broken" not in nothing.to_markdown()
    assert "| failures to repair (the target) | 0 | 30 | 30 | 22 |" in nothing.to_markdown()


def test_of_many_repaired_samples_those_that_gained_most_are_listed(repaired: RepairReport) -> None:
    many = replace(repaired.splits[0], flipped=flipped(range(1234)))
    text = replace(repaired, splits=(many,)).to_markdown()
    assert "Repaired in train, by position in the data set, 10 of 1,234" in text
    assert next(line for line in text.splitlines() if line.startswith("| 12")).startswith("| 1233 |")
    assert "| 1223 |" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_plain_text_fits_and_needs_no_rich(report: RepairReport, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    text = report.render(width)
    assert text.startswith(report.status.upper() + "\n")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rich_shows_the_same_words_within_the_width(report: RepairReport, width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert max(map(len, capture.get().splitlines())) <= width
    plain, shown = report.render(width).split(), capture.get().split()
    assert [word for word in shown if word.strip("─")] == [word for word in plain if word.strip("-")]


def test_a_screen_shows_paths_from_here_and_a_file_shows_them_whole(
    repaired: RepairReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(Path.cwd() / "logs" / "repaired.ckpt")
    report = replace(repaired, files={"checkpoint": checkpoint, "json": "elsewhere/report.json"})
    lines = [line.split("  ")[-1].strip() for line in report.render(120).splitlines()]
    assert lines[-2:] == [str(Path("logs/repaired.ckpt")), "elsewhere/report.json"]
    assert f"- **checkpoint**: {checkpoint}" in report.to_markdown()


def test_harm_is_red_where_it_is_done_and_only_there(repaired: RepairReport) -> None:
    console = Console(width=100, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(repaired.to_table())
    line = next(line for line in capture.get().splitlines() if "broken (was right" in line)
    assert line.count("\x1b[1;31m") == 1
    assert line.count("\x1b[32m") == 3


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00 %"),
        (1.0, "100.00 %"),
        (1e-6, "< 0.01 %"),
        (1 - 1e-6, "> 99.99 %"),
        (0.12345, "12.35 %"),
        (math.nan, "-"),
    ],
)
def test_percentages_never_round_a_sample_away(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.fixture
def long_way(repaired: RepairReport) -> RepairReport:
    return replace(
        repaired,
        steps=(Step("fit", 20, 9, 12.34, "8 epochs"), Step("polish", 19, 0, 3.0), Step("swarm", 21, 0, 2.0, "+2")),
        strength=(
            StrengthPoint(0.2, 4, FlipCounts(1460, 0, 6, 50), FlipCounts(270, 0, 3, 20)),
            StrengthPoint(1.15, 21, FlipCounts(1460, 0, 30, 26), FlipCounts(269, 1, 12, 11)),
        ),
        chosen_strength=1.15,
    )


def test_steps_and_strength_come_back_from_json(long_way: RepairReport) -> None:
    assert RepairReport.from_json(long_way.to_json()) == long_way
    data = json.loads(long_way.to_json())
    assert data["strength"][1]["calibration"] == {"kept": 269, "broken": 1, "repaired": 12, "failing": 11}
    assert data["steps"][0] == {"name": "fit", "repaired": 20, "broken": 9, "seconds": 12.34, "note": "8 epochs"}


def test_steps_and_strength_are_tables_on_the_page(long_way: RepairReport) -> None:
    text = long_way.to_markdown()
    assert "| fit | 20 | 9 | 12.3 | 8 epochs |" in text
    assert "| strength 0.2 | 4 | 6 | 0 | 3 | 0 |" in text
    assert "| **strength 1.15, taken** | **21** | **30** | **0** | **12** | **1** |" in text
    assert "- **strength**: 1.15 of the change that was found" in text
    plain = long_way.render()
    assert ["fit", "20", "9", "12.3", "8", "epochs"] in [line.split() for line in plain.splitlines()]
    assert max(map(len, plain.splitlines())) <= 80


def test_a_single_step_needs_no_table_on_the_screen(long_way: RepairReport) -> None:
    assert "What the method did" in long_way.render()
    assert "What the method did" not in replace(long_way, steps=long_way.steps[:1]).render()
