"""`Predictions` of a model from a CSV file, for when the model itself is not at hand."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl.data.batch import Source
from lightning_nrl.data.sample_identity import read_keys
from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.evaluation import Evaluator, SampleResults

WEIGHTS = "# weights "
WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")  # `int` would accept `1_0` and more than an int64


class Line(NamedTuple):
    """One line of a CSV file, with the texts for error messages about it."""

    file: str  # names the argument and the file
    number: int
    hint: str
    values: dict[str, str]  # by column

    @property
    def sample(self) -> tuple[str, int]:
        return self.values["split"], self.whole_number("id")

    def whole_number(self, column: str) -> int:
        text = self.values[column].strip(" ")
        if not WHOLE_NUMBER.fullmatch(text):
            raise self.error(f"`{column}` is {text[:40]!r}, not a whole number from 0 on")
        return int(text)

    def flag(self, column: str) -> bool:
        text = self.values[column].strip(" ")
        if text not in ("0", "1"):
            raise self.error(f"`{column}` is {text[:40]!r}, neither 0 nor 1")
        return text == "1"

    def share(self, column: str) -> float:
        text = self.values[column].strip(" ")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise self.error(f"`{column}` is {text[:40]!r}, not a number from 0 to 1")
        return share

    def error(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self.file}, line {self.number:,}: {problem}.", self.hint)


def read_csv(
    argument: str, path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Line]:
    """Yields the lines of a UTF-8 CSV file of samples after its header.

    The header must have all names in `columns`, such as `split` and `id`, and no unknown name. If
    it lacks an `optional` column, the values of that column are empty. Empty lines and a first line
    that begins with "# weights " are skipped. Quoted values cannot contain line breaks.

    Raises:
        ConfigurationError: a line cannot be read or repeats a sample. The message names it.
    """
    file = f"`{argument}={str(path)!r}`"
    known = (*columns, *optional)
    hint = f"give a CSV file with the columns {','.join(known)}."
    try:
        texts = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}).", hint) from error
    header: list[str] = []
    samples = set()
    for number, text in enumerate(texts, 1):
        if not text.strip() or (number == 1 and text.startswith(WEIGHTS)):
            continue
        line = Line(file, number, hint, dict.fromkeys(optional, ""))
        try:
            (values,) = csv.reader([text], strict=True)
        except (csv.Error, ValueError) as error:
            raise line.error(f"it cannot be read ({error})") from error
        if not header:
            header = list(map(str.strip, values))
            for column in columns:
                if column not in header:
                    raise line.error(f"the column {column!r} is missing (found {header})")
            if len(set(header)) < len(header):
                raise line.error(f"a column occurs twice (found {header})")
            for column in header:
                check_choice(f"column of {path}", column, known)
            continue
        if len(values) != len(header):
            raise line.error(f"{len(values)} values for {len(header)} columns")
        line.values.update(zip(header, values, strict=True))
        sample = line.sample
        if sample in samples:
            raise line.error(f"sample {sample[1]} of {sample[0]!r} occurs twice")
        samples.add(sample)
        yield line
    if not header:
        raise ConfigurationError(f"{file} is empty.", hint)


Rows = Mapping[int, tuple[int, bool | None]]
"""By data-set position: the predicted class (-1: none); True if the sample passed (None: unknown).
"""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for samples of one or more splits.

    The id of a sample is its position in the data set. The CSV file has the columns `split`, `id`
    and `prediction`. A prediction is a class, numbered as in the new model. For tasks without
    classes the column `passed` (1 or 0) replaces `prediction`. The column `key`, if it exists,
    identifies the samples: predictions of other samples are refused. The column `confidence`, if it
    exists, has the probability of the predicted class.

    Attributes:
        splits: for each split, the prediction of each sample by its id (`Rows`).
        keys: key of each sample by (split, id); samples without a key are missing.
        confidences: confidence of each sample, in [0, 1], like `keys`.
        argument: argument that the predictions come from, in errors.
        weights: hash of the model's weights; None: unknown.
        seal: SHA-256 by which `OldModel` finds out if its cache file is still valid; empty in other
            files.

    Example::

        RegressionFreeRepair(reference="old_predictions.csv")
    """

    splits: Mapping[str, Rows]
    weights: str | None = None
    seal: str = ""
    keys: Mapping[tuple[str, int], str] = field(default_factory=dict)
    confidences: Mapping[tuple[str, int], float] = field(default_factory=dict)
    argument: str = "reference"

    @classmethod
    def read(cls, path: str | Path, argument: str = "reference") -> Predictions:
        """Reads a file.

        Raises:
            ConfigurationError: a line cannot be read or repeats a sample. The message names it.
        """
        splits: dict[str, dict[int, tuple[int, bool | None]]] = {}
        keys = {}
        confidences = {}
        optional = ("prediction", "passed", "key", "confidence")
        for line in read_csv(argument, path, ("split", "id"), optional):
            predicted, passed = -1, None
            if line.values["prediction"].strip():
                predicted = line.whole_number("prediction")
            if line.values["passed"].strip():
                passed = line.flag("passed")
            if predicted < 0 and passed is None:
                raise line.error("neither `prediction` nor `passed` is given")
            split, at = line.sample
            splits.setdefault(split, {})[at] = predicted, passed
            if key := line.values["key"].strip():
                keys[line.sample] = key
            if line.values["confidence"].strip():
                confidences[line.sample] = line.share("confidence")
        with Path(path).open(encoding="utf-8-sig") as file:
            first_line = file.readline()
        read = cls(splits, keys=keys, confidences=confidences, argument=argument)
        if not first_line.startswith(WEIGHTS):
            return read
        weights, _, seal = first_line.removeprefix(WEIGHTS).strip().partition(" ")
        return replace(read, weights=weights, seal=seal)

    def save(self, path: str | Path) -> None:
        """Writes atomically a file that `read` can read."""
        text = self._table()
        if self.weights is not None:
            text = f"{WEIGHTS}{self.weights} {self.seal}".strip() + f"\n{text}"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replacing(path, lambda part: part.write_bytes(text.encode()))

    def _table(self) -> str:
        file = io.StringIO()
        columns = ["split", "id", "prediction", "passed"]
        if self.confidences:
            columns.append("confidence")
        if self.keys:
            columns.append("key")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for split, rows in self.splits.items():
            for at, (predicted, passed) in rows.items():
                line = {"split": split, "id": at}
                if predicted >= 0:
                    line["prediction"] = predicted
                if passed is not None:
                    line["passed"] = int(passed)
                if (split, at) in self.confidences:
                    line["confidence"] = f"{self.confidences[split, at]:.9g}"  # exact for float32
                if self.keys:
                    line["key"] = self.keys.get((split, at))
                writer.writerow(line)
        return file.getvalue()

    def sealed(self, key: str) -> Predictions:
        """Returns a copy with a seal: the SHA-256 of `key` and of the rows, which depend on it."""
        digest = hashlib.sha256(f"{key}\n{self._table()}".encode())
        return replace(self, seal=digest.hexdigest())

    @classmethod
    def of(cls, results: SampleResults, weights: str, keys: Sequence[str] = ()) -> Predictions:
        """Builds predictions from a model's results, its hash and the `keys` of the samples."""
        answers = zip(results.prediction.tolist(), results.passed.tolist(), strict=True)
        rows = list(zip(results.index.tolist(), answers, strict=True))
        splits = {split: dict(rows[results.of(split)]) for split in results.splits}
        by_sample = dict(zip(results.samples, keys, strict=False))
        confidences = {}
        for sample, confidence in zip(results.samples, results.confidence.tolist(), strict=True):
            if not math.isnan(confidence):
                confidences[sample] = confidence
        return cls(splits, weights, keys=by_sample, confidences=confidences)

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Returns `results` for `like`. Reads the sources if the predictions have keys."""
        if not self.keys:
            return self.results(like)
        return self.results(like, read_keys(sources, evaluator.collective))

    def results(self, like: SampleResults, keys: Sequence[str] = ()) -> SampleResults:
        """Converts the predictions for the samples of `like` to results.

        The loss is 0 for a right sample, else 1.

        Raises:
            ConfigurationError: a sample of `like` has no prediction, or its label contradicts
                `passed`, or one of the `keys` is another.
        """
        predicted, stated = torch.full_like(like.prediction, -1), torch.full_like(like.label, -1)
        is_other = torch.zeros_like(like.passed)
        confidence = torch.full_like(like.margin, torch.nan)
        for split in like.splits:
            self._check_complete(split, like)
        for row, (split, at) in enumerate(like.samples):
            predicted[row], flag = self.splits[split][at]
            confidence[row] = self.confidences.get((split, at), math.nan)
            if flag is not None:
                stated[row] = int(flag)
            if keys:
                key = self.keys.get((split, at))
                is_other[row] = bool(key and keys[row]) and key != keys[row]
        problem = "are not those that were predicted"
        refuse_samples(like, is_other, problem, argument=self.argument)
        is_stated, right = stated >= 0, predicted == like.label
        if (~is_stated & (like.label < 0)).any():
            raise ConfigurationError(
                f"`{self.argument}`: the task has no classes to compare.",
                "add a column `passed`, 1 or 0.",
            )
        # A task may call other predictions right than the true class.
        if torch.equal(like.passed, like.prediction == like.label):
            has_class = is_stated & (predicted >= 0) & (like.label >= 0)
            contradictory = has_class & (right != (stated == 1))
            problem = "have a label that contradicts `passed`"
            refuse_samples(like, contradictory, problem, argument=self.argument)
        passed = torch.where(is_stated, stated == 1, right)
        return replace(
            like,
            prediction=predicted,
            passed=passed,
            loss=(~passed).to(like.loss),
            margin=torch.full_like(like.margin, torch.nan),
            confidence=confidence,
            targeted=torch.zeros_like(passed),
            in_target=torch.zeros_like(passed),
        )

    def _check_complete(self, split: str, like: SampleResults) -> None:
        rows, ids = self.splits.get(split, {}), like.index[like.of(split)].tolist()
        missing = [at for at in ids if at not in rows]
        if missing:
            raise ConfigurationError(
                f"`{self.argument}`: {len(missing):,} of {len(ids):,} samples of `{split}` have no "
                f"prediction ({missing[:5]}); there are predictions for {self.listed_splits}.",
                "give one prediction for each known and unseen sample; "
                "ids are positions in the data set.",
            )

    @property
    def listed_splits(self) -> str:
        return ", ".join(f"`{name}`" for name in self.splits) or "no split"

    def alone(self) -> SampleResults:
        """Converts all predictions to results without labels.

        Raises:
            ConfigurationError: `passed` is missing.
        """
        ids = []
        unknown = []
        for split, rows in self.splits.items():
            ids += sorted(rows)
            unknown += [(split, at) for at in sorted(rows) if rows[at][1] is None]
        hint = "give the column `passed`, 1 or 0, for each sample."
        if not ids:
            raise ConfigurationError("`new` has no samples.", hint)
        if unknown:
            lacking = f"{len(unknown):,} samples, such as {unknown[0]}"
            raise ConfigurationError(f"`new` has no value of `passed` for {lacking}.", hint)
        index, zeros = torch.tensor(ids), torch.zeros(len(ids))
        unlabeled, unmarked = torch.full_like(index, -1), zeros.bool()
        return self.results(
            SampleResults(
                tuple(self.splits),
                tuple(map(len, self.splits.values())),
                index,
                label=unlabeled,
                prediction=unlabeled,
                loss=zeros,
                passed=unmarked,
                targeted=unmarked,
                margin=zeros,
            )
        )


SAME_DATA = (
    "predict the same data with both models, in the same order; if only the preprocessing has "
    "changed, delete the column `key`."
)


def refuse_samples(
    samples: SampleResults,
    mask: Tensor,
    problem: str,
    hint: str = SAME_DATA,
    argument: str = "reference",
) -> None:
    """Raises a `ConfigurationError` if `mask`, `N` bool, marks a sample."""
    for split, ids in samples.ids(mask).items():
        if ids:
            raise ConfigurationError(
                f"`{argument}`: {len(ids):,} samples of `{split}` {problem} "
                f"({', '.join(map(str, ids[:5]))}).",
                hint,
            )


Ids = Mapping[str, Sequence[int]]
"""Data-set positions by split."""


def read_slices(path: str | Path) -> dict[tuple[str, int], str]:
    """Reads `{(split, id): slice}` from a CSV file with the columns `split`, `id` and `slice`."""
    lines = read_csv("slices", path, ("split", "id", "slice"))
    return {line.sample: line.values["slice"] for line in lines}
