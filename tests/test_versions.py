"""Continuous integration tests the lowest and the newest version that the package declares."""

from __future__ import annotations

import re
import runpy
import sys

import yaml
from lightning_package import NAME, OTHER
from repository import ROOT

import lightning_nrl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
MATRIX = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (ROOT / ".github/workflows").glob("*.yml")
}
lowest = runpy.run_path(str(ROOT / ".ci/versions"))["lowest"]


def test_it_runs_on_every_python_that_the_package_names():
    classified = [
        line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line
    ]
    assert MATRIX["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"
    assert f"Python {classified[0]} to {classified[-1]}" in (ROOT / "README.md").read_text()


def test_the_oldest_python_gets_the_floors_and_the_newest_the_newest():
    commands = {row["python"]: row["command"] for row in MATRIX["include"]}
    assert list(commands) == MATRIX["python"]
    assert commands[MATRIX["python"][0]] == ".ci/versions floors"
    assert commands[MATRIX["python"][-1]] == ".ci/versions newest"


def test_both_packages_of_lightning_are_tested():
    assert set(MATRIX["lightning"]) == {NAME, OTHER}
    assert WORKFLOW["jobs"]["tests"]["env"] == {
        "NRL_LIGHTNING": "${{ matrix.lightning }}",
        "NRL_EXAMPLES": "1",
    }


def test_they_may_only_read_save_where_something_is_published():
    assert set(WORKFLOWS) == {"ci", "docs", "release"}
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        allowed = {name for name, job in workflow["jobs"].items() if "permissions" in job}
        assert allowed <= {"publish"}


def test_actions_are_taken_by_their_major_version():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (\S+)", path.read_text()):
            assert re.fullmatch(r"(actions|pypa)/[\w-]+@(release/)?v\d+", action)


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "lightning_nrl/__init__.py"
    version = lightning_nrl.__version__
    assert yaml.safe_load((ROOT / ".github/CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == ("Unreleased" if ".dev" in version else version)


def test_the_page_on_pypi_has_no_link_into_the_repository():
    text = (ROOT / "README.md").read_text()
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert re.search(r"\]\(docs/", text)
    for part in hook["substitutions"]:
        text = re.sub(part["pattern"], part["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    home = "https://(?:raw.githubusercontent|github).com/lightning-nrl/lightning_nrl/(?:blob/)?v[^/]+/([^#]+)"
    inside = [found[1] for link in links if (found := re.match(home, link))]
    assert inside
    assert [path for path in inside if not (ROOT / path).exists()] == []


def test_every_lower_bound_is_a_floor():
    requirements = [
        "pytorch-lightning<3,>=2.5",
        "torch>=2.6",
        'jsonargparse[signatures]>=4.34.1; extra == "cli"',
        'lightning-nrl[cli]; extra == "all"',
        'torch>=2.6; extra == "other"',
    ]
    assert lowest(requirements) == ["jsonargparse==4.34.1", "pytorch-lightning==2.5", "torch==2.6"]


def test_every_requirement_has_one_lower_bound():
    parts = [
        *PROJECT["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    lines = [line for part in parts for line in part if isinstance(line, str)]
    floors = lowest([*PROJECT["dependencies"], *lines])
    assert {"torch", "safetensors", "hypothesis", "plotnine"} <= {
        floor.partition("==")[0] for floor in floors
    }
