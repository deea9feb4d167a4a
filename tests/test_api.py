"""docs/reference/ lists the public names. `python tests/test_api.py` writes it."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import types
from pathlib import Path
from types import ModuleType

import lightning_nrl

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
MODULES = (
    "lightning_nrl.analysis.baselines",
    "lightning_nrl.analysis.comparison",
    "lightning_nrl.entrypoints.command_line",
    "lightning_nrl.errors",
    "lightning_nrl.evaluation.metrics",
    "lightning_nrl.evaluation.stats",
    "lightning_nrl.gate",
)
"""Public modules that are no packages."""


def public_modules() -> list[ModuleType]:
    """The package itself, and every package inside whose name has no underscore."""
    found = [lightning_nrl]
    for module in pkgutil.walk_packages(lightning_nrl.__path__, "lightning_nrl."):
        private = any(part.startswith("_") for part in module.name.split("."))
        if not private and (module.ispkg or module.name in MODULES):
            found.append(importlib.import_module(module.name))
    return [module for module in found if getattr(module, "__all__", ())]


def summary(module: ModuleType, name: str) -> str:
    """The first line of the docstring, of a constant that of the text below it; empty if there is
    none.
    """
    value = getattr(module, name)
    # Python 3.10 takes an alias such as `Callable[[Any], str]` for a class.
    is_class = inspect.isclass(value) and not isinstance(value, types.GenericAlias)
    if is_class or inspect.isroutine(value) or inspect.ismodule(value):
        inherited = is_class and "__doc__" not in vars(value)
        return (
            ""
            if inherited or not value.__doc__
            else " ".join(value.__doc__.strip().split("\n\n")[0].split())
        )
    for path in Path(lightning_nrl.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if f"{name} = " not in source and f"{name}: " not in source:
            continue
        body = ast.parse(source).body
        for node, after in itertools.pairwise(body):
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return " ".join(str(after.value.value).strip().split("\n\n")[0].split())
    return ""


def homes() -> dict[str, list[str]]:
    """By public module, the names that are explained there: each object once, at the top what has
    no other home.
    """
    modules = public_modules()
    elsewhere = {id(getattr(module, name)) for module in modules[1:] for name in module.__all__}
    seen = set()
    found = {}
    for module in [*modules[1:], modules[0]]:
        own = []
        for name in sorted(module.__all__, key=str.lower):
            value = id(getattr(module, name))
            if value not in seen and (module is not modules[0] or value not in elsewhere):
                seen.add(value)
                own.append(name)
        found[module.__name__] = own
    return found


def reference() -> dict[str, str]:
    """The text of each page of docs/reference, by its name: what is there, and a directive for each
    docstring.
    """
    explained = homes()
    full = {
        id(getattr(importlib.import_module(module), name)): f"{module}.{name}"
        for module, names in explained.items()
        for name in names
    }
    pages = {}
    for module in public_modules():
        text = [f"# {module.__name__}\n", (module.__doc__ or "").strip().splitlines()[0] + "\n"]
        others = [
            name
            for name in sorted(module.__all__, key=str.lower)
            if name not in explained[module.__name__]
        ]
        if others:
            links = [f"[`{name}`][{full[id(getattr(module, name))]}]" for name in others]
            text.append(f"Explained where they are at home: {', '.join(links)}.\n")
        text += [f"::: {module.__name__}.{name}\n" for name in explained[module.__name__]]
        pages[f"{module.__name__}.md"] = "\n".join(text)
    return pages


def test_the_reference_has_each_public_name():
    there = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    assert there == reference(), "run `python tests/test_api.py`"


def test_every_public_name_has_a_docstring():
    without = [
        f"{module.__name__}.{name}"
        for module in public_modules()
        for name in module.__all__
        if not summary(module, name)
    ]
    assert not without


def test_type_checkers_see_the_names_that_there_are():
    stub = ast.parse(
        Path(lightning_nrl.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    ).body
    homes = {
        alias.name: node.module
        for node in stub
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {name: f"lightning_nrl.{home}" for name, home in lightning_nrl._HOMES.items()}
    assert sorted(homes) == sorted(lightning_nrl.__all__)


def test_the_face_can_be_held():
    assert len(lightning_nrl.__all__) <= 26


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for old in REFERENCE.glob("*.md"):
        old.unlink()
    for file, text in reference().items():
        (REFERENCE / file).write_text(text, encoding="utf-8")
