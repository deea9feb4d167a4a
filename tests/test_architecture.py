"""The order of imports, one name for each thing, one place for Lightning: what docs/architecture.md
promises.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
from importlinter.cli import lint_imports
from repository import ROOT

PACKAGE = ROOT / "lightning_nrl"
MODULES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.",
    "lightning_nrl._trainer.lightning",
)
OWN = ("self", "cls", "super()")
OF_TORCH = {"_parameters", "_buffers", "_conv_forward", "_get_file_writer", "_version"}
"""Private parts of torch, which other modules may touch."""


def definitions(kind: str) -> Iterator[tuple[str, str]]:
    """Names of a kind, each with the module that defines it."""
    for path in MODULES:
        where = str(path.relative_to(ROOT))
        if kind == "module" and path.name not in ("__init__.py", "__main__.py"):
            yield path.stem, where
        for node in ast.parse(path.read_text()).body:
            if kind == "class" and isinstance(node, ast.ClassDef):
                yield node.name, where
            elif kind == "constant" and isinstance(node, ast.Assign | ast.AnnAssign):
                for name in ast.walk(node):
                    is_assigned = isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                    if is_assigned and name.id.strip("_").isupper():
                        yield name.id, where


def test_imports_go_down_only_and_never_in_circles(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("kind", ["module", "class", "constant"])
def test_no_name_stands_for_two_things(kind):
    places = defaultdict(list)
    for name, where in definitions(kind):
        places[name].append(where)
    assert places
    # Single-letter type variables are declared where they are used.
    assert {name for name, where in places.items() if len(where) > 1 and len(name) > 1} == set()


def test_the_root_holds_six_modules_at_most():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_every_package_says_what_it_is_for():
    for path in (path for path in MODULES if path.name == "__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, path
        assert len(text.splitlines()) <= 8, path
        assert path.parent == PACKAGE or ("In:" in text and "Out:" in text), path


def test_the_map_names_every_package():
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/" in picture, path.name


def private_uses(source: str) -> list[str]:
    """Private attributes of other objects, and imports of private names of Lightning's packages."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIGHTNING):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OWN:
            names.append(node.attr)
    return [name for name in names if re.match("_[^_]", name) and name not in OF_TORCH]


def test_the_search_for_private_uses_finds_them():
    source = """\
from pytorch_lightning.core import _x
self._mine
module._trainer
self.trainer.fit_loop._data_source
"""
    assert sorted(private_uses(source)) == ["_data_source", "_trainer", "_x"]


def test_one_package_alone_touches_private_parts_of_lightning_and_one_module_alone_imports_it():
    home = PACKAGE / "_trainer" / "lightning"
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        uses = private_uses(source) if any(name in source for name in LIGHTNING) else []
        if path == home / "private_parts.py":
            assert {
                "_trainer",
                "_data_source",
                "_combined_loader",
                "_on_before_batch_transfer",
            } < set(uses)
        else:
            allowed = ["_load", "_WrappingCheckpointIO"] if path == home / "packages.py" else []
            assert uses == allowed, path
        imports = re.search(
            r"^ *(import|from) (pytorch_lightning|lightning(_fabric)?)\b", source, re.MULTILINE
        )
        assert bool(imports) == (path == home / "packages.py"), path


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


def test_every_name_on_the_map_exists():
    page = re.sub(
        r"```.*?```", "", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL
    )
    known = _known_names()
    for quoted in re.findall(r"`([^`]+)`", page):
        if re.fullmatch(r"[\w./]+\.(py|toml|md)|[\w/]+/", quoted):
            assert (PACKAGE / quoted).exists() or (ROOT / quoted).exists(), quoted
        elif re.fullmatch(r"[A-Za-z_][\w.]*", quoted):
            assert set(quoted.split(".")) <= known | {"__init__", "fit"}, quoted


NAMELESS = re.compile(
    "found|own|one|others?|both|given|made|how|whole|rest|what|which|who|whose|such|same|those|these"
    "|this|that|all|some|here|there|now|then|it|them|each|things?"
)
"""Words that name nothing: a reader of such a variable has to look back for what it holds."""


def test_every_variable_has_a_name():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert not NAMELESS.fullmatch(node.id), f"{path}:{node.lineno}"


def test_attributes_are_rarely_looked_up_by_name():
    source = "".join(path.read_text() for path in MODULES)
    n_lookups = len(re.findall(r"\b(getattr|hasattr)\(", source))
    assert 1000 * n_lookups <= 2 * source.count("\n")
