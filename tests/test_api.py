"""docs/api.md lists what is public, docs/reference/ has its docstrings. `python tests/test_api.py` writes both anew."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import types
from pathlib import Path
from types import ModuleType

import lightning_nrl

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
REFERENCE = PAGE.parent / "reference"
MODULES = (
    "lightning_nrl.analysis.baselines",
    "lightning_nrl.analysis.comparison",
    "lightning_nrl.entrypoints.command_line",
    "lightning_nrl.errors",
    "lightning_nrl.evaluation.metrics",
    "lightning_nrl.report.stats",
)
"""Public modules that are no packages."""
INTRO = """# What is public

Names by the package that they are imported from; `import lightning_nrl` has what most people need. Packages and modules
that begin with an underscore, and names that are not listed, may change at any time. The title of a table leads to the
docstrings.
"""


def public_modules() -> list[ModuleType]:
    """The package itself, and every package inside whose name has no underscore."""
    found = [lightning_nrl]
    for module in pkgutil.walk_packages(lightning_nrl.__path__, "lightning_nrl."):
        private = any(part.startswith("_") for part in module.name.split("."))
        if not private and (module.ispkg or module.name in MODULES):
            found.append(importlib.import_module(module.name))
    return [module for module in found if getattr(module, "__all__", ())]


def summary(module: ModuleType, name: str) -> str:
    """The first line of the docstring, of a constant that of the text below it; empty if there is none."""
    value = getattr(module, name)
    # Python 3.10 takes an alias such as `Callable[[Any], str]` for a class.
    is_class = inspect.isclass(value) and not isinstance(value, types.GenericAlias)
    if is_class or inspect.isroutine(value) or inspect.ismodule(value):
        inherited = is_class and "__doc__" not in vars(value)
        return "" if inherited or not value.__doc__ else " ".join(value.__doc__.strip().split("\n\n")[0].split())
    for path in Path(lightning_nrl.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if f"{name} = " not in source and f"{name}: " not in source:
            continue
        body = ast.parse(source).body
        for node, after in itertools.pairwise(body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return " ".join(str(after.value.value).strip().split("\n\n")[0].split())
    return ""


def page() -> str:
    """What docs/api.md says."""
    parts = [INTRO]
    for module in public_modules():
        rows = [f"| `{name}` | {summary(module, name)} |" for name in sorted(module.__all__, key=str.lower)]
        first = (module.__doc__ or "").strip().splitlines()[0]
        table = ["| name | what it is |", "|---|---|", *rows]
        parts.append(
            "\n".join([f"## [`{module.__name__}`](reference/{module.__name__}.md)\n", f"{first}\n", *table]) + "\n"
        )
    return "\n".join(parts)


def homes() -> dict[str, list[str]]:
    """By public module, the names that are explained there: each object once, at the top what has no other home."""
    modules = public_modules()
    elsewhere = {id(getattr(module, name)) for module in modules[1:] for name in module.__all__}
    seen: set[int] = set()
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
    """The text of each page of docs/reference, by its name: what is there, and a directive for each docstring."""
    explained = homes()
    full = {
        id(getattr(importlib.import_module(module), name)): f"{module}.{name}"
        for module, names in explained.items()
        for name in names
    }
    pages = {}
    for module in public_modules():
        text = [f"# {module.__name__}\n", (module.__doc__ or "").strip().splitlines()[0] + "\n"]
        others = [name for name in sorted(module.__all__, key=str.lower) if name not in explained[module.__name__]]
        if others:
            links = [f"[`{name}`][{full[id(getattr(module, name))]}]" for name in others]
            text.append(f"Explained where they are at home: {', '.join(links)}.\n")
        text += [f"::: {module.__name__}.{name}\n" for name in explained[module.__name__]]
        pages[f"{module.__name__}.md"] = "\n".join(text)
    return pages


def test_the_page_lists_what_is_public() -> None:
    _, *sections = re.split(r"^## \[`([\w.]+)`\].*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = {
        name: sorted(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    public = {module.__name__: sorted(module.__all__) for module in public_modules()}
    assert listed == public, "run `python tests/test_api.py`"


def test_the_reference_has_each_public_name() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    assert there == reference(), "run `python tests/test_api.py`"


def test_every_public_name_has_a_docstring() -> None:
    without = [
        f"{module.__name__}.{name}"
        for module in public_modules()
        for name in module.__all__
        if not summary(module, name)
    ]
    assert not without


def test_type_checkers_see_the_names_that_there_are() -> None:
    stub = ast.parse(Path(lightning_nrl.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    homes = {alias.name: node.module for node in stub if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == {name: f"lightning_nrl.{home}" for name, home in lightning_nrl._HOMES.items()}  # type: ignore[attr-defined]
    assert sorted(homes) == sorted(lightning_nrl.__all__)


def test_the_face_can_be_held() -> None:
    assert len(lightning_nrl.__all__) <= 25


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    REFERENCE.mkdir(exist_ok=True)
    for old in REFERENCE.glob("*.md"):
        old.unlink()
    for file, text in reference().items():
        (REFERENCE / file).write_text(text, encoding="utf-8")
