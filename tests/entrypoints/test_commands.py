"""The project and the commands of docs/command_line.md, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from junitparser import JUnitXml
from repository import ROOT

from lightning_nrl import RegressionSuite, RepairReport
from lightning_nrl.entrypoints import command_project as project_module
from lightning_nrl.entrypoints.command_line import COMMANDS, main
from lightning_nrl.entrypoints.command_project import read_project
from lightning_nrl.errors import FilesWarning

PAGE = (ROOT / "docs" / "command_line.md").read_text()
PROJECT = ["--config", "config.yaml", "--ckpt_path", "best.ckpt"]

pytestmark = [
    pytest.mark.usefixtures("without_figures"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*deprecated"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def report_in(folder: Path) -> RepairReport:
    return RepairReport.from_json((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project of the page, with a checkpoint."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project.py").write_text(blocks("python")[0])
    (folder / "config.yaml").write_text(blocks("yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        module = import_module("my_project")
        torch.manual_seed(0)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", **quiet)
        trainer.fit(module.Classifier(24), datamodule=module.Digits())
        trainer.save_checkpoint("best.ckpt", weights_only=False)
        yield folder
        sys.modules.pop("my_project")


@pytest.mark.slow
def test_the_commands_of_the_page_work_as_they_stand(folder, capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 13
    shown = {}
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "lightning-nrl"
        status, (out, err) = main(arguments), capsys.readouterr()
        assert status == ("REFUSED" in out or "not accepted: " in err), line
        shown[line] = out
    assert "target  " in shown[lines[1]]
    assert "not label 1 and not where my_project:is_dark" in " ".join(shown[lines[1]].split())
    assert "accuracy  " in shown[lines[5]]
    report = report_in(folder / "three")
    assert (report.target, report.layers, report.settings["seed"]) == ("label 3", ("network.3",), 0)
    assert [split.split for split in report.splits if split.role == "unseen"] == ["test"]
    old, patched, reverted, repaired = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in ("best.ckpt", "patched.ckpt", "reverted.ckpt", "three/repaired.ckpt")
    )
    assert all(torch.equal(old[name], reverted[name]) for name in old)
    assert all(torch.equal(patched[name], repaired[name]) for name in old)
    assert not torch.equal(old["network.3.weight"], patched["network.3.weight"])
    assert "network.3.weight" in shown[lines[9]]
    assert "REPAIRED" in shown[lines[10]]
    assert (folder / "report.md").read_text().startswith("# Repaired: promise kept, ")
    assert "<title>Repaired: " in (folder / "report.html").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: lightning-nrl {command}")
    assert len(shown.splitlines()) < 120
    project = command in ("repair", "diagnose", "compare")
    assert ("--repair.target" in shown) == ("--help_lightning" in shown) == project
    if project:
        assert (
            shown.index("--ckpt_path VALUE")
            < shown.index("--repair.target")
            < shown.index("--trainer")
        )


def test_the_help_of_diagnose_lists_what_has_an_effect(capsys):
    assert main(["diagnose", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    options = set(re.findall(r"--repair\.(\w+)", shown)) - {"ARGUMENT"}
    assert options == {"target", "task", "data", "seed"}
    assert "FIELD: passed, failed, adapter, output, draws, stream_limit." in shown


def test_the_whole_help_is_that_of_lightning_cli(capsys):
    assert main(["repair", "--help_lightning"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_versions_are_printed_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "lightning_nrl", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"lightning_nrl \S+, torch \S+, pytorch-lightning ", result.stdout)
    assert (
        re.findall(r"\| +(torch|lightning|pytorch_lightning)$", result.stderr, re.MULTILINE) == []
    )
    assert (
        '\nlightning-nrl = "lightning_nrl.__main__:main"\n' in (ROOT / "pyproject.toml").read_text()
    )


def test_the_program_has_help_and_a_version(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert main(["--version"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["reapir"]) == 2
    assert "invalid choice: 'reapir'" in capsys.readouterr().err


def failing(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of arguments that cannot be used, without a traceback."""
    assert main(["diagnose", *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_errors_are_said_with_a_hint(folder, capsys):
    message = failing(folder, capsys, *PROJECT, "--repair.target", "label three")
    assert "found `three`" in message
    assert "HINT: write `label 3`" in message
    assert "nowhere.ckpt" in failing(folder, capsys, *PROJECT, "--ckpt_path", "nowhere.ckpt")
    assert "nowhere.yaml" in failing(folder, capsys, "--config", "nowhere.yaml")
    assert "no_such" in failing(folder, capsys, *PROJECT, "--model", "no_such.Model")
    assert "HINT" in failing(folder, capsys, "--ckpt_path", "nowhere.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--repair.search.n_scored -1",
            "`n_scored=-1` is out of range.\nHINT: give a whole number from 2.",
        ),
        ("--repair.bounds.strength 7", "`strength=7.0` is no strength.\nHINT: "),
        ("--repair.data.draws 0", "`draws=0` is out of range.\nHINT: "),
        ('--repair.samples.quotas {"night":-5}', "`quotas`: -5 for 'night' is no quota.\nHINT: "),
        (
            "--repair.task lightning_nrl.tasks.Regression --repair.task.tolerance 0",
            "`Regression.tolerance=0.0` is no ",
        ),
        ("--config nested.yaml", "`n_scored=-1` is out of range.\nHINT: "),
        (
            "--model.hidden 12",
            "`ckpt_path='best.ckpt'` does not fit Classifier: size mismatch for network.1.weight",
        ),
        ("--config best.ckpt", "`config='best.ckpt'` is no text.\nHINT: "),
        ("--ckpt_path state.pt", "`ckpt_path='state.pt'` is no Lightning checkpoint: it has no `"),
    ],
)
def test_values_that_cannot_be_used_have_no_traceback(folder, capsys, arguments, message):
    (folder / "nested.yaml").write_text(
        blocks("yaml")[0].replace("unseen: test", "search: {n_scored: -1}")
    )
    torch.save(torch.load(folder / "best.ckpt")["state_dict"], folder / "state.pt")
    assert f"error: {message}" in failing(folder, capsys, *PROJECT, *arguments.split())


