"""The base of reports: dataclasses that are written as JSON and read again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from typing_extensions import Self

from lightning_nrl._utils.deserialize import from_plain, parse_json
from lightning_nrl._utils.serialize import Derives, dumps, to_plain

__all__ = ["Record"]


class Record(Derives):
    """A dataclass that is written as JSON and read again, by the types that it declares."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers, with what follows from them; infinities are NaN."""
        return cast(dict[str, Any], _without_infinities(to_plain(self)))

    def to_json(self) -> str:
        """Strict JSON: a number that is not finite is null."""
        return dumps(self.to_dict()) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` gives.

        Raises:
            ConfigurationError: something is missing, unknown, of another type, infinite, or contradicts the rest; the
                message names the place.
        """
        return from_plain(cls, data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` gives; a null in place of a number is NaN. Raises what `from_dict` does."""
        return from_plain(cls, parse_json(text))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return math.nan if isinstance(value, float) and math.isinf(value) else value
