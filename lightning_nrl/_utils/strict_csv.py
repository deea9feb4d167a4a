"""CSV files that a decision rests on: every line is read as it was meant, or refused by its number."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_nrl.errors import ConfigurationError

__all__ = ["Line", "read_csv"]

LARGEST_INT64 = 2**63 - 1
WHOLE_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)


class Line(NamedTuple):
    """One line of a file, with what is needed to refuse it."""

    where: str  # the argument, the file and the number of the line
    hint: str
    values: dict[str, str]

    def whole_number(self, column: str) -> int:
        """The value of a column as a whole number from 0 to 2^63 - 1; else a `ConfigurationError`."""
        text = self.values[column].strip(" ")
        if not WHOLE_NUMBER.fullmatch(text) or int(text) > LARGEST_INT64:
            raise self.refused(f"`{column}` is {text[:40]!r}, not a whole number from 0 on")
        return int(text)

    def flag(self, column: str) -> bool:
        """The value of a column that is 0 or 1; else a `ConfigurationError`."""
        text = self.values[column].strip(" ")
        if text not in ("0", "1"):
            raise self.refused(f"`{column}` is {text[:40]!r}, neither 0 nor 1")
        return text == "1"

    def refused(self, found: str) -> ConfigurationError:
        """The error that names this line."""
        return ConfigurationError(f"{self.where}: {found}.", self.hint)


def read_csv(
    argument: str, path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), comment: str = ""
) -> Iterator[Line]:
    """Reads a CSV file in UTF-8 with a header, line by line; empty lines and further columns are left out.

    A value never spans lines, so that a stray quote costs the line that it is in and not those behind it. Where an
    optional column is not there, its values are empty. `comment` is how a first line begins that is no part of the
    table.

    Raises:
        ConfigurationError: there is no such file, a column is missing or there twice, or a line cannot be read.
    """
    name, hint = f"`{argument}={str(path)!r}`", f"give a CSV file with the columns {','.join((*columns, *optional))}."
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{name} cannot be read ({error}).", hint) from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    if comment and numbered[0][1].startswith(comment):
        del numbered[0]
    header: list[str] | None = None
    for number, text in numbered:
        where = f"{name}, line {number:,}"
        if not text.strip():
            continue
        try:
            (values,) = csv.reader([text], strict=True)
        except (csv.Error, ValueError) as error:
            raise ConfigurationError(f"{where} cannot be read ({error}).", hint) from error
        if header is None:
            header = _header(where, values, columns, hint)
            continue
        line = Line(where, hint, {**dict.fromkeys(optional, ""), **dict(zip(header, values, strict=False))})
        if len(values) != len(header):
            raise line.refused(f"{len(values)} values for {len(header)} columns")
        yield line
    if header is None:
        raise ConfigurationError(f"{name} is empty.", hint)


def _header(where: str, header: list[str], columns: Sequence[str], hint: str) -> list[str]:
    missing = [column for column in columns if column not in header]
    if missing or len(set(header)) < len(header):
        problem = f"the column {missing[0]!r} is missing" if missing else "a column is there twice"
        raise ConfigurationError(f"{where}: {problem} (found {header}).", hint)
    return header