def test_options_of_the_callback_of_the_trainer_are_heeded(folder):
    nested = "data: {failed: train}\n        method: {class_path: lightning_nrl.ParticleSwarm}"
    (folder / "options.yaml").write_text(blocks("yaml")[0].replace("unseen: test", nested))
    options = read_project("repair", "", [*PROJECT, "--config", "options.yaml"]).options
    assert (options["data"].failed, type(options["method"]).__name__) == ("train", "ParticleSwarm")


@pytest.mark.parametrize("command", ["repair", "compare"])
def test_weights_that_nobody_has_trained_are_refused(folder, capsys, command):
    assert main([command, "--config", "config.yaml"]) == 2
    message = capsys.readouterr().err
    assert "error: `ckpt_path` is not given" in message
    assert "--ckpt_path model if its own code loads them" in message
    assert main([command, "--ckpt_path", "model"]) == 2
    assert "required: model.\nHINT: name a project by --config" in capsys.readouterr().err
    project = read_project(command, "", [*PROJECT, "--ckpt_path", "model"])
    assert project.source["ckpt_path"] is None


CONVEX = [*PROJECT, "--repair.method", "convex", "--repair.dirpath"]


def test_a_folder_that_cannot_be_written_ends_with_3_before_the_repair(folder, capsys):
    for place in ("best.ckpt", "best.ckpt/inside"):
        assert main(["repair", *CONVEX, place]) == 4
        out, err = capsys.readouterr()
        assert f"error: `dirpath`: {place} cannot be written to" in err
        assert "network.3" not in out  # no line of a report


