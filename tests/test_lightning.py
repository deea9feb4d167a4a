"""One module alone imports Lightning, and one alone touches what is private in it."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_nrl

PACKAGE = Path(lightning_nrl.__file__).parent
PACKAGES = ("lightning", "lightning_fabric", "pytorch_lightning")
LIGHTNING = (*PACKAGES[1:], "lightning.", "lightning_nrl._trainer.lightning")
OF_TORCH = {"_parameters", "_buffers", "_conv_forward", "_version", "_get_file_writer"}
"""Private parts of torch, which other modules may touch."""


def private_uses(source: str) -> list[str]:
    """Private attributes of other objects, and private names of Lightning's packages, in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIGHTNING):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            found += [node.attr] if node.attr.startswith("_") and not node.attr.startswith("__") else []
    return [name for name in found if name not in OF_TORCH]


def imported(source: str) -> set[str]:
    """The packages that a module imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [
        name
        for node in nodes
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    return {name.split(".")[0] for name in names}


def test_the_search_for_private_uses_finds_them() -> None:
    source = "from pytorch_lightning.core import _x\nself._mine\nmodule._trainer\nself.trainer.fit_loop._data_source"
    assert sorted(private_uses(source)) == ["_data_source", "_trainer", "_x"]


def test_one_module_imports_lightning_and_one_touches_its_private_parts() -> None:
    touching, importing = {}, []
    for path in PACKAGE.rglob("*.py"):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        if any(one in source for one in LIGHTNING) and (uses := private_uses(source)):
            touching[name] = set(uses)
        importing += [name] if imported(source) & set(PACKAGES) else []
    folder = "_trainer/lightning"
    assert importing == [f"{folder}/packages.py"]
    assert touching.keys() == {f"{folder}/packages.py", f"{folder}/private_parts.py"}
    assert touching[f"{folder}/packages.py"] == {"_load", "_WrappingCheckpointIO"}
