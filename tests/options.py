"""Arguments of a repair by the plain names of what they say, for helpers that put some of them
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lightning_nrl.entrypoints.arguments import OPTION_CLASSES


def with_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with fields of option objects put into these, such as `n_passed=5` into
    `search`.
    """
    made = dict(arguments)
    for name, kind in OPTION_CLASSES.items():
        own = {field.name: made.pop(field.name) for field in fields(kind) if field.name in made}
        if own:
            made[name] = replace(made.get(name) or kind(), **own)
    return made