def test_a_repair_that_cannot_be_saved_ends_with_3_and_claims_nothing(folder, capsys, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(FilesWarning, match="No space left"):
        assert main(["repair", *CONVEX, "full"]) == 4
    out, err = capsys.readouterr()
    assert "error: `dirpath`: repaired.ckpt could not be written, so the repair is lost." in err
    assert "REPAIRED" not in out


def test_a_fault_of_the_project_ends_with_2_and_its_traceback(folder, capsys):
    (folder / "faulty.py").write_text(
        "from my_project import *\nclass Faulty(Digits):\n  def setup(self, stage): 1 / 0\n"
    )
    assert main(["diagnose", *PROJECT, "--data", "faulty.Faulty"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_refusal_ends_with_1(folder):
    options = (
        "--repair.dirpath refused --repair.method lightning_nrl.ParticleSwarm "
        "--repair.method.iterations 1 --repair.method.particles 2 --repair.verbose false "
        "--repair.bounds.strength 0.000001"
    )
    assert main(["repair", *PROJECT, *options.split()]) == 1
    assert report_in(folder / "refused").status != "repaired"


LOADED = """
from dataclasses import dataclass
import torch
from lightning_nrl.methods import Method, Problem, Solution

@dataclass(frozen=True)
class Loaded(Method):
    path: str

    def __call__(self, problem: Problem) -> Solution:
        state = torch.load(self.path, weights_only=True)
        patch = {f"network.3.{name}": state[name] for name in state}
        return Solution(problem.propose(self.path, patch))
"""


def test_a_repair_that_is_not_what_is_required_ends_with_1(folder, capsys):
    (folder / "loaded.py").write_text(LOADED)
    last = torch.load("best.ckpt", weights_only=True)["state_dict"]
    last = {name: last[f"network.3.{name}"] for name in ("weight", "bias")}
    torch.save(
        last | {"bias": last["bias"] + 3 * torch.eye(10)[3]}, "harm.pt"
    )  # all that is doubtful is a 3
    loaded = (
        "--repair.method loaded.Loaded --repair.method.path harm.pt --repair.gate tolerance:100% "
        "--repair.dirpath"
    )
    messages = {}
    for require in ("any", "not-worse", "better"):
        options = ["--repair.target", "label 3", *loaded.split(), require, "--require", require]
        assert main(["repair", *PROJECT, *options]) == (require != "any"), require
        messages[require] = capsys.readouterr().err
    assert "not accepted" not in messages["any"]
    verdict = report_in(folder / "better").verdict
    assert (verdict.evidence, verdict.source) == ("worse", "unseen")
    counts = f"{verdict.repaired} repaired, {verdict.broken} broken of 1,097 unseen samples"
    assert f"not accepted: `--require not-worse` is not met: {counts}" in messages["not-worse"]
    assert f"not accepted: `--require better` is not met: {counts}" in messages["better"]
    assert "HINT: do not ship better/repaired.ckpt; keep best.ckpt." in messages["better"]


def test_what_is_required_needs_unseen_data(folder, capsys):
    (folder / "seen.yaml").write_text(blocks("yaml")[0].replace("        unseen: test\n", ""))
    arguments = "repair --config seen.yaml --ckpt_path best.ckpt --require better"
    assert main(arguments.split()) == 2
    assert "`require=better`" in capsys.readouterr().err


@pytest.fixture
def worse(folder: Path) -> str:
    """A checkpoint that takes nothing for a 3."""
    state = torch.load("best.ckpt", weights_only=True)
    state["state_dict"]["network.3.bias"][3] = -9.0
    torch.save(state, "worse.ckpt")
    return "worse.ckpt"


def test_a_checkpoint_that_breaks_something_is_refused_by_the_default_rule(worse, capsys):
    shown = ["--junit", "release.xml", "--summary", "summary.md"]
    both = ["--old", "best.ckpt", "--new", worse]
    assert main(["compare", "--config", "config.yaml", *both, *shown]) == 1
    assert "REFUSED" in capsys.readouterr().out
    assert Path("summary.md").read_text().startswith("# Refused\n")
    assert [suite.failures for suite in JUnitXml.fromfile("release.xml")] == [2]
    assert main(["compare", "--config", "config.yaml", "--old", "best.ckpt"]) == 2
    assert "HINT: give --old" in capsys.readouterr().err


def test_an_accepted_checkpoint_leaves_a_suite_alone_that_may_not_grow(worse):
    text = "split,id\ntest,0\n"
    Path("suite.csv").write_text(text)
    both = ["--old", worse, "--new", "best.ckpt", "--suite", "suite.csv"]
    command = ["compare", "--config", "config.yaml", *both, "--rules", "[tolerance:50%]"]
    assert main([*command, "--grow", "false"]) == 0
    assert Path("suite.csv").read_text() == text
    assert main(command) == 0
    assert len(RegressionSuite.read("suite.csv").samples) > 1


def test_model_and_data_come_from_a_checkpoint_of_lightning_cli(folder, capsys):
    checkpoint = torch.load("best.ckpt", weights_only=True)
    hparams = {"_class_path": "my_project.Classifier", "hidden": 24, "_instantiator": "x"}
    checkpoint["hyper_parameters"] = hparams
    checkpoint["datamodule_hyper_parameters"] = {"_class_path": "my_project.Digits"}
    torch.save(checkpoint, "named.ckpt")
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    assert main(["diagnose", "--ckpt_path", "named.ckpt", *quiet]) == 0
    assert "Change by layer" in capsys.readouterr().out


def test_without_jsonargparse_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(
        project_module, "RequirementCache", lambda requirement: False
    )  # part of it may be there
    assert main(["repair", "--help"]) == 0
    assert main(["repair"]) == 2
    said = capsys.readouterr().err
    (needed,) = re.findall(r"reads YAML with (\S+), which is not installed", said)
    assert f'\ncli = ["{needed}"]\n' in (ROOT / "pyproject.toml").read_text()
    assert said.endswith('HINT: python -m pip install "lightning_nrl[cli]"\n')


def test_the_configuration_of_the_page_is_one_of_lightning_cli(folder):
    from lightning.pytorch.cli import LightningCLI

    project = LightningCLI(args=["--config", "config.yaml"], run=False, save_config_callback=None)
    assert type(project.model).__name__ == "Classifier"
    assert yaml.safe_load(blocks("yaml")[0])["trainer"]["max_epochs"] == project.trainer.max_epochs
