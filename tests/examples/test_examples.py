"""Every example runs, in a small size, and breaks no known sample. What it takes is said in
`examples/README.md`.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from repository import ROOT

EXAMPLES = ROOT / "examples"
SHARED = {"digits", "output"}
ALONE = {"quickstart", "release", "registry", "ddp"}  # all but the last have tests of their own
NO_REPAIRS = {"strangers"}  # needs an environment for each package
SCRIPTS = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED | ALONE | NO_REPAIRS
)
NEEDS = {"tabular": "plotnine"}
REPAIRS_NOTHING = {"diagnose", "compare", "update"}  # their tables are others
DRAWS = {"compare", "diagnose"}
PARTS = {"compare": ["--methods", "convex"], "custom": ["method"]}
LONG = {"attribute_slice", "lightning_cli", "ddp"}
"""More than ten seconds each: `NRL_EXAMPLES=1` runs them too."""
LINE = re.compile(
    r"^ *(.*?known) +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)% +([\d.]+)%",
    re.MULTILINE,
)


@pytest.fixture
def as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in an empty folder; what a script leaves in the process is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "120")
    threads, modules = torch.get_num_threads(), set(sys.modules)
    with torch.random.fork_rng(), warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    for name in (*SHARED, *SCRIPTS):
        if name not in modules:
            sys.modules.pop(name, None)


def arguments_of(name: str) -> list[str]:
    if name == "lightning_cli":
        return ["fit", f"--config={EXAMPLES / 'lightning_cli.yaml'}", "--trainer.max_epochs=5"]
    return ["--fast", *PARTS.get(name, [])]


def skip_if_long(name: str) -> None:
    if name in LONG and "NRL_EXAMPLES" not in os.environ:
        pytest.skip("set NRL_EXAMPLES=1 to run the long examples")


def check_lines(out: str) -> None:
    """The table's counts of known samples agree with its accuracies, and nothing broke.

    How much is repaired in so little time differs from machine to machine.
    """
    lines = LINE.findall(out)
    assert lines, out
    for _name, samples, _target, _of_these, repaired, broken, before, now in lines:
        n, gained, lost = (int(text.replace(",", "")) for text in (samples, repaired, broken))
        assert lost == 0, out
        assert float(now) - float(before) == pytest.approx(100 * (gained - lost) / n, abs=0.011)


@pytest.mark.slow
@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_repairs_and_breaks_nothing_known(name, monkeypatch, capsys):
    skip_if_long(name)
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not among the test dependencies")
    if name not in DRAWS:  # figures of a report take longer than a repair this small
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), *arguments_of(name)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    if name not in REPAIRS_NOTHING:
        check_lines(out)
    if name == "update":
        broken = re.findall(r"^ *(?:as trained|repaired) +(\d+) ", out, re.MULTILINE)
        assert len(broken) == 2
        assert int(broken[1]) <= int(broken[0])
    if name == "repair_in_fit":
        (tested,) = re.findall(r"own test of the repaired checkpoint: ([\d.]+)%", out)
        assert re.search(rf"^ *unseen .* {re.escape(tested)}%", out, re.MULTILINE)


@pytest.mark.slow
def test_two_processes_repair_alike(tmp_path):
    skip_if_long("ddp")
    environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "ddp.py"), "--fast"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout)
    assert "2 processes hold the same weights" in done.stdout


def test_the_page_of_examples_names_each_and_no_other():
    page = (EXAMPLES / "README.md").read_text()
    named = re.findall(r"^\| \[`(\w+)\.py`\]", page, re.MULTILINE)
    assert sorted(named) == sorted({*SCRIPTS, *ALONE})
