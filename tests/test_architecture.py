"""The order of imports, and one name for each thing: what docs/architecture.md promises."""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from repository import ROOT

PACKAGE = ROOT / "lightning_nrl"
MODULES = sorted(PACKAGE.rglob("*.py"))


def definitions(kind: str) -> Iterator[tuple[str, str]]:
    """Names of a kind, each with the module that defines it."""
    for path in MODULES:
        where = str(path.relative_to(ROOT))
        if kind == "module" and path.name not in ("__init__.py", "__main__.py"):
            yield path.stem, where
        for node in ast.parse(path.read_text()).body:
            if kind == "class" and isinstance(node, ast.ClassDef):
                yield node.name, where
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if kind == "constant" and isinstance(target, ast.Name) and target.id.strip("_").isupper():
                    yield target.id, where


def test_imports_go_down_only_and_never_in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("kind", ["module", "class", "constant"])
def test_no_name_stands_for_two_things(kind: str) -> None:
    places = defaultdict(list)
    for name, where in definitions(kind):
        places[name].append(where)
    assert places
    # Single-letter type variables are declared where they are used.
    assert {name: found for name, found in places.items() if len(found) > 1 and len(name) > 1} == {}


def test_the_root_holds_six_modules_at_most() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_every_package_says_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert len(text.splitlines()) <= 8
    if path.parent != PACKAGE:
        assert "In:" in text
        assert "Out:" in text


def test_the_map_names_every_package() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/" in picture, path.name


def _known_names() -> set[str]:
    """Every name that the package, Python or its own tools define."""
    names = set(dir(builtins))
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.arg):
                names.add(node.id if isinstance(node, ast.Name) else node.arg)
    return names


def test_every_name_on_the_map_exists() -> None:
    page = re.sub(r"```.*?```", "", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)
    known = _known_names()
    for quoted in re.findall(r"`([^`]+)`", page):
        if re.fullmatch(r"[\w./]+\.(py|toml|md)|[\w/]+/", quoted):
            assert (PACKAGE / quoted).exists() or (ROOT / quoted).exists(), quoted
        elif re.fullmatch(r"[A-Za-z_][\w.]*", quoted):
            assert set(quoted.split(".")) <= known | {"__init__", "fit"}, quoted
