"""`SweepResult`: runs, weights, means and page of a sweep."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from torch import Tensor, nn

from lightning_nrl._trainer.tracking.tags import NUMBER_TAG, ROLE_NUMBER, tagged
from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.json_records import UNWRITTEN, to_plain
from lightning_nrl._utils.state import write
from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.evaluation.layers import with_values
from lightning_nrl.evaluation.stats import pareto_front
from lightning_nrl.gate import Gate
from lightning_nrl.records.splits import ROLES, Role
from lightning_nrl.report import Report
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text
from lightning_nrl.study.grid import Setting
from lightning_nrl.study.run_store import RUN_COLUMNS, Run, StoredRun, run_of_text


def _unwritten() -> Any:
    return field(default_factory=dict, compare=False, repr=False, metadata=UNWRITTEN)


@dataclass(frozen=True)
class SweepResult(Report):
    """Runs of many settings and seeds. `rich.print(result)` shows mean and spread of each setting.

    Attributes:
        runs: one per setting and seed, in the order of settings.
        target: the failures to repair, in words.
        settings: settings by name. This field and the two below are empty if the result was read
            from a file.
        weights: runs with the weights that they found, by setting and seed.
        original: original parameters of the searched layers, by dotted name.
    """

    runs: tuple[Run, ...]
    target: str = ""
    layer: str = ""
    settings: Mapping[str, Setting] = _unwritten()
    weights: Mapping[tuple[str, int], StoredRun] = _unwritten()
    original: Mapping[str, Tensor] = _unwritten()

    def page(self, full: bool = False) -> Page:
        blocks: list[Block] = [Heading("Sweep", 1), Text(_summary(self))]
        if self.runs:
            blocks += [_table(self), Text(SWEEP_NOTE)]
        facts = [("target", self.target), ("layer", self.layer)]
        facts = [(name, value) for name, value in facts if value]
        if facts:
            blocks.append(FactList(facts))
        return Page(blocks)

    @property
    def setting_names(self) -> tuple[str, ...]:
        """The names of the settings, in the order of `runs`."""
        return tuple(dict.fromkeys(run.setting for run in self.runs))

    def of(self, setting: str) -> tuple[Run, ...]:
        """Returns the runs of one setting.

        For an unknown name, a `ConfigurationError` suggests the nearest name.
        """
        check_choice("setting", setting, self.setting_names)
        return tuple(run for run in self.runs if run.setting == setting)

    def pareto(self, role: Role = "known") -> tuple[Run, ...]:
        """Returns the Pareto front (few broken, many repaired), fewest broken first.

        Do not choose by `unseen` data.
        """
        check_choice("role", role, ROLES)
        if not all(run.has(role) for run in self.runs):
            raise ConfigurationError(
                f"`role={role!r}`: the sweep had no {role} data.", f"give `sweep` {role} data."
            )

        return pareto_front(
            self.runs,
            lambda run: run.counts(role).broken,
            lambda run: run.counts(role).repaired,
        )

    def best(self, under: str | Gate = "instance") -> Run | None:
        """Returns the best run by known and calibration data, or None if no run can win.

        Ignores unseen data. Only runs that repair a target and pass the gate `under` on known data
        can win. The first criterion is the number of calibration samples repaired minus broken.
        Ties are decided by fewer broken calibration samples, more repaired targets, fewer broken
        known samples, more repaired known samples, and last by the order of `runs`.
        """
        gate = Gate.parse(under, "under")

        def worth(run: Run) -> tuple[int, ...]:
            known, calibration = run.known, run.counts("calibration")
            gain = calibration.repaired - calibration.broken
            ties = (known.repaired_in_target, -known.broken, known.repaired)
            return gain, -calibration.broken, *ties

        candidates = [run for run in self.runs if run.known.repaired_in_target]
        candidates = [run for run in candidates if not gate.excess_of(run.known)]
        return max(candidates, key=worth, default=None)

    def hparams_rows(
        self, each: Literal["setting", "run"] = "setting"
    ) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
        """Returns rows of TensorBoard's HParams tab by name.

        A row is for one `setting`, with means, or for one `run`.
        """
        check_choice("each", each, ("setting", "run"))
        if each == "setting":
            return {setting: _hparams(self.of(setting)) for setting in self.setting_names}
        rows = {}
        for run in self.runs:
            options, measures = _hparams([run])
            rows[f"{run.setting} seed={run.seed}"] = {**options, "seed": run.seed}, measures
        return rows

    def arguments(self, run: Run) -> dict[str, Any]:
        """Returns the arguments of `repair` for the same run.

        Raises:
            ConfigurationError: the result was read from a file, which has no settings.
        """
        self._stored(run)
        return {**self.settings[run.setting].arguments(), "seed": run.seed}

    def state(self, run: Run) -> dict[str, Tensor]:
        """Returns all parameters of the searched layers with the weights of a run, by dotted name.

        The tensors are on the CPU.

        Raises:
            ConfigurationError: the result was read from a file, which has no weights.
        """
        stored = self._stored(run)
        return with_values(self.original, stored.where, stored.values)

    def _stored(self, run: Run) -> StoredRun:
        if (run.setting, run.seed) not in self.weights:
            raise ConfigurationError(
                f"`run`: this result has no weights of {run.setting!r} with seed {run.seed}.",
                "a table has no weights; call `sweep` again with the same `dirpath`, which repeats "
                "no run.",
            )
        return self.weights[run.setting, run.seed]

    def write(self, model: nn.Module, run: Run) -> None:
        """Writes the weights of a run into a model, all or none of them. No gate judges them."""
        write(model, self.state(run))

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns a CSV table with a line per run and empty cells for missing values.

        Writes it to `path`, if given.
        """
        out = io.StringIO()
        table = csv.DictWriter(out, RUN_COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(to_plain(run) for run in self.runs)
        return _written(out.getvalue(), path)

    @classmethod
    def from_csv(cls, source: str | Path) -> SweepResult:
        """Reads a table, which has no weights, from a file or text.

        Raises:
            ConfigurationError: the file or text has other content.
        """
        text = str(source)
        if "\n" not in text or isinstance(source, Path):
            text = Path(source).read_text(encoding="utf-8")
        try:
            return cls(
                tuple(run_of_text(row) for row in csv.DictReader(io.StringIO(text), strict=True))
            )
        except (csv.Error, ConfigurationError) as error:
            problem = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"`source` is no table of a sweep: {problem}",
                "give a table that `SweepResult.to_csv` wrote.",
            ) from error

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns everything except the weights as strict JSON. Writes it to `path`, if given."""
        return _written(super().to_json(), path)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(path, text)
    return text


SETTING_COLUMNS = RUN_COLUMNS[: RUN_COLUMNS.index("seed")]
SWEEP_NOTE = (
    "Means over seeds, standard deviations in brackets. Free of regressions: the share of runs "
    "that repair something known and break nothing known. No gate judged."
)


def _summary(result: SweepResult) -> str:
    if not result.runs:
        return "No run."
    first = result.runs[0]
    seconds = sum(run.seconds for run in result.runs)
    text = f"{plural(len(result.runs), 'run')} of {plural(len(result.setting_names), 'setting')}"
    text += f" in {seconds:,.0f} s. {first.known.targeted:,} failures to repair"
    for role in ROLES:
        if first.has(role):
            counts = first.counts(role)
            text += f", {counts.passed:,} of {counts.n:,} {role} samples right before"
    return f"{text}."


def _table(result: SweepResult) -> Table:
    first = result.runs[0]
    columns = [
        ("runs", ""),
        ("repaired", f"of {first.known.targeted:,}"),
        ("broken", "known"),
        ("free of", "regr."),
    ]
    held_out = [role for role in ROLES[1:] if first.has(role)]
    for role in held_out:
        columns += [("repaired", role), ("broken", role), ("accuracy", "points")]
    rows = []
    for setting in result.setting_names:
        runs = result.of(setting)
        cells = [
            f"{len(runs):,}",
            _mean(run.known.repaired_in_target for run in runs),
            _mean(run.known.broken for run in runs),
            f"{mean(run.regression_free for run in runs):.0%}",
        ]
        for role in held_out:
            counts = [run.counts(role) for run in runs]
            cells.append(_mean(c.repaired for c in counts))
            cells.append(_mean(c.broken for c in counts))
            cells.append(_mean((c.points for c in counts), sign="+"))
        rows.append(Row(setting, cells))
    return Table(columns, rows)


def _mean(numbers: Iterable[float], sign: str = "") -> str:
    values = list(numbers)
    text = f"{mean(values):{sign},.1f}"
    return f"{text} ({stdev(values):,.1f})" if len(values) > 1 else text


def _hparams(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, float]]:
    first = runs[0]
    options = {name: vars(first)[name] for name in SETTING_COLUMNS}
    for option, value in options.items():
        if value is None:
            options[option] = "auto"
    measures = [_measures(run) for run in runs]
    means = {}
    for tag in measures[0]:
        value = float(mean(measures_of_run[tag] for measures_of_run in measures))
        if math.isfinite(value):
            means[tag] = value
    return options, tagged(NUMBER_TAG, means, name="sweep")


def _measures(run: Run) -> dict[str, float]:
    measures = {"regression_free": float(run.regression_free), "seconds": run.seconds}
    for role in ROLES:
        if run.has(role):
            counts = run.counts(role)
            numbers = {
                "repaired_in_target": counts.repaired_in_target,
                "broken_in_target": counts.broken_in_target,
                "repaired": counts.repaired,
                "broken": counts.broken,
                "accuracy_after": counts.accuracy_after,
            }
            measures |= tagged(ROLE_NUMBER, numbers, role=role)
    return measures
