"""Continuous integration tests the versions that the package declares, the lowest and the newest."""

from __future__ import annotations

import os
import re
import runpy
import sys
from typing import Any

import pytest
import yaml
from lightning_package import NAME, OTHER
from repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
MATRIX = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
lowest = runpy.run_path(str(ROOT / ".ci/versions"))["lowest"]


def test_it_runs_on_every_python_that_the_package_names() -> None:
    classified = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert MATRIX["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"
    assert f"Python {classified[0]} to {classified[-1]}" in (ROOT / "README.md").read_text()


def test_the_oldest_python_gets_the_floors_and_the_newest_the_newest() -> None:
    commands = {row["python"]: row["command"] for row in MATRIX["include"]}
    assert list(commands) == MATRIX["python"]
    assert commands[MATRIX["python"][0]] == ".ci/versions floors"
    assert commands[MATRIX["python"][-1]] == ".ci/versions newest"


def test_both_packages_of_lightning_are_tested() -> None:
    assert set(MATRIX["lightning"]) == {NAME, OTHER}
    assert WORKFLOW["jobs"]["tests"]["env"] == {"NRL_LIGHTNING": "${{ matrix.lightning }}"}


def test_the_scripts_that_it_calls_are_there() -> None:
    for command in {row["command"] for row in MATRIX["include"]}:
        assert os.access(ROOT / command.split()[0], os.X_OK), command


def test_it_may_only_read_and_takes_actions_by_their_major_version() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []


def test_every_lower_bound_is_a_floor() -> None:
    requirements = [
        "pytorch-lightning<3,>=2.5",
        "torch>=2.6",
        'jsonargparse[signatures]>=4.34.1; extra == "cli"',
        'lightning-nrl[patch]; extra == "cli"',
        'torch>=2.6; extra == "other"',
    ]
    assert lowest(requirements) == ["jsonargparse==4.34.1", "pytorch-lightning==2.5", "torch==2.6"]


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", 'numpy==2.0; extra == "other"'])
def test_what_has_no_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="no lower bound"):
        lowest([requirement])


def test_every_requirement_has_one_lower_bound() -> None:
    extras: dict[str, list[Any]] = PROJECT["optional-dependencies"]
    floors = lowest([*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)])
    assert {"torch", "safetensors"} <= {floor.partition("==")[0] for floor in floors}
