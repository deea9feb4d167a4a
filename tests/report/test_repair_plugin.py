"""What TensorBoard's tab answers a browser, and what it never tells."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT
from tensorboard.plugins.base_plugin import TBContext
from werkzeug import Response
from werkzeug.test import Client

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.records import SearchReport, SplitReport, StrengthPoint
from lightning_nrl.records.splits import ConfusionCell, FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView, write_sample_files
from lightning_nrl.report.tensorboard_plugin import RepairPlugin, repair_plugin

HOSTILE = "<img src=x onerror=alert(1)>"
KNOWN = SplitReport(
    "repair",
    "known",
    TargetCounts(6, 0, 1, 1, 2, 1),
    (2, 3),
    (FlippedSample(2, "repaired", True, 1, 0, 1, -1.23456, 0.5),),
    (ConfusionCell(0, 0, 6, 6), ConfusionCell(1, 0, 2, 1), ConfusionCell(1, 1, 0, 1)),
)
UNSEEN = SplitReport(
    "test",
    "unseen",
    TargetCounts(98, 2, 3, 1, 4, 3),
    (),
    (
        *(FlippedSample(i, "repaired", True, 1, 0, 1, -1.0, 0.25 + i) for i in range(3)),
        FlippedSample(7, "broken", False, 0, 0, 1, 0.5, -0.25, "night"),
        FlippedSample(8, "broken", False, 0, 0, 1, float("nan"), -2.0, HOSTILE, "cat.png"),
    ),
)
REPORT = RepairReport(
    status="repaired",
    reason=f"1 of 2 passes now {HOSTILE}.",
    layers=("head",),
    target=HOSTILE,
    gate="instance",
    task="Multiclass",
    splits=(KNOWN, UNSEEN),
    search=SearchReport(
        1, "patience", 1.0, 0.5, {"best": [0.5, 1], "patched": [0, 1], "intact": [6, 5]}, 2, 6
    ),
    strength=(
        StrengthPoint(0.5, 0, FlipCounts(6, 0, 0, 2)),
        StrengthPoint(1.0, 1, FlipCounts(6, 0, 1, 1)),
    ),
    chosen_strength=1.0,
    class_names=("cat", HOSTILE),
    seconds={"search": 2.0},
)
VIEWS = (
    SampleView("test", 7, "broken", "", np.zeros((4, 4, 3), dtype=np.uint8)),
    SampleView("repair", 2, "repaired", "", text=HOSTILE),
)


def write(folder: Path, report: RepairReport = REPORT) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json())
    return folder


class Asked:
    """A plugin for a log folder, asked as a browser asks it."""

    def __init__(self, log_dir: Path) -> None:
        self.plugin = RepairPlugin(TBContext(logdir=str(log_dir)))
        self.apps = self.plugin.get_plugin_apps()

    def get(self, path: str, **values: Any) -> Response:
        app = self.apps["/static/*" if path.startswith("/static/") else path]
        return Client(app).get(path, query_string=values)

    def json(self, path: str, **values: Any) -> Any:
        answer = self.get(path, **values)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text, parse_constant=pytest.fail)  # refuses NaN

    def sample(self, **values: Any) -> Response:
        return self.get("/sample", **{"name": "version_0/repair", "split": "test", **values})


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    write_sample_files(write(tmp_path / "log" / "version_0" / "repair"), VIEWS)
    return Asked(tmp_path / "log")


def test_there_is_a_tab_where_there_is_a_repair(tmp_path, asked):
    assert asked.plugin.is_active()
    assert not Asked(tmp_path / "none").plugin.is_active()
    assert not RepairPlugin(TBContext()).is_active()


def test_a_row_of_the_list_has_what_a_repair_is_judged_by(asked):
    listed = asked.json("/repairs")
    assert listed["found"] == 1
    (row,) = listed["repairs"]
    expected = {
        "name": "version_0/repair",
        "status": "repaired",
        "tone": "warn",
        "seconds": 2.0,
        "evidence": "no difference shown",  # 3 to 2
        "at_most": "6.17 %",  # Clopper and Pearson's limit of 2 in 100 with 95 %, rounded up
    }
    assert row.items() >= expected.items()
    known = {"broken": 0, "right": 6, "repaired_in_target": 1, "targeted": 2}
    assert row["known"].items() >= known.items()
    unseen = {"broken": 2, "right": 100, "repaired": 3, "wrong": 4}
    assert row["unseen"].items() >= unseen.items()


def test_a_repair_has_its_flips_the_broken_ones_first(asked):
    repair = asked.json("/repair", name="version_0/repair")
    rows = repair["flips"]["rows"]
    assert [row[1] for row in rows] == [8, 7, 2, 1, 0, 2]
    assert [*rows[:2], rows[-1]] == [
        [0, 8, "broken", 0, 0, 1, None, -2.0, False, 1, "", "cat.png"],
        [0, 7, "broken", 0, 0, 1, 0.5, -0.25, False, 0, "picture", ""],
        [1, 2, "repaired", 1, 0, 1, -1.235, 0.5, True, -1, "text", ""],
    ]
    assert repair["flips"]["slices"] == ["night", HOSTILE]
    assert repair["confusion"] == {"known": [[1, 0, 2, 1]]}
    assert repair["search"]["curves"]["broken"] == [0, 1]
    assert [point["known"]["repaired"] for point in repair["strength"]] == [
        0,
        0,
        1,
    ]  # at 0, 0.5 and 1
    assert repair["verdict"] == "Repaired: promise kept, no difference shown on unseen data"
    evidence = "no difference shown: 3 repaired, 2 broken of 104 unseen samples (sign test, p = 1)"
    assert repair["answers"][1] == ["evidence", evidence]


def test_two_repairs_are_compared(tmp_path, asked):
    write(tmp_path / "log" / "second", replace(REPORT, splits=(KNOWN,)))
    names = {"name": "version_0/repair", "other": "second"}
    html = asked.json("/beside", **names)["html"]
    assert "Known data: 0 samples right in version_0/repair alone, 0 in second" in html
    assert asked.get("/beside", name="version_0/repair", other="nothing").status_code == 404


def test_refused_weights_show_what_they_would_have_done(tmp_path):
    as_it_is = replace(KNOWN, counts=TargetCounts(6, 0, 0, 2, 2, 0), flipped=())
    refused = replace(REPORT, status="refused", splits=(as_it_is,), candidate=(KNOWN,))
    write(tmp_path / "repair", refused)
    repair = Asked(tmp_path).json("/repair", name="repair")
    assert repair.items() >= {"accepted": False, "changes": True, "at_most": ""}.items()
    assert repair["known"]["repaired"] == len(repair["flips"]["rows"]) == 1
    assert "Effect of the refused weights" in repair["outcome"]


def test_samples_that_flipped_have_pictures_or_text(asked):
    picture = asked.sample(position=7, kind="picture")
    assert picture.content_type == "image/png"
    assert picture.data.startswith(b"\x89PNG")
    text = asked.sample(split="repair", position=2, kind="text")
    assert text.content_type.startswith("text/plain")
    assert text.headers["X-Content-Type-Options"] == "nosniff"
    assert text.text == HOSTILE


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/repair", {}),
        ("/repair", {"name": "../log/version_0/repair"}),
        ("/sample", {"split": "../../test", "position": 7, "kind": "picture"}),
        ("/sample", {"split": "test", "position": "7/../8", "kind": "picture"}),
        ("/sample", {"split": "test", "position": 8, "kind": "picture"}),
        ("/sample", {"split": "test", "position": 7, "kind": "../report.json"}),
        ("/static/../repair_plugin.py", {}),
    ],
)
def test_nothing_else_is_served(asked, path, values):
    answer = asked.get(path, **{"name": "version_0/repair" if "split" in values else "", **values})
    assert answer.status_code == 404
    assert set(answer.json or {}) == {"problem"}


def test_links_that_lead_out_of_the_log_are_not_followed(tmp_path, asked):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG secret")
    picture = tmp_path / "log/version_0/repair/flipped_samples/test-7.png"
    picture.unlink()
    picture.symlink_to(secret)
    assert asked.sample(position=7, kind="picture").status_code == 404
    outside = write(tmp_path / "elsewhere")
    (tmp_path / "log" / "linked").symlink_to(outside)
    (tmp_path / "log" / "report.json").symlink_to(outside / "report.json")
    assert Asked(tmp_path / "log").json("/repairs")["found"] == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"status": "repaired", "reason": "', "Unterminated"),
        (
            '{"status": "repaired", "reason": "", "class_names": [], "schema": 99}',
            "schema: expected 1",
        ),
        ('{"status": "repaired", "reason": ""' + " " * 2**26 + "}", "the limit is"),
    ],
    ids=["cut", "schema", "long"],
)
def test_a_report_that_cannot_be_read_says_why(tmp_path, text, problem):
    (tmp_path / "report.json").write_text(text)
    (row,) = Asked(tmp_path).json("/repairs")["repairs"]
    assert (row["name"], problem in row["problem"]) == (tmp_path.name, True), row
    assert Asked(tmp_path).get("/repair", name=tmp_path.name).json == {"problem": row["problem"]}


def test_one_report_that_cannot_be_shown_leaves_the_others(tmp_path):
    write(tmp_path / "good")
    for name, old, new in (
        ("unknown", '"search": 2.0', '"search": null'),
        ("odd", '"test"', r'"\ud800"'),
    ):
        (write(tmp_path / name) / "report.json").write_text(REPORT.to_json().replace(old, new))
    asked = Asked(tmp_path)
    rows = {row["name"]: row for row in asked.json("/repairs")["repairs"]}
    assert rows["good"]["status"] == rows["odd"]["status"] == "repaired"
    assert rows["unknown"]["problem"].startswith("report.json cannot be read: ")
    assert asked.json("/repair", name="good")
    for name in ("unknown", "odd"):
        answer = asked.get("/repair", name=name)
        assert (answer.status_code, "problem" in answer.json) == (404, True)


def test_other_reports_are_left_out_and_new_ones_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(repair_plugin, "LOOK_SECONDS", 0.0)
    asked = Asked(tmp_path)
    (tmp_path / "report.json").write_text('{"status": "accepted", "findings": []}')
    assert asked.json("/repairs") == {"repairs": [], "found": 0}
    folder = write(tmp_path / "repair")
    assert asked.json("/repairs")["repairs"][0]["status"] == "repaired"
    (folder / "report.json").write_text(replace(REPORT, status="not repaired").to_json())
    assert asked.json("/repairs")["repairs"][0]["status"] == "not repaired"


def test_log_folders_by_name_are_looked_into(tmp_path):
    write(tmp_path / "a" / "repair")
    write(tmp_path / "b")
    flags = Namespace(logdir="", logdir_spec=f"first:{tmp_path / 'a'},{tmp_path / 'b'}")
    plugin = RepairPlugin(TBContext(logdir=flags.logdir_spec, flags=flags))
    rows = Client(plugin.get_plugin_apps()["/repairs"]).get("/repairs").json["repairs"]
    assert sorted(row["name"] for row in rows) == ["b", "first/repair"]


def test_everything_that_the_page_imports_is_served_and_nothing_comes_from_elsewhere(asked):
    imported = {"index.js", "tab.css", "report.css"}
    for name in repair_plugin.STATIC_FILES:
        text = asked.get(f"/static/{name}").text
        imported.update(re.findall(r'from "\./([\w.]+)"', text))
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert imported == set(repair_plugin.STATIC_FILES)


def test_tensorboard_need_not_load_torch_to_have_the_tab():
    text = (ROOT / "pyproject.toml").read_text()
    (address,) = re.findall(
        r'\[project\.entry-points\.tensorboard_plugins\]\n\w+ = "([\w.:]+)"', text
    )
    module, name = address.split(":")
    code = f"import sys; from {module} import {name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=True)
