"""A suite of samples that must stay right: nothing that was repaired is lost unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.updates import RegressionSuite
from lightning_nrl.updates.suite import SuiteSample

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


def test_what_was_repaired_stays_repaired_over_five_releases(
    capsys: pytest.CaptureFixture[str],
) -> None:
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
        ("test,17\n", "1 protected samples are not in `test` ([17])"),
        ("test,x\n", "`id` is 'x'"),
    ],
)
def test_a_suite_that_covers_nothing_is_an_error(
    lines: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = predictions("model.csv", "++++")
    Path("suite.csv").write_text("split,id\n" + lines)
    assert decide(model, model) == 2
    assert message in capsys.readouterr().err
    assert main(["suite", "check", "suite.csv", "--predictions", model]) == 2


@pytest.mark.parametrize("line", ["test,1,1,,,k2\n", "test,1,0,,,k1\n"])
def test_another_sample_in_its_place_is_an_error(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = predictions("model.csv", "++++")
    Path("suite.csv").write_text(f"split,id,label,since,reason,key\n{line}")
    assert decide(model, model) == 2
    assert "1 samples are not those in the suite" in capsys.readouterr().err


def test_a_suite_that_is_gone_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    model = predictions("model.csv", "++++")
    assert decide(model, model) == 2
    assert "`suite='suite.csv'` does not exist" in capsys.readouterr().err


def test_the_command_lists_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    add = ["suite", "add", "suite.csv", "--sample", "test:2", "--sample", "test:0"]
    assert main(add) == 2
    assert "`reason` is empty" in capsys.readouterr().err
    assert main([*add, "--reason", "incident 12"]) == 0
    assert main(["suite", "list", "suite.csv"]) == 0
    assert "test 0: incident 12 (2026-12-01)\ntest 2: " in capsys.readouterr().out
    check = ["suite", "check", "suite.csv", "--predictions"]
    assert main([*check, predictions("good.csv", "+-+")]) == 0
    assert main([*check, predictions("bad.csv", "++-")]) == 1
    assert "wrong: test 2 (incident 12)" in capsys.readouterr().out


def test_a_suite_that_may_not_grow_is_only_read() -> None:
    Path("suite.csv").write_text("split,id\ntest,1\n")
    suite = RegressionSuite.read(RegressionSuite("suite.csv", grow=False))
    suite.grow_by({("test", 2): SuiteSample()})
    assert Path("suite.csv").read_text() == "split,id\ntest,1\n"


def test_two_writers_lose_nothing() -> None:
    first, second = (RegressionSuite.read("suite.csv", may_be_new=True) for _ in range(2))
    first.grow_by({("test", 1): SuiteSample(since="2026-12-01", reason="a")})
    second.grow_by({("test", 1): SuiteSample(since="2026-12-02"), ("test", 0): SuiteSample()})
    assert RegressionSuite.read("suite.csv").samples == {
        ("test", 0): SuiteSample(),
        ("test", 1): SuiteSample(since="2026-12-01", reason="a"),
    }


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)


@given(
    st.dictionaries(
        st.tuples(st.text("abc:, \"'", min_size=1, max_size=4), st.integers(0, 99)),
        st.builds(SuiteSample, st.none() | st.integers(0, 9), st.just(""), TEXTS, st.just("k")),
        min_size=1,
    )
)
def test_the_file_is_read_as_it_was_written(samples: dict[tuple[str, int], SuiteSample]) -> None:
    suite = RegressionSuite("any.csv", samples=samples)
    suite.save()
    text = Path("any.csv").read_text()
    assert text.count("\n") == 1 + len(samples)
    again = RegressionSuite.read("any.csv")
    assert again.samples.keys() == samples.keys()
    again.save()
    assert Path("any.csv").read_text() == text


def test_an_unknown_column_value_is_named() -> None:
    Path("suite.csv").write_text("split,id,label\ntest,1,three\n")
    with pytest.raises(ConfigurationError, match=r"line 2: `label` is 'three'"):
        RegressionSuite.read("suite.csv")
