"""Whatever a damaged report says, it is read as it says it or refused by name; nothing else is
raised.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from copy import deepcopy
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nrl.analysis.comparison import Comparison, CurvePoint, Entry
from lightning_nrl.analysis.diagnosis import (
    Binding,
    Diagnosis,
    DoubtfulLabel,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts, GroupCounts, TargetCounts
from lightning_nrl.records import (
    CalibrationBounds,
    CautionPoint,
    Hashes,
    LocalizationReport,
    Rung,
    SearchReport,
    SetAside,
    SliceReport,
    SplitReport,
    Step,
    StrengthPoint,
    UpdateSplit,
    WeightChange,
)
from lightning_nrl.records.provenance import DataIdentity, Provenance
from lightning_nrl.records.splits import ClassCounts, ConfusionCell, FlippedSample, MarginHistogram
from lightning_nrl.release.release_report import Identity, ReleaseReport, ReleaseRow
from lightning_nrl.release.rules import RuleResult
from lightning_nrl.report import RepairReport
from lightning_nrl.study import Run, SweepResult

COUNTS, FLIPS = TargetCounts(5, 1, 2, 3, 4, 2), FlipCounts(5, 1, 2, 3)
GROUPS = GroupCounts(3, 1, 2, 2, 1, 1, 2)
SPLIT = SplitReport(
    "train",
    "known",
    COUNTS,
    (1, 2, 3, 4),
    (
        FlippedSample(1, "repaired", True, 0, 1, 0, -0.5, 0.5, "day", "cat.png"),
        FlippedSample(9, "broken", False, 0, 0, 1, 0.5, math.nan),
    ),
    (ConfusionCell(0, 1, 3, 2), ConfusionCell(1, 1, 4, 4)),
    (ClassCounts(0, FLIPS),),
    MarginHistogram((-1.0, 0.0, 1.0), (4, 7), (3, 8)),
)
VERSIONS = {"torch": "2.9.0", "lightning_nrl commit": "3f2e"}
DATA = {"test": DataIdentity(11, "b")}
PROVENANCE = Provenance("2026-11-29 06:00:00+00:00", "nets.Net", 28, "best.ckpt", "c", DATA)
REPORTS = {
    "repair": RepairReport(
        status="repaired",
        reason="2 of 4 pass now.",
        layers=("head",),
        target="all",
        gate="instance",
        task="Multiclass",
        splits=(SPLIT,),
        update=(UpdateSplit(SPLIT, SPLIT),),
        candidate=(),
        slices=(
            SliceReport("day", "known", COUNTS, quota=1),
            SliceReport("night", "unseen", COUNTS),
        ),
        set_aside=(SetAside("train", 3, 1, 0, "its label looks wrong"),),
        localization=LocalizationReport(8, 20, {"localized": 8}),
        search=SearchReport(3, "patience", 0.5, math.nan, {"best": [0.5, math.nan]}, 4, 9),
        steps=(Step("fit", 2, 1, 0.5),),
        strength=(StrengthPoint(0.5, 1, FLIPS), StrengthPoint(1.0, 2, FLIPS, FLIPS, True, 1.5)),
        chosen_strength=1.0,
        caution=(CautionPoint(0.1, COUNTS, True),),
        bounds=CalibrationBounds(1, 6, 0.95, 0.4, 2, 1),
        change=WeightChange(3, 8, 0.5, math.nan, 0.25),
        hashes=Hashes("a", "b"),
        seed=3,
        seconds={"search": 0.5},
        versions=VERSIONS,
        provenance=PROVENANCE,
        files={"json": "report.json"},
        settings={"n_passed": None, "search": {"particles": 100, "speed": [0.2, None]}},
    ),
    "groups": RepairReport(
        status="repaired",
        reason="2 of 4 pass now.",
        layers=("head",),
        target="all",
        gate="instance",
        task="Multiclass",
        splits=(replace(SPLIT, counts=replace(COUNTS, groups=GROUPS)),),
        rungs=(Rung("search", 2, 2, 1, 8, 0.5, replace(COUNTS, groups=GROUPS), kept=True),),
        bounds=CalibrationBounds(1, 3, 0.95, 0.4, 2, 1, by_group=True),
        unseen_groups=GROUPS,
        near_copies=True,
    ),
    "release": ReleaseReport(
        status="refused",
        findings=(RuleResult("instance", False, "test: 1 broke.", {"test": [9]}),),
        rows=(
            ReleaseRow("test", "", FLIPS, 0.5, 0.75),
            ReleaseRow("test", "day", FlipCounts(0, 0, 0, 0), 1.0, 1.0),
        ),
        broken_ids={"test": [9]},
        repaired_ids={"test": [1, 2]},
        confidence=0.95,
        new=Identity("Net", "a"),
        old=Identity("old.csv"),
        task="Multiclass",
        precision="float32 on cpu",
        versions=VERSIONS,
        provenance=PROVENANCE,
    ),
    "comparison": Comparison(
        (
            Entry(
                "convex",
                0.5,
                (CurvePoint(1.0, 2, FLIPS, FLIPS),),
                CurvePoint(0.5, 1, FLIPS, FLIPS),
                0.1,
            ),
            Entry("none", 0.5, note="no proposal"),
        ),
        4,
        "all",
        "head",
        3,
        versions=VERSIONS,
    ),
    "diagnosis": Diagnosis(
        advice="Use the default.",
        target="all",
        task="Multiclass",
        known={"samples": 8, "passed": 4, "failed": 4, "targeted": 2},
        head="head",
        targets=(
            TargetFinding("train", 1, 0, 1, -0.5, "yes", 0.25),
            TargetFinding("train", 2, 0, 1, -1.5),
        ),
        binding=(Binding("train", 3, 1, 0.5, 2),),
        check=HeldOutCheck(2, 4, 0.5, 1, 0.0, 0.5),
        mixing=NeighbourMixing(2, 0.75, 0.625),
        doubts=(DoubtfulLabel("train", 2, 0, 1, 0.75, 1.5),),
        layers=(
            LayerCapacity("head", "Linear", 8, 0.25),
            LayerCapacity("body", "Linear", 8, math.inf),
        ),
        costs={"auto": 3.5},
        notes=("note",),
        versions=VERSIONS,
    ),
    "sweep": SweepResult(
        (Run("a", "own", None, True, 8, None, 20, 1, "head", 0, 0, None, 0, 30, False, COUNTS),),
        "all",
        "head",
        versions=VERSIONS,
    ),
}
LEFT_OUT = {"groups", "unseen_groups", "by_group", "near_copies"}
"""Keys that are written only if they say something."""
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in plain values."""
    ways = []
    if isinstance(data, (dict, list)):
        for key in data if isinstance(data, dict) else range(len(data)):
            ways += [(*path, key), *places(data[key], (*path, key))]
    return ways


