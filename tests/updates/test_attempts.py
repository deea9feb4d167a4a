"""Attempts to talk the gate round: none of them is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightning_nrl.entrypoints.command_line import main

HEADER = "split,id,prediction,passed,key\n"
OLD, NEW = "+" * 100, "+" * 90 + "-" * 10


def rows(right: str, split: str = "test", key: str = "k{}") -> list[str]:
    """Predictions of class 1: `+` for a right sample, `-` for a wrong one."""
    return [
        f"{split},{at},{int(c == '+')},{int(c == '+')},{key.format(at)}"
        for at, c in enumerate(right)
    ]


def slices(*names: str) -> str:
    lines = [f"test,{at},{names[at % len(names)]}" for at in range(100)]
    return "split,id,slice\n" + "\n".join(lines)


def suite(line: str) -> dict[str, str]:
    return {"suite.csv": f"split,id,label,since,reason,key\n{line}"}


def rule(text: str, *more: str) -> list[str]:
    return ["--require", "any", "--rule", text, *more]


@dataclass(frozen=True)
class Attempt:
    """Two files of predictions, the arguments, further files, and the exit status."""

    status: int
    arguments: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    old: Sequence[str] = tuple(rows(OLD))
    new: Sequence[str] = tuple(rows(NEW))


KEPT = rows(OLD)
SUITE = rule("tolerance:50", "--suite", "suite.csv")
SLICED = rule("slices", "--slices", "slices.csv")
SMALL_SLICES = {"slices.csv": slices(*map(str, range(10)))}
ONE_SAMPLE = rows("+" * 400, key="k")
ATTEMPTS = {
    "the change as it is": Attempt(1),
    "no predictions": Attempt(2, new=[]),
    "an id twice, right at last": Attempt(2, new=rows(NEW) + KEPT[95:]),
    "what broke left out": Attempt(2, new=rows(NEW[:90])),
    "another split may lack samples": Attempt(2, ["--allow-missing", "val"], new=rows(NEW[:90])),
    "a renamed split": Attempt(2, new=rows(OLD, "later")),
    "samples in another order": Attempt(2, new=rows(OLD, key="k1{}")),
    "an id in other digits": Attempt(2, new=[*KEPT[:-1], "test,\uff19\uff19,1,1,"]),
    "no word on what is right": Attempt(2, new=[row.replace(",0,0,", ",0,,") for row in rows(NEW)]),
    "right and wrong at once": Attempt(2, new=[row.replace(",0,0,", ",1,0,") for row in rows(NEW)]),
    "one easy sample many times": Attempt(3, rule("nfr:1%"), old=ONE_SAMPLE, new=ONE_SAMPLE),
    "a slice under two names": Attempt(2, SLICED, {"slices.csv": slices("night", "Night ")}),
    "no sample in a slice": Attempt(2, SLICED, {"slices.csv": slices("")}),
    "slices too small to judge": Attempt(
        3, rule("slice-nfr:5%", "--slices", "slices.csv"), SMALL_SLICES, new=KEPT
    ),
    "a rule for no split": Attempt(2, rule("instance in x")),
    "a limit of everything": Attempt(2, rule("nfr:100%")),
    "a floor of nothing": Attempt(2, rule("floor:0%")),
    "a limit that is no number": Attempt(2, rule("nfr:nan%")),
    "an infinite tolerance": Attempt(2, rule("tolerance:inf")),
    "a rule that nothing can satisfy yet": Attempt(1, ["--require", "better"], new=KEPT),
    "a wrong word for undecided": Attempt(2, ["--on-undecided", "yes"], new=KEPT),
    "an emptied suite": Attempt(2, SUITE, suite("")),
    "a suite that is gone": Attempt(2, SUITE),
    "a suite of another split": Attempt(2, SUITE, suite("Test,95,1,2026-01-01,,")),
    "a suite of ids that are gone": Attempt(2, SUITE, suite("test,950,1,2026-01-01,,")),
    "a suite of moved samples": Attempt(2, SUITE, suite("test,3,1,2026-01-01,,k95")),
    "a sample of the suite twice": Attempt(2, SUITE, suite("test,3,,,,\ntest,3,,,,"), new=KEPT),
    "an old model that had lost it": Attempt(
        1, SUITE, suite("test,95,1,2026-01-01,,"), old=rows(NEW)
    ),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_attempt_is_accepted(
    attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ATTEMPTS[attempt]
    monkeypatch.chdir(tmp_path)
    for name, lines in (("old.csv", made.old), ("new.csv", made.new)):
        Path(name).write_text(HEADER + "\n".join(lines) + "\n")
    for name, text in made.files.items():
        Path(name).write_text(text + "\n")
    assert main(["release", "old.csv", "new.csv", *made.arguments]) == made.status


def test_a_junit_file_of_before_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text(HEADER + "\n".join(rows(OLD)))
    Path("new.csv").write_text(HEADER + "\n".join(rows(NEW)))
    Path("release.xml").write_text("<testsuites><testsuite name='forged' tests='1'/></testsuites>")
    assert main(["release", "old.csv", "new.csv", "--junit", "release.xml"]) == 1
    text = Path("release.xml").read_text()
    assert "forged" not in text
    assert "<failure" in text


def test_equal_models_are_said_to_be_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text("# weights abc\n" + HEADER + "\n".join(rows(OLD)))
    assert main(["release", "new.csv", "new.csv"]) == 0
    assert "Both models have the same weights" in " ".join(capsys.readouterr().out.split())
