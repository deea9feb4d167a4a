"""Results as plain values that can be written, read and compared."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEFT_OUT = frozenset({"seconds", "versions", "timing", "scaling", "created"})
"""Fields that differ from run to run."""
OF_ONE_RUN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00|/\S*(?=/prepared/)")
"""When a report was made, and where the prepared checkpoints are."""
LONG = 40
"""Lists of more floats than this are kept as their ends and a hash."""


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors to the bit, names, shapes and types included."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def clean(value: Any, folder: str = "") -> Any:
    """Dicts, lists, text and numbers that say the same, without what differs from run to run.

    Floats have six significant digits. `folder` is the temporary folder of the case.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        text = OF_ONE_RUN.sub("<of one run>", str(value))
        return text.replace(folder, "<folder>") if folder else text
    if isinstance(value, Tensor):
        if value.numel() > LONG:
            return {"shape": list(value.shape), "sha256": hash_of({"": value})}
        return clean(value.tolist(), folder)
    if isinstance(value, Mapping):
        own = {str(k): v for k, v in value.items() if k not in LEFT_OUT}
        return {k: "<time>" if k.endswith("/seconds") else clean(v, folder) for k, v in own.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return clean({f.name: getattr(value, f.name) for f in fields(value)}, folder)
    if isinstance(value, (set, frozenset)):
        return sorted((clean(item, folder) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        own = [clean(item, folder) for item in value]
        if len(own) > LONG and all(isinstance(item, float) or item is None for item in own):
            digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
            return {"n": len(own), "first": own[:5], "last": own[-5:], "sha256": digest}
        return own
    if hasattr(value, "item"):
        return clean(value.item(), folder)
    return str(value)


def renamed(value: Any, renames: Mapping[str, str]) -> Any:
    """A value with whole words replaced, in keys and in text."""
    if not renames:
        return value
    longest = sorted(renames, key=len, reverse=True)
    words = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, longest)) + r")(?!\w)")

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return words.sub(lambda found: renames[found[1]], value)
        if isinstance(value, dict):
            return {walk(key): walk(item) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        found = [walk(item) for item in value]
        # What was in the order of its names is so after renaming.
        return (
            sorted(found)
            if all(isinstance(item, str) for item in value) and value == sorted(value)
            else found
        )

    return walk(value)


def without(value: Any, added: Mapping[str, Any]) -> Any:
    """A value without the keys that were added on purpose, where they hold what says nothing: the
    value in `added`, or one of several in a list.
    """

    def says_nothing(key: str, item: Any) -> bool:
        return key in added and (
            item == added[key] or (isinstance(added[key], list) and item in added[key])
        )

    if isinstance(value, dict):
        return {
            key: without(item, added) for key, item in value.items() if not says_nothing(key, item)
        }
    if not isinstance(value, list):
        return value
    return [without(item, added) for item in value if item not in list(added)]


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Every path at which two values differ, with what stands there; `-` where nothing does."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            at = f"{path}/{key}"
            if key not in a or key not in b:
                yield at, *(json.dumps(x[key]) if key in x else "-" for x in (a, b))
            else:
                yield from differences(a[key], b[key], at)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif type(a) is not type(b) or squeezed(a) != squeezed(b):
        yield path, json.dumps(a), json.dumps(b)


def squeezed(value: Any) -> Any:
    """Text without the width of its columns, which follows from the words in them."""
    return re.sub(r" {2,}|-{2,}", "  ", value).strip() if isinstance(value, str) else value
