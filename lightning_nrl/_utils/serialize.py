"""Values as plain dicts and lists, and those as strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["dumps", "plain"]


def plain(value: Any) -> Any:
    """Dicts, lists, text, numbers, bools and None; of dataclasses the fields, of arrays the numbers, else text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # By exact type: a numpy float is a float too, and a checkpoint that holds one does not load with weights_only=True.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)


def dumps(value: Any, indent: str = "") -> str:
    """Strict JSON of plain values, a list of numbers or words on one line; a number that is not finite is null."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {dumps(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        lines = [deeper + dumps(item, deeper) for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    if isinstance(value, list):
        return f"[{', '.join(dumps(item) for item in value)}]"
    finite = not isinstance(value, float) or math.isfinite(value)
    return json.dumps(value if finite else None, allow_nan=False, ensure_ascii=False)
