"""YAML of the docs makes the objects that it names; commands name scripts, options and extras that
exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import lightning
import pytest
import yaml
from pages import PAGES, Block, blocks, fences, name_of
from repository import ROOT

from lightning_nrl import RegressionFreeRepair
from lightning_nrl.entrypoints.command_line import COMMANDS, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHELL = (
    "cd ", "git clone ", "source ", "tensorboard --logdir ", "ruff ", "mypy", "lint-imports",
    "zensical build ", "apt ",
)  # fmt: skip
SCRIPTS = re.compile(r"^(?:python(?:3(?:\.\d+)?)?) ((?:examples|tests|docs|\.ci)/\S+)(.*)$")
CONFIGURATIONS = [block for page in PAGES for block in blocks(page, "yaml") if block.runs]


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=lambda block: block.name)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_makes_what_it_names(block: Block, folder: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    found = yaml.safe_load(block.code)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    if "trainer" in found:
        parser.add_argument("--callbacks", type=list[lightning.Callback])
        given = {"callbacks": found["trainer"]["callbacks"]}
    else:
        parser.add_class_arguments(RegressionFreeRepair, "repair")
        given = {"repair": found}
    made = parser.instantiate_classes(parser.parse_object(given))
    assert given.keys() <= vars(made).keys()


@cache
def help_of(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([command, "--help"]) == 0
    return out.getvalue()


def commands(page: Path) -> list[tuple[str, str]]:
    """Each line of a shell block or of an indented or unmarked one that starts a script, with where
    it stands.
    """
    found = []
    for block in fences(page):
        lines = re.sub(r"\\\n\s*", " ", block.code).splitlines()
        if block.language in ("bash", "sh", "console"):
            found += [
                (block.name, line)
                for line in lines
                if block.runs and line.strip() and not line.startswith("#")
            ]
        elif not block.language:
            found += [(block.name, line) for line in lines if SCRIPTS.match(line)]
    text = page.read_text(encoding="utf-8")
    found += [
        (page.name, line.strip()) for line in re.findall(r"^    (python .*)$", text, re.MULTILINE)
    ]
    return found


def check_command(line: str) -> None:
    """That what a line names is there."""
    line = line.partition("  #")[0].strip()
    if script := SCRIPTS.match(line):
        path = ROOT / script[1]
        assert path.is_file(), script[1]
        source = path.read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)(--[\w-]+)", script[2]):
            assert f'"{option}"' in source or option.strip("-").replace("-", "_") in source, option
    elif line.startswith("lightning-nrl "):
        command, *arguments = shlex.split(line)[1:]
        if not command.startswith("--") and command != "COMMAND":
            assert command in COMMANDS
            shown = help_of(command)
            for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
                assert option in shown or option.startswith(
                    ("--repair", "--trainer", "--model.")
                ), option
    elif "pip install" in line:
        for extras in re.findall(r"(?:lightning_nrl|\.)\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"]), (
                extras
            )
        for group in re.findall(r"--group (\w+)", line):
            assert group in PYPROJECT["dependency-groups"], group
    elif line.startswith(("python -m venv", "python3 -m venv", "python -m pytest")):
        assert all((ROOT / word).exists() for word in line.split() if word.startswith("tests/"))
    elif line.startswith((".ci/", "python3.10 .ci/", "python3.13 .ci/")):
        assert (ROOT / next(word for word in line.split() if word.startswith(".ci/"))).is_file()
    elif not re.fullmatch(r"python \w+\.py", line):
        assert line.startswith(SHELL), f"a command that nothing checks: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_name_what_is_there(page: Path) -> None:
    for where, line in commands(page):
        for part in line.split(" && "):
            try:
                check_command(part)
            except AssertionError as error:
                raise AssertionError(f"{where}: {part}") from error