def null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_comes_back_as_it_was_written(name):
    report = REPORTS[name]
    text = report.to_json()
    again = type(report).from_json(text)
    assert again.to_json() == text
    assert type(report).from_dict(report.to_dict()).to_json() == text
    assert again.to_dict().keys() == report.to_dict().keys()


@pytest.mark.parametrize("name", REPORTS)
def test_no_key_may_be_missing_and_none_may_be_new(name):
    report = REPORTS[name]
    data = json.loads(report.to_json())
    key = min(data.keys() - report.derived.keys())
    without_key = {name: value for name, value in data.items() if name != key}
    with pytest.raises(ConfigurationError, match=f"^{key}: this is missing"):
        type(report).from_dict(without_key)
    with pytest.raises(ConfigurationError, match=r"^unheard_of: this key is unknown"):
        type(report).from_dict({**data, "unheard_of": 1})


def fields_of(record: Any, plain: Any) -> Any:
    """Plain values of a record without what follows from its fields, and is not read, and without
    defaults of keys that are not written then.
    """
    if is_dataclass(record):
        derived = getattr(record, "derived", ())
        plain = {key: item for key, item in plain.items() if key not in derived}
        for key in LEFT_OUT & plain.keys():
            if plain[key] in (None, False):
                del plain[key]
        return {key: fields_of(getattr(record, key, None), item) for key, item in plain.items()}
    if isinstance(record, tuple):
        return [fields_of(*pair) for pair in zip(record, plain, strict=True)]
    return plain


