"""Published modules: the page, the runner and the scripts name each other."""

import re
import runpy

from repository import ROOT

FOLDER = ROOT / "examples" / "strangers"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")} - {"run", "uses"}


def test_the_page_names_each_script_once_and_no_other():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert sorted(re.findall(r"strangers/(\w+)\.py\)", page)) == sorted(SCRIPTS)


def test_the_runner_has_each_script_in_one_environment():
    environments = runpy.run_path(str(FOLDER / "run.py"))["ENVIRONMENTS"].values()
    assert sorted(script for environment in environments for script in environment.scripts) == sorted(SCRIPTS)
