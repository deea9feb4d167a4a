"""The workflow for CI: its commands, run on real checkpoints as GitHub would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from shutil import copy, copytree

import pytest
import torch
import yaml
from junitparser import JUnitXml
from packaging.requirements import Requirement
from repository import ROOT
from torch.utils.data import DataLoader, Subset

from lightning_nrl import ReleaseGate
from lightning_nrl.entrypoints.command_line import main

EXAMPLES = ROOT / "examples"
WORKFLOW = yaml.safe_load((EXAMPLES / "ci/release_gate.yml").read_text())
MODULES = ("digits", "output")
STEPS = {step.get("name", step.get("uses")): step for step in WORKFLOW["jobs"]["gate"]["steps"]}
OLD, NEW = WORKFLOW["env"]["OLD"], WORKFLOW["env"]["NEW"]
OLD_MODEL, NEW_PREDICTIONS = "old.ckpt", "later/predictions.csv"
UNDECIDED = {"NEW": OLD_MODEL, "RULES": "[nfr:0.1%]"}  # nothing breaks; 537 samples are too few
REFUSED = {"OLD": NEW_PREDICTIONS, "NEW": OLD_MODEL}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A team's project, with the names that the workflow expects."""
    folder = tmp_path_factory.mktemp("team")
    for name in MODULES:
        copy(EXAMPLES / f"{name}.py", folder)
    copy(EXAMPLES / "lightning_cli.yaml", folder / WORKFLOW["env"]["CONFIG"])
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(str(folder))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        digits, output = map(import_module, MODULES)
        data = digits.SlashedZeros()
        right = torch.ones(537, dtype=torch.bool)
        images, labels, _ = data.data["test"].tensors
        for path, predictions, n in ((OLD_MODEL, OLD, 200), (NEW, NEW_PREDICTIONS, 720)):
            torch.manual_seed(0)
            model = digits.DigitNet()
            trainer = output.quiet_trainer(20)
            trainer.fit(model, DataLoader(Subset(data.data["train"], range(n)), 32, shuffle=True))
            trainer.save_checkpoint(folder / path)
            place = (folder / predictions).parent
            gate = ReleaseGate(deepcopy(model), verbose=False, dirpath=place)
            trainer.callbacks.append(gate)
            trainer.test(model, DataLoader(data.data["test"], 64), verbose=False)
            with torch.no_grad():
                right &= model.eval()(images).argmax(1) == labels
        at = int(right.nonzero()[0])
        (folder / WORKFLOW["env"]["SUITE"]).write_text(f"split,id,label\ntest,{at},{labels[at]}\n")
        for name in MODULES:
            del sys.modules[name]
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    yield tmp_path
    for name in MODULES:  # imported from the folder
        sys.modules.pop(name, None)


def in_bash(program: str, command: str, changes: Mapping[str, str]) -> tuple[int, str]:
    """Runs a command as GitHub does, with `program` in place of `lightning-nrl`."""
    script = f'lightning-nrl() {{ {program} "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **WORKFLOW["env"], **changes},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def outcomes(folder: Path) -> dict[str, int]:
    """Number of test cases of each kind in the file that the workflow publishes."""
    document = JUnitXml.fromfile(str(folder / STEPS["Show the rules"]["with"]["report_paths"]))
    return {
        "tests": sum(suite.tests for suite in document),
        "failures": sum(suite.failures for suite in document),
        "errors": sum(suite.errors for suite in document),
        "skipped": sum(suite.skipped for suite in document),
    }


@pytest.mark.slow
def test_a_refusal_fails_the_job_and_is_published(folder):
    status, shown = in_bash(f"{sys.executable} -m lightning_nrl", STEPS["Gate"]["run"], REFUSED)
    assert status == 1
    assert "\nREFUSED\n" in shown
    assert outcomes(folder)["failures"] >= 2
    assert (folder / "summary.md").read_text().startswith("# Refused\n")
    kept = STEPS["Keep the report"]["with"]["path"].replace(
        "${{ env.SUITE }}", WORKFLOW["env"]["SUITE"]
    )
    report, suite = (folder / path for path in kept.split())
    assert {path.name for path in report.iterdir()} == {
        "junit.xml",
        "predictions.csv",
        "report.html",
        "report.json",
        "report.md",
    }
    assert suite.read_text().count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "verdict", "counts"),
    [
        ({}, 0, "Accepted", {"failures": 0, "errors": 0, "skipped": 0}),
        (UNDECIDED, 1, "Undecided", {"failures": 0, "errors": 1, "skipped": 0}),
        (
            {**UNDECIDED, "ON_UNDECIDED": "accept"},
            0,
            "Undecided",
            {"failures": 0, "errors": 0, "skipped": 1},
        ),
    ],
    ids=["accepted", "undecided", "undecided and accepted"],
)
def test_the_status_is_what_the_variables_ask_for(folder, changes, status, verdict, counts):
    _, words = in_bash("printf '%s\\0'", STEPS["Gate"]["run"], changes)
    assert main(words.split("\0")[:-1]) == status
    assert outcomes(folder).items() >= counts.items()
    assert (folder / "summary.md").read_text().startswith(f"# {verdict}\n")
    grown = (folder / WORKFLOW["env"]["SUITE"]).read_text().count("\n") > 2
    assert grown == (verdict == "Accepted")


def test_without_a_word_on_undecided_models_the_status_is_3(folder):
    _, words = in_bash("printf '%s\\0'", STEPS["Gate"]["run"], UNDECIDED)
    arguments = words.split("\0")[:-1]
    at = arguments.index("--on_undecided")
    assert main(arguments[:at] + arguments[at + 2 :]) == 3


def test_the_package_is_installed_with_extras_that_it_has():
    lines = [shlex.split(line) for line in STEPS["Install"]["run"].splitlines()]
    assert [line[:4] for line in lines] == [["python", "-m", "pip", "install"]] * 2
    package = Requirement(lines[1][4])
    assert package.name == "lightning_nrl"
    assert package.extras == {"cli"}
    assert '\ncli = ["jsonargparse' in (ROOT / "pyproject.toml").read_text()
    assert package.url == "git+https://github.com/lightning-nrl/lightning_nrl"


def test_what_follows_the_gate_runs_after_a_refusal_too():
    *_, gate, show, keep = WORKFLOW["jobs"]["gate"]["steps"]
    assert "if" not in gate
    assert show["if"] == keep["if"] == "${{ !cancelled() }}"
    assert set(re.findall(r"\$(\w+)", gate["run"])) == set(WORKFLOW["env"])
    for action in (step["uses"] for step in STEPS.values() if "uses" in step):
        assert re.fullmatch(r"(actions|mikepenz)/[\w-]+@v\d+", action)