@pytest.mark.parametrize("name", REPORTS)
@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_damaged_report_is_refused_or_read_as_it_is(name, data):
    damaged = deepcopy(json.loads(REPORTS[name].to_json()))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(damaged)))
        place = damaged
        for step in way:
            place = place[step]
        how = data.draw(st.sampled_from(["change", "delete", "add"]))
        if how == "delete":
            del place[last]
        elif how == "add" and isinstance(place, dict):
            place[data.draw(st.text(max_size=5))] = data.draw(VALUES)
        else:
            place[last] = data.draw(VALUES)
    try:
        again = type(REPORTS[name]).from_dict(damaged)
    except ConfigurationError:
        return
    assert again.to_markdown()
    assert again.render()
    assert fields_of(again, json.loads(again.to_json())) == fields_of(again, null_for_nan(damaged))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("diagnosis", {"known": {"samples": 8}}),
        (
            "release",
            {"rows": [{**REPORTS["release"].to_dict()["rows"][0], "upper": None}]},
        ),
        (
            "repair",
            {
                "splits": [
                    REPORTS["repair"].to_dict()["splits"][0]
                    | {"margins": {"edges": [0, 1], "before": [1, 2], "after": [1]}}
                ]
            },
        ),
    ],
)
def test_what_cannot_be_shown_is_not_read(name, damage):
    with pytest.raises(
        ConfigurationError, match=r"(?s)^(the report cannot be shown \(|`margins`: ).*\nHINT: give "
    ):
        type(REPORTS[name]).from_dict({**REPORTS[name].to_dict(), **damage})


def changed(way: str, value: Any) -> dict[str, Any]:
    """The repair report as JSON has it, with another value at a place such as `splits.0.kept`."""
    data = json.loads(REPORTS["repair"].to_json())
    *keys, last = (int(key) if key.isdigit() else key for key in way.split("."))
    functools.reduce(operator.getitem, keys, data)[last] = value
    return data


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        ("splits.0.kept", "x", r"^splits\[0\]\.kept: expected a whole number, found 'x'\."),
        ("splits.0.kept", True, r"^splits\[0\]\.kept: expected a whole number, found True"),
        ("splits.0.role", "tin", r"^splits\[0\]\.role: expected one of .* found 'tin'"),
        ("splits.0.colour", "red", r"^splits\[0\]\.colour: this key is unknown"),
        ("splits.0", 3, r"^splits\[0\]: expected an object, found 3"),
        ("splits", {}, r"^splits: expected a list, found \{\}"),
        ("strength.0.strength", math.inf, "strength: expected a finite number, found inf"),
        ("splits.0.flipped.0.in_target", 1, "in_target: expected true or false, found 1"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(way, value, message):
    with pytest.raises(ConfigurationError, match=message):
        RepairReport.from_dict(changed(way, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 5000, "this is no JSON"),
        ("[]", r"expected an object"),
    ],
    ids=["long", "list"],
)
def test_what_is_no_json_is_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        RepairReport.from_json(text)


@pytest.mark.parametrize("schema", [2, "1", None])
def test_a_report_of_another_version_is_refused(schema):
    with pytest.raises(
        ConfigurationError, match=r"(?s)^schema: expected 1, .*HINT: .* version of lightning_nrl"
    ):
        RepairReport.from_dict({**REPORTS["repair"].to_dict(), "schema": schema})
