"""A suite of samples that must stay right: nothing that was repaired is lost unnoticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_processes import server

from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.release import ProtectedIntact, RegressionSuite
from lightning_nrl.release.suite import SuiteSample

ROOT = Path(__file__).parents[2]
HEADER = "split,id,prediction,passed,key\n"
Files = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def _day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1796083200")  # 2026-12-01
    monkeypatch.chdir(tmp_path)


def predictions(name: str, right: str) -> str:
    """Writes predictions of class 1: `+` for a right sample, `-` for a wrong one."""
    rows = [f"test,{at},{int(c == '+')},{int(c == '+')},k{at}" for at, c in enumerate(right)]
    Path(name).write_text(HEADER + "\n".join(rows))
    return name


def decide(old: str, new: str, *more: str) -> int:
    arguments = ["--rule", "tolerance:1", "--require", "any", "--suite", "suite.csv"]
    return main(["release", old, new, *arguments, *more])


def test_what_was_repaired_stays_repaired_over_five_releases(capsys):
    assert main(["suite", "add", "suite.csv", "--sample", "test:0", "--reason", "contract"]) == 0
    releases = ["++++--", "+++++-", "++++++", "+-++++", "+-+++-", "++++++"]
    models = [predictions(f"{i}.csv", right) for i, right in enumerate(releases)]
    assert decide(models[0], models[1]) == 0  # repairs 4
    assert decide(models[1], models[2]) == 0  # repairs 5
    assert decide(models[2], models[3]) == 0  # breaks 1, which the rule allows
    lines = Path("suite.csv").read_text().splitlines()
    assert lines == [
        "split,id,label,since,reason,key",
        "test,0,,2026-12-01,contract,",
        "test,1,1,,broke in the release of 2026-12-01 (3.csv),k1",
        "test,4,1,2026-12-01,repaired in the release of 2026-12-01 (1.csv),k4",
        "test,5,1,2026-12-01,repaired in the release of 2026-12-01 (2.csv),k5",
    ]
    capsys.readouterr()
    assert decide(models[3], models[4]) == 1  # one broken sample, which the rule alone allows
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrong: test 5 (repaired in the release of 2026-12-01 (2.csv))" in shown
    assert Path("suite.csv").read_text().splitlines() == lines
    # A model in use that has lost the repair too does not excuse it.
    assert decide(models[4], models[4]) == 1
    assert decide(models[3], models[5]) == 0
    assert "test,1,1,2026-12-01,repaired in the release" in Path("suite.csv").read_text()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no sample"),
        ("test,1\ntest,1\n", "sample 1 of 'test' occurs twice"),
        ("later,1\n", "names the split 'later', but the data have"),
        ("test,17\n", "1 protected samples are not in the data (test 17)"),
        ("test,x\n", "`id` is 'x'"),
    ],
)
def test_a_suite_that_covers_nothing_is_an_error(lines, message, capsys):
    model = predictions("model.csv", "++++")
    Path("suite.csv").write_text("split,id\n" + lines)
    assert decide(model, model) == 2
    assert message in capsys.readouterr().err
    assert main(["suite", "check", "suite.csv", "--predictions", model]) == 2


@pytest.mark.parametrize("line", ["test,1,1,,,k2\n", "test,1,0,,,k1\n"])
def test_another_sample_in_its_place_is_an_error(line, capsys):
    model = predictions("model.csv", "++++")
    Path("suite.csv").write_text(f"split,id,label,since,reason,key\n{line}")
    assert decide(model, model) == 2
    message = "1 samples of `test` have another label or key than in the suite (1)"
    assert message in capsys.readouterr().err


def test_a_suite_that_is_gone_is_an_error(capsys):
    model = predictions("model.csv", "++++")
    assert decide(model, model) == 2
    assert "`suite='suite.csv'` does not exist" in capsys.readouterr().err
    assert not Path("suite.csv").exists()  # an accepted release would have started it


def test_the_command_lists_and_checks(capsys):
    add = ["suite", "add", "suite.csv", "--sample", "test:2", "--sample", "test:0"]
    assert main(add) == 2
    assert "`reason` is empty" in capsys.readouterr().err
    assert main([*add, "--reason", "incident 12"]) == 0
    assert main(["suite", "list", "suite.csv"]) == 0
    assert "test 0: incident 12 (2026-12-01)\ntest 2: " in capsys.readouterr().out
    check = ["suite", "check", "suite.csv", "--predictions"]
    assert main([*check, predictions("good.csv", "+-+")]) == 0
    assert main([*check, predictions("bad.csv", "++-")]) == 1
    assert "1 of 2 samples are wrong.\ntest 2: incident 12 (2026-12-01)" in capsys.readouterr().out


def test_a_suite_that_may_not_grow_is_only_read():
    Path("suite.csv").write_text("split,id\ntest,1\n")
    suite = RegressionSuite.read(RegressionSuite("suite.csv", grow=False))
    suite.grow_by({("test", 2): SuiteSample()})
    assert Path("suite.csv").read_text() == "split,id\ntest,1\n"


def test_two_writers_lose_nothing():
    first, second = (RegressionSuite.read("suite.csv", may_be_new=True) for _ in range(2))
    first.grow_by({("test", 1): SuiteSample(since="2026-12-01", reason="a")})
    second.grow_by({("test", 1): SuiteSample(since="2026-12-02"), ("test", 0): SuiteSample()})
    assert RegressionSuite.read("suite.csv").samples == {
        ("test", 0): SuiteSample(),
        ("test", 1): SuiteSample(since="2026-12-01", reason="a"),
    }


def add_many(folder: Path, *ids: int) -> None:
    os.chdir(folder)
    for at in ids:
        assert main(["suite", "add", "suite.csv", "--sample", f"test:{at}", "--reason", "x"]) == 0


def test_two_processes_that_add_lose_nothing(tmp_path):
    ranges = range(30), range(30, 60)
    writers = [server().Process(target=add_many, args=(tmp_path, *ids)) for ids in ranges]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(RegressionSuite.read("suite.csv").samples) == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split,id,sinse\ntest,1,2026-01-01\n", "sinse'` is unknown.\nHINT: did you mean 'since'?"),
        ("split,id,Since\ntest,1,2026-01-01\n", "did you mean 'since'?"),
        ("split,id,since,\ntest,1,2026-01-01,\n", "`column of suite.csv=''` is unknown"),
        ("split,id,owner\ntest,1,me\n", "owner'` is unknown"),
        ("split,id,since\ntest,1,never\n", "line 2: `since` is 'never', not a day"),
        ("split,id,since\ntest,1,01/02/2026\n", "`since` is '01/02/2026'"),
        ("split,id,since\ntest,1, \n", "`since` is ' '"),
        ("split,id,since\ntest,1,2026-02-30\n", "`since` is '2026-02-30'"),
    ],
)
def test_what_a_suite_cannot_mean_is_an_error(text, message, capsys):
    Path("suite.csv").write_text(text)
    assert decide(predictions("old.csv", "+-"), predictions("new.csv", "++")) == 2
    assert message in capsys.readouterr().err
    assert main(["suite", "add", "suite.csv", "--sample", "test:0", "--reason", "x"]) == 2
    assert Path("suite.csv").read_text() == text


def test_line_ends_stay_as_they_are():
    Path("suite.csv").write_bytes(b"split,id,since\r\ntest,1,2026-01-01\r\n")
    assert main(["suite", "add", "suite.csv", "--sample", "test:0", "--reason", "x"]) == 0
    assert Path("suite.csv").read_bytes() == (
        b"split,id,label,since,reason,key\r\ntest,0,,2026-12-01,x,\r\ntest,1,,2026-01-01,,\r\n"
    )


def test_a_wrong_sample_without_a_day_fails_the_check(capsys):
    Path("suite.csv").write_text("split,id\ntest,0\ntest,1\n")
    model = predictions("model.csv", "+-")
    assert main(["suite", "check", "suite.csv", "--predictions", model]) == 1
    assert "1 of 2 samples are wrong.\ntest 1: no reason (once right)" in capsys.readouterr().out


def test_a_sample_that_gets_a_day_keeps_its_label_and_key():
    Path("suite.csv").write_text("split,id,label,since,reason,key\ntest,1,1,,broke,k1\n")
    assert main(["suite", "add", "suite.csv", "--sample", "test:1", "--reason", "x"]) == 0
    entry = SuiteSample(1, "2026-12-01", "x", "k1")
    assert RegressionSuite.read("suite.csv").samples == {("test", 1): entry}


def test_a_release_leaves_a_suite_alone_that_may_not_grow():
    text = "split,id\ntest,0\n"
    Path("suite.csv").write_text(text)
    models = predictions("old.csv", "+-"), predictions("new.csv", "++")
    assert decide(*models, "--grow", "false") == 0
    assert Path("suite.csv").read_text() == text
    assert decide(*models, "--grow", "true") == 0
    assert RegressionSuite.read("suite.csv").samples.keys() == {("test", 0), ("test", 1)}


def test_a_suite_that_was_read_is_not_read_again():
    Path("suite.csv").write_text("split,id\ntest,0\n")
    suite = RegressionSuite.read("suite.csv")
    Path("suite.csv").unlink()
    assert str(ProtectedIntact(suite)) == "protected:suite.csv"


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)


@given(
    st.dictionaries(
        st.tuples(st.text("abc:, \"'", min_size=1, max_size=4), st.integers(0, 99)),
        st.builds(SuiteSample, st.integers(-1, 9), st.just(""), TEXTS, st.just("k")),
        min_size=1,
    )
)
def test_the_file_is_read_as_it_was_written(samples):
    suite = RegressionSuite("any.csv", samples=samples)
    suite.save()
    text = Path("any.csv").read_text()
    assert text.count("\n") == 1 + len(samples)
    again = RegressionSuite.read("any.csv")
    assert again.samples.keys() == samples.keys()
    again.save()
    assert Path("any.csv").read_text() == text


def test_an_unknown_column_value_is_named():
    Path("suite.csv").write_text("split,id,label\ntest,1,three\n")
    with pytest.raises(ConfigurationError, match=r"line 2: `label` is 'three'"):
        RegressionSuite.read("suite.csv")
