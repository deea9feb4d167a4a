"""The release gate on modules and tensors, and on files."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Collective, on_ranks
from repository import ROOT
from toy_problems import left_alone, shares
from toy_repairs import blobs, mlp, right, trained

from lightning_nrl import ConfigurationError, OldModel, Target, TensorSource
from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.records import hash_tensors
from lightning_nrl.release import ProtectedIntact, ReleaseReport, parse_rules, release
from lightning_nrl.updates import Predictions

HOW_TO = ROOT / "docs" / "release.md"
RULES = ["accuracy", "nfr:20%", "slices", "slices:count"]


def data(split: str = "test", batch_size: int = 32) -> TensorSource:
    return TensorSource(*blobs(200, 0.5, seed=7), split=split, batch_size=batch_size)


def label(batch: Any) -> Any:
    return batch[1]


def test_it_counts_what_plain_passes_count():
    old, new, source = trained(seed=1), trained(seed=2), data()
    was, now = right(old, source), right(new, source)
    report = release(old, new, source, "instance", slices=label)
    whole_split, *slices = report.rows
    assert whole_split.counts == FlipCounts.of(was, now)
    assert min(whole_split.counts.broken, whole_split.counts.repaired) > 0
    assert report.broken_ids == {"test": (was & ~now).nonzero().flatten().tolist()}
    assert report.findings[0].ids == report.broken_ids
    assert [row.slice for row in slices] == ["0", "1", "2"]
    for row in slices:
        in_slice = source.targets == int(row.slice)
        assert row.counts == FlipCounts.of(was[in_slice], now[in_slice])
    assert report.status == "refused"
    assert report.reasons[0].startswith(
        f"instance: test: {whole_split.counts.broken} of {int(was.sum())} that were right"
    )


def test_models_and_random_state_are_left_as_found():
    old, new = trained(seed=1), trained(seed=2)
    new[0].eval()
    with left_alone(old), left_alone(new):
        release(old, new, data(), RULES, slices=label)


def test_every_form_of_the_old_model_gives_the_same_report(tmp_path):
    old, new = trained(seed=1), trained(seed=2)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    first = release(old, new, data(), RULES, slices=label)
    assert first.old.sha256 == hash_tensors(old.state_dict())
    for form in (
        tmp_path / "old.pt",
        OldModel(old, cache=tmp_path / "old.csv"),
        tmp_path / "old.csv",
    ):
        report = release(form, new, data(), RULES, slices=label)
        assert replace(report, old=first.old, caveats=()) == first
        assert ("nothing shows" in report.to_markdown()) == (form == tmp_path / "old.pt")
        assert report.old.sha256 == first.old.sha256


def test_protected_samples_are_chosen_while_the_data_are_read():
    old, new, source = trained(seed=1), trained(seed=2), data()
    broken = right(old, source) & ~right(new, source)
    for rule, mine in (
        (ProtectedIntact(where=lambda batch: batch[0][:, 0] > 0), source.inputs[:, 0] > 0),
        (ProtectedIntact(where=Target.label(1)), source.targets == 1),
    ):
        finding = release(old, new, [source], [rule, "accuracy"], slices=label).findings[0]
        assert finding.ids.get("test", []) == (broken & mine).nonzero().flatten().tolist()


def test_the_page_and_the_json_say_all():
    report = release(
        trained(seed=2),
        trained(seed=1),
        data(),
        [*RULES, "instance"],
        slices=label,
        seeds={"fit": 1},
    )
    again = ReleaseReport.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert again.to_markdown() == report.to_markdown()
    assert json.loads(report.to_json())["rows"][0]["backward_trust_compatibility"] == pytest.approx(
        report.rows[0].counts.kept / report.rows[0].counts.passed
    )
    page = report.to_markdown()
    for words in (report.new.sha256, report.old.sha256, "test, slice 2", "seed: fit", "BEC"):
        assert words in page
    assert report.render(100).startswith("REFUSED\n\nThe new model may not replace the old one: ")
    accepted = release(trained(), trained(), data(), "accuracy").render()
    assert accepted.startswith(
        "ACCEPTED\n\nThe new model may replace the old one: the rule is satisfied."
    )


def test_ranks_come_to_the_same_report():
    def work(collective: Collective) -> ReleaseReport:
        sources = shares([data()], collective.rank, collective.world_size)
        new = Evaluator(trained(seed=1), collective=collective)
        rules = [*RULES, ProtectedIntact(where=Target.label(2))]
        return release(trained(seed=2), new, sources, rules, slices=label)

    alone = work(Collective())
    first, second = on_ranks(2, work)
    assert alone == first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new": "new.ckpt"}, "`new='new.ckpt'` is no model"),
        ({"old": None}, "`old=None`: nothing to compare with"),
        ({"old": "nowhere.ckpt"}, "does not exist"),
        ({"data": torch.zeros(3)}, "`data`: found a Tensor, not a list of sources"),
        ({"rules": "all"}, "'all' is no rule"),
        ({"rules": "instance in suite"}, "names the split 'suite', but the data have \\['test'\\]"),
        ({"slices": 3.5}, "`slices`"),
        ({"rules": ProtectedIntact(where=lambda batch: batch["kind"])}, "`where` raised"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        release(**{"old": mlp(), "new": mlp(), "data": data(), **arguments})


def decide(arguments: list[str]) -> int:
    return main(["release", *arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReleaseReport]:
    """Predictions of two models as files, slices, and the judgement of the models themselves."""
    folder = tmp_path_factory.mktemp("files")
    old, new, source = trained(seed=1), trained(seed=2), data()
    for name, model in (("old", old), ("new", new)):
        said = model(source.inputs).argmax(1)
        rows = {i: (int(said[i]), bool(said[i] == source.targets[i])) for i in range(len(said))}
        Predictions({"test": rows}, hash_tensors(model.state_dict())).save(folder / f"{name}.csv")
    lines = [f"test,{i},{int(y)}" for i, y in enumerate(source.targets)]
    (folder / "slices.csv").write_text("\n".join(["split,id,slice", *lines]))
    return folder, release(old, new, source, [*RULES, "instance"], slices=label)


def test_files_are_judged_as_the_models_are(files, tmp_path, capsys):
    folder, expected = files
    old, new, slices = (str(folder / f"{name}.csv") for name in ("old", "new", "slices"))
    rules = [part for rule in (*RULES, "instance") for part in ("--rule", rule)]
    assert decide([old, new, *rules, "--slices", slices, "--out", str(tmp_path)]) == 1
    report = ReleaseReport.from_json((tmp_path / "report.json").read_text())
    assert report.findings == expected.findings
    assert report.rows == expected.rows
    assert report.broken_ids == expected.broken_ids
    assert (report.new.sha256, report.old.sha256) == (expected.new.sha256, expected.old.sha256)
    assert capsys.readouterr().out.startswith("REFUSED")
    assert (tmp_path / "report.md").read_text() == report.to_markdown()
    assert decide([new, new, "--rule", "instance"]) == 0


def test_protected_classes_are_told_by_right_predictions(files, tmp_path, capsys):
    old, new = (str(files[0] / f"{name}.csv") for name in ("old", "new"))
    rule = "protected:label 1 or label 2"
    decide([old, new, "--rule", rule, "--out", str(tmp_path)])
    found = ReleaseReport.from_json((tmp_path / "report.json").read_text()).findings[0]
    expected = release(trained(seed=1), trained(seed=2), data(), rule).findings[0]
    assert found.ids == expected.ids != {}
    assert found.reason.partition(";")[0] == expected.reason.partition(";")[0]
    bare = write(tmp_path / "bare.csv", dict.fromkeys(range(4), ",1"))
    assert decide([bare, bare, "--rule", "protected:label 1"]) == 2
    assert "`protected:label 1`: the files do not say which samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "ids", "name", "message"),
    [
        ("val", range(100), "a", "100 samples of `val` are in only one of the files"),
        ("test", range(30, 100), "a", "30 samples of `test` are in only one of the files"),
        ("test", range(101), "a", "1 samples of `test` are in only one of the files"),
        ("test", range(100), " ", "has nothing to check: `test` has no sample in a slice"),
        ("test", (), "a", "has nothing to check: `test` has no sample in a slice"),
    ],
)
def test_slices_of_other_samples_let_no_loss_through(split, ids, name, message, tmp_path, capsys):
    old = write(tmp_path / "old.csv", dict.fromkeys(range(100), "1,1"))
    slices = tmp_path / "slices.csv"
    slices.write_text("\n".join(["split,id,slice", *(f"{split},{at},{name}" for at in ids)]))
    assert decide([old, old, "--rule", "slices", "--slices", str(slices)]) == 2
    assert message in capsys.readouterr().err


def test_files_that_do_not_say_what_is_right_are_refused(tmp_path, capsys):
    (tmp_path / "bare.csv").write_text("split,id,prediction\ntest,0,1\n")
    assert decide([str(tmp_path / "bare.csv"), str(tmp_path / "bare.csv")]) == 2
    assert re.search(
        r"`new` has no value of `passed` for 1 .*HINT: give ", capsys.readouterr().err, re.DOTALL
    )


def write(path: Path, rows: dict[int, str], header: str = "split,id,prediction,passed") -> str:
    path.write_text("\n".join([header, *(f"test,{at},{row}" for at, row in rows.items())]))
    return str(path)


def test_a_net_loss_is_refused_whatever_the_rules(tmp_path, capsys):
    right, wrong = ["1,1"], ["2,0"]
    rows = dict(enumerate(200 * right + 14 * wrong + 16 * right))
    old = write(tmp_path / "old.csv", rows)
    rows = dict(enumerate(200 * right + 14 * right + 16 * wrong))
    new = write(tmp_path / "new.csv", rows)
    assert decide([old, new, "--rule", "nfr:50%"]) == 1
    shown = (
        "accuracy  NOT satisfied: test: 16 of 216 that were right broke; "
        "the gate allows as many as are repaired"
    )
    assert shown in capsys.readouterr().out
    assert decide([old, new, "--rule", "nfr:50%", "--require", "any"]) == 0
    assert decide([new, old, "--rule", "nfr:50%"]) == 0  # 16 repaired, 14 broken
    capsys.readouterr()
    better = [new, old, "--rule", "nfr:50%", "--require", "better"]
    assert decide(better) == 3
    shown = capsys.readouterr().out
    assert shown.index("UNDECIDED") < shown.index("better ")
    assert "Missing: test: 12 more repaired samples would do" in " ".join(shown.split())
    assert decide([*better, "--on-undecided", "accept"]) == 0
    assert decide([*better, "--on-undecided", "refuse"]) == 1
    model = trained()
    report = release(model, model, data(), "nfr:50%")
    assert [finding.rule for finding in report.findings] == ["nfr:50%", "accuracy"]


@pytest.mark.parametrize(
    ("old_row", "new_row"), [("1,1,", "1,0,"), ("1,1,0f", "2,0,0e"), ("1,1,0f", "1,1,0e")]
)
def test_files_of_different_samples_are_refused(old_row, new_row, tmp_path, capsys):
    header = "split,id,prediction,passed,key"
    old = write(tmp_path / "old.csv", {3: old_row, 4: "1,1,0a"}, header)
    new = write(tmp_path / "new.csv", {3: new_row, 4: "2,0,0a"}, header)
    assert decide([old, new]) == 2
    assert "`old`: 1 samples of `test` " in capsys.readouterr().err
    assert decide([old, old]) == 0


def test_samples_that_are_left_out_are_refused(tmp_path, capsys):
    old = write(tmp_path / "old.csv", dict.fromkeys(range(100), "1,1"))
    new = write(
        tmp_path / "new.csv", dict.fromkeys(range(30, 100), "1,1")
    )  # 0 to 29 are what broke
    assert decide([old, new]) == 2
    assert "30 of 100 samples of `test`" in capsys.readouterr().err
    assert decide([old, new, "--allow-missing", "train"]) == 2
    assert "names the split 'train'" in capsys.readouterr().err
    assert decide([old, new, "--allow-missing", "test", "--out", str(tmp_path / "out")]) == 0
    report = ReleaseReport.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.missing == {"test": 30}
    assert " samples were compared." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("new", "test,0,1,1\ntest,0,1,0", "line 3: sample 0 of 'test' occurs twice"),
        ("new", "test,0,1,2", "`passed` is '2', neither 0 nor 1"),
        ("new", 'test,0,1,1\n"test,1,1,0\ntest,2,1,0\ntest",3,1,0', "line 3: it cannot be read"),
        ("new", "test," + "9" * 30 + ",1,1", "`id` is '999"),
        ("new", "test,1_0,1,1", "`id` is '1_0'"),
        ("new", f"test,0,1,1,{'x' * 200_000}", "line 2: it cannot be read (field larger"),
        ("new", "test,0,1", "3 values for 4 columns"),
        ("new", "test,0,,", "neither `prediction` nor `passed` is given"),
        ("ids", 'test,0\n"test,1\ntest,2', "line 3: it cannot be read"),
        ("slices", "test,0,a\ntest,0,b", "sample 0 of 'test' occurs twice"),
        ("spaces", "test,0,1,1,0", "a column occurs twice"),
    ],
)
def test_a_file_that_cannot_be_read_strictly_ends_with_status_2(
    name, text, message, tmp_path, capsys
):
    headers = {
        "new": "split,id,prediction,passed",
        "spaces": "split,id,prediction,passed, passed",
        "ids": "split,id",
        "slices": "split,id,slice",
    }
    good = write(tmp_path / "good.csv", dict.fromkeys(range(4), "1,1"))
    bad = tmp_path / f"{name}.csv"
    bad.write_text(f"{headers[name]}\n{text}\n")
    given = {
        "new": [good, str(bad)],
        "spaces": [good, str(bad)],
        "ids": [good, good, "--rule", f"protected:{bad}"],
        "slices": [good, good, "--rule", "slices", "--slices", str(bad)],
    }
    assert decide(given[name]) == 2
    assert message in capsys.readouterr().err


def test_no_fault_ends_with_the_status_of_a_refusal(tmp_path, capsys):
    good = write(tmp_path / "good.csv", dict.fromkeys(range(4), "1,1"))
    (tmp_path / "file").write_text("not a folder")
    assert decide([good, good, "--out", str(tmp_path / "file" / "out")]) == 4
    assert decide(["--help"]) == 0
    assert "nfr:1%" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_decides(tmp_path, monkeypatch, capsys):
    example = ROOT / "examples" / "release.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(example.parent)
    monkeypatch.setattr(sys, "argv", [str(example), "--fast"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example), run_name="__main__")
    (found,) = tmp_path.rglob("release/report.json")
    report = ReleaseReport.from_json(found.read_text())
    assert (ended.value.code or 0) == report.exit_status
    assert capsys.readouterr().out.lstrip().startswith(report.status.upper())
    assert {row.split for row in report.rows} == {"known", "later"}


def test_the_documented_rule_of_ones_own_can_be_given():
    page = (ROOT / "docs" / "extend.md").read_text().partition("## A release rule")[2]
    found = {}
    exec(page.partition("```python\n")[2].partition("```")[0], found)
    report = release(trained(seed=2), trained(seed=1), data(), found["NoConfidentRegression"](0.0))
    assert report.findings[0].ids == report.broken_ids


def test_every_rule_in_the_how_to_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ids.csv").write_text("split,id\ntest,1\n")
    table = re.search(r"\| as text .*?\n\n", HOW_TO.read_text(), re.DOTALL)
    assert table is not None
    column = "".join(line.split("|")[1] for line in table[0].strip().splitlines()[2:])
    texts = re.findall("`(.*?)`", column)
    assert len(texts) == 17
    for rule in parse_rules(texts):
        assert str(parse_rules(str(rule))[0]) == str(rule)
