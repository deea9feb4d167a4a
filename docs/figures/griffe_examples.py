"""Shows `Example:` in docstrings as code.

griffe knows this section of Google's style as `Examples:` only.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class OneExample(griffe.Extension):
    """Renames the section while docstrings are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
