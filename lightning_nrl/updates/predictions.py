"""`Predictions`: the predictions of a model from a CSV file, for when the model itself is not at
hand.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.state import State, hash_tensors
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults

WEIGHTS = "# weights "
LARGEST_INT64 = 2**63 - 1
WHOLE_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)


class Line(NamedTuple):
    """One line of a CSV file, with the texts for error messages about it."""

    where: str  # names the argument, the file and the line number
    hint: str
    values: dict[str, str]  # by column

    def whole_number(self, column: str) -> int:
        text = self.values[column].strip(" ")
        if not WHOLE_NUMBER.fullmatch(text) or int(text) > LARGEST_INT64:
            raise self.refused(f"`{column}` is {text[:40]!r}, not a whole number from 0 on")
        return int(text)

    def flag(self, column: str) -> bool:
        text = self.values[column].strip(" ")
        if text not in ("0", "1"):
            raise self.refused(f"`{column}` is {text[:40]!r}, neither 0 nor 1")
        return text == "1"

    def refused(self, found: str) -> ConfigurationError:
        return ConfigurationError(f"{self.where}: {found}.", self.hint)


def read_csv(
    argument: str, path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Line]:
    """Yields the lines of a UTF-8 CSV file after its header. A `ConfigurationError` names a line
    that
    cannot be read.

    The header must have all names in `columns`. If it lacks an `optional` column, the values of
    that column are empty. Empty lines and a first line that begins with "# weights " are skipped.
    Quoted values cannot contain line breaks.
    """
    name, hint = (
        f"`{argument}={str(path)!r}`",
        f"give a CSV file with the columns {','.join((*columns, *optional))}.",
    )
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{name} cannot be read ({error}).", hint) from error
    header: list[str] = []
    for number, text in enumerate(lines, 1):
        if not text.strip() or (number == 1 and text.startswith(WEIGHTS)):
            continue
        where = f"{name}, line {number:,}"
        try:
            (values,) = csv.reader([text.removesuffix("\r")], strict=True)
        except (csv.Error, ValueError) as error:
            raise ConfigurationError(f"{where} cannot be read ({error}).", hint) from error
        if header:
            line = Line(
                where,
                hint,
                {**dict.fromkeys(optional, ""), **dict(zip(header, values, strict=False))},
            )
            if len(values) != len(header):
                raise line.refused(f"{len(values)} values for {len(header)} columns")
            yield line
            continue
        header = [name.strip() for name in values]
        missing = [column for column in columns if column not in header]
        if missing or len(set(header)) < len(header):
            problem = (
                f"the column {missing[0]!r} is missing" if missing else "a column occurs twice"
            )
            raise ConfigurationError(f"{where}: {problem} (found {header}).", hint)
    if not header:
        raise ConfigurationError(f"{name} is empty.", hint)


Rows = Mapping[int, tuple[int, bool | None]]
"""Maps a data-set position to the predicted class (-1: none) and to True if the sample passed
(None: unknown).
"""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for samples of one or more splits. The id of a sample is its position
    in
    the data set.

    The CSV file has the columns `split`, `id` and `prediction`. A prediction is a class, numbered
    as in the new model. For tasks without classes the column `passed` (1 or 0) replaces
    `prediction`.

    Attributes:
        splits: for each split, the prediction of each sample by its id (`Rows`).
        weights: hash of the model's weights; None: unknown.
        seal: SHA-256 by which `OldModel` finds out if its cache file is still valid; empty in other
            files.

    Example::

        RegressionFreeRepair(reference="old_predictions.csv")
    """

    splits: Mapping[str, Rows]
    weights: str | None = None
    seal: str = ""

    @classmethod
    def read(cls, path: str | Path, argument: str = "reference") -> Predictions:
        """Reads a file. A `ConfigurationError` names a line that cannot be read or that repeats a
        sample.
        """
        splits: dict[str, dict[int, tuple[int, bool | None]]] = {}
        for line in read_csv(argument, path, ("split", "id"), optional=("prediction", "passed")):
            named, judged = line.values["prediction"].strip(), line.values["passed"].strip()
            if not named and not judged:
                raise line.refused("neither `prediction` nor `passed` is given")
            rows, at = splits.setdefault(line.values["split"], {}), line.whole_number("id")
            if at in rows:
                raise line.refused(f"sample {at} of {line.values['split']!r} occurs twice")
            rows[at] = (
                line.whole_number("prediction") if named else -1,
                line.flag("passed") if judged else None,
            )
        with Path(path).open(encoding="utf-8-sig") as file:
            first = file.readline()
        if not first.startswith(WEIGHTS):
            return cls(splits)
        weights, _, seal = first.removeprefix(WEIGHTS).strip().partition(" ")
        return cls(splits, weights, seal)

    def save(self, path: str | Path) -> None:
        """Writes atomically a file that `read` can read."""
        first = (
            "" if self.weights is None else f"{WEIGHTS}{self.weights} {self.seal}".strip() + "\n"
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replacing(path, lambda part: part.write_bytes((first + self._table()).encode()))

    def _table(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(["split", "id", "prediction", "passed"])
        for split, rows in self.splits.items():
            for at, (predicted, passed) in rows.items():
                writer.writerow(
                    [
                        split,
                        at,
                        predicted if predicted >= 0 else "",
                        "" if passed is None else int(passed),
                    ]
                )
        return file.getvalue()

    def sealed(self, key: str) -> Predictions:
        """Returns a copy whose seal is the SHA-256 of the rows and of `key`, which names what the
        rows depend on.
        """
        return replace(self, seal=hashlib.sha256(f"{key}\n{self._table()}".encode()).hexdigest())

    @classmethod
    def of(cls, results: SampleResults, weights: State) -> Predictions:
        """Builds predictions from the results of a model."""
        rows = list(
            zip(
                results.index.tolist(),
                results.prediction.tolist(),
                results.passed.tolist(),
                strict=True,
            )
        )
        splits = {
            split: {at: (predicted, passed) for at, predicted, passed in rows[results.of(split)]}
            for split in results.splits
        }
        return cls(splits, hash_tensors(weights))

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Returns `results(like)`: predictions need neither the evaluator nor the sources."""
        return self.results(like)

    def results(self, like: SampleResults) -> SampleResults:
        """Converts the predictions for the samples of `like` to results. The loss is 0 for a right
        sample, else 1.

        Raises a `ConfigurationError` if a sample of `like` has no prediction.
        """
        predicted, passed = torch.full_like(like.prediction, -1), torch.zeros_like(like.passed)
        for split in like.splits:
            rows, start = self.splits.get(split, {}), like.start(split)
            ids = like.index[like.of(split)].tolist()
            missing = [at for at in ids if at not in rows]
            if missing:
                there = ", ".join(f"`{name}`" for name in self.splits) or "no split"
                raise ConfigurationError(
                    f"`reference`: {len(missing):,} of {len(ids):,} samples of `{split}` have no prediction "
                    f"({missing[:5]}); there are predictions for {there}.",
                    "give one prediction for each known and unseen sample; ids are positions in the data set.",
                )
            for i, at in enumerate(ids, start):
                predicted[i], right = rows[at]
                if like.label[i] >= 0:
                    passed[i] = predicted[i] == like.label[i]
                elif right is not None:
                    passed[i] = right
                else:
                    raise ConfigurationError(
                        "`reference`: the task has no classes to compare.",
                        "add a column `passed`, 1 or 0.",
                    )
        return replace(
            like,
            prediction=predicted,
            passed=passed,
            loss=(~passed).to(like.loss),
            margin=torch.full_like(like.margin, torch.nan),
            targeted=torch.zeros_like(passed),
            in_target=torch.zeros_like(passed),
        )

    def alone(self) -> SampleResults:
        """Converts all predictions to results without labels. Raises a `ConfigurationError` if
        `passed` is missing.
        """
        rows = [
            (split, at, passed)
            for split, own in self.splits.items()
            for at, (_, passed) in sorted(own.items())
        ]
        unknown = [(split, at) for split, at, passed in rows if passed is None]
        if unknown or not rows:
            lacks = (
                f"no value of `passed` for {len(unknown):,} samples, such as {unknown[0]}"
                if rows
                else "no samples"
            )
            raise ConfigurationError(
                f"`new` has {lacks}.", "give the column `passed`, 1 or 0, for each sample."
            )
        index = torch.tensor([at for _, at, _ in rows])
        classless, nothing, none = (
            torch.full_like(index, -1),
            torch.zeros(len(rows)),
            torch.zeros(len(rows)).bool(),
        )
        sizes = tuple(map(len, self.splits.values()))
        table = SampleResults(
            tuple(self.splits), sizes, index, classless, classless, nothing, none, none, nothing
        )
        return self.results(table)


Ids = Mapping[str, Sequence[int]]
"""Data-set positions by split."""


def parse_ids(ids: Ids | Sequence[int] | str | Path | None) -> Ids:
    """Parses data-set positions by split, or the path of a CSV file. A list becomes `{"": list}`;
    None becomes `{}`.
    """
    found = read_ids(ids) if isinstance(ids, (str, Path)) else ids or {}
    found = found if isinstance(found, Mapping) else {"": found}
    lists = all(
        isinstance(rows, Sequence) and all(isinstance(at, int) for at in rows)
        for rows in found.values()
    )
    check_kind("ids", found, lists, "list of samples", "ids={'test': [3, 17]}")
    return found


def read_ids(path: str | Path) -> dict[str, list[int]]:
    """Reads data-set positions by split from a CSV file with the columns `split` and `id` and at
    least one sample.
    """
    found: dict[str, list[int]] = {}
    for line in read_csv("ids", path, ("split", "id")):
        found.setdefault(line.values["split"], []).append(line.whole_number("id"))
    if not found:
        raise ConfigurationError(
            f"`ids={str(path)!r}` holds no sample.", "give a CSV file with the columns split,id."
        )
    return found


def read_slices(path: str | Path) -> dict[tuple[str, int], str]:
    """Reads a CSV file with the columns `split`, `id` and `slice`. Returns `{(split, id): slice}`."""
    found: dict[tuple[str, int], str] = {}
    for line in read_csv("slices", path, ("split", "id", "slice")):
        sample = line.values["split"], line.whole_number("id")
        if sample in found:
            raise line.refused(f"sample {sample[1]} of {sample[0]!r} occurs twice")
        found[sample] = line.values["slice"]
    return found
