"""What the README says is what there is."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import lightning_nrl
from lightning_nrl import RegressionFreeRepair

README = (ROOT / "README.md").read_text()
SCRIPTS = [
    path for path in sorted((ROOT / "examples").rglob("*.py")) if "__main__" in path.read_text()
]


def block_behind(mark: str) -> str:
    """The code block that follows a comment."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    return found[1]


def run_example(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mark", ["quickstart", "tests"])
def test_each_command_is_one_line(mark):
    assert block_behind(mark).count("\n") == 1


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_first_command_installs_a_clone_until_there_is_a_release(page):
    text = (ROOT / page).read_text()
    package = re.search(r"pip install \"?(\S*lightning_nrl)", text)[1]
    is_released = "dev" not in lightning_nrl.__version__
    assert package == ("lightning_nrl" if is_released else "./lightning_nrl")
    assert ("git clone" in text) != is_released


def test_every_argument_of_the_callback_is_in_the_table_of_options():
    arguments = list(inspect.signature(RegressionFreeRepair).parameters)
    options = (
        (ROOT / "docs/options.md")
        .read_text()
        .partition("## All arguments")[2]
        .partition("\n## ")[0]
    )
    assert re.findall(r"^\| `(\w+)` \|", options, re.MULTILINE) == arguments


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_says_what_it_does_instead_of_doing_it(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not among the test dependencies")
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")


@pytest.mark.slow
def test_quickstart_repairs_and_says_what_to_do_next(tmp_path):
    out = run_example("quickstart.py", tmp_path)
    (broken,) = re.findall(r"^known samples broken +(.*)$", out, re.MULTILINE)
    swarm, search, *climb = broken.split()
    assert int(search) <= 2  # samples that it does not use; it is not kept
    assert {swarm, *climb} == {"0"}
    assert out.count("\n") < 60
    assert (tmp_path / "lightning_logs/version_0/repair/repaired.ckpt").exists()
    assert f"tensorboard --logdir {tmp_path}" in out.replace("\n", "")
