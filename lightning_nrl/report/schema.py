"""The version of the form in which repair reports are written, and how older ones are read.

docs/report-schema.md describes the newest. Whoever changes what is written raises `SCHEMA` and adds a step to
`UPGRADES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_nrl.errors import ConfigurationError

__all__ = ["SCHEMA", "upgraded"]

SCHEMA = 2

Plain = dict[str, Any]


def upgraded(data: Mapping[str, Any]) -> Plain:
    """Plain values of a report of any version, as the newest would have written them.

    What older reports do not say is empty, and of their flipped samples only ids are known.

    Raises:
        ConfigurationError: a newer version of this package has written them, or no version has.
    """
    if not isinstance(data, Mapping):
        shown = f"{type(data).__name__} instead of an object"
        raise ConfigurationError(f"the file: found {shown}.", "give what `to_json` has written.")
    if "schema" not in data and "class_names" in data:
        raise ConfigurationError("schema: this is missing.", "give what `to_json` has written.")
    found: Any = data.get("schema", 0)
    if type(found) is not int or not 0 <= found <= SCHEMA:
        raise ConfigurationError(
            f"schema: expected a whole number up to {SCHEMA}, found {found!r}.",
            "read the report with the version of lightning_nrl that wrote it, or a newer one.",
        )
    plain = dict(data)
    for step in UPGRADES[found:]:
        plain = step(plain)
    return plain


def _from_0(data: Plain) -> Plain:
    """Schema 1 has ladders, the target's own broken samples, and samples, classes and margins."""
    plain = {"rungs": [], "choice": "", "price": [], "class_names": [], **data, "schema": 1}
    for name in ("splits", "candidate"):
        plain[name] = _each(plain.get(name), _split_from_0)
    plain["update"] = _each(plain.get("update"), lambda both: {name: _split_from_0(one) for name, one in both.items()})
    plain["slices"] = _each(plain.get("slices"), lambda one: {**NO_TARGET_COUNTS, **one})
    return plain


NO_TARGET_COUNTS = {"passed_in_target": 0, "broken_in_target": 0}


def _split_from_0(split: Any) -> Any:
    if not isinstance(split, dict):
        return split
    named = {flip: split.get(f"{flip}_ids", []) for flip in ("repaired", "broken")}
    ids = {flip: own if isinstance(own, list) else [own] for flip, own in named.items()}  # else the reader refuses it
    unknown = {"in_target": False, "label": -1, "predicted_before": -1, "predicted_after": -1, "slice": ""}
    unknown |= {"margin_before": None, "margin_after": None}
    flipped = [{"id": one, "flip": flip, **unknown} for flip, own in ids.items() for one in own]
    kept = {name: value for name, value in split.items() if name not in ("repaired_ids", "broken_ids")}
    return {**NO_TARGET_COUNTS, "flipped": flipped, "confusion": [], "classes": [], "margins": None, **kept}


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A list with each object in it changed; anything else as it is, for the reader to refuse."""
    return [change(one) if isinstance(one, dict) else one for one in value] if isinstance(value, list) else value


def _from_1(data: Plain) -> Plain:
    """Schema 2 has the device and the precision of the verdict."""
    return {"judge": None, **data, "schema": 2}


UPGRADES: tuple[Callable[[Plain], Plain], ...] = (_from_0, _from_1)
"""From each version to the next."""
