"""What came of a sweep: a table of runs, and what can be read off it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.serialize import dumps, plain
from lightning_nrl._utils.state import write
from lightning_nrl.analysis.sweep.run import COLUMNS, ROLES, Run
from lightning_nrl.analysis.sweep.sweep_tables import sweep_page
from lightning_nrl.errors import ConfigurationError, check_choice, explain
from lightning_nrl.gate import Gate
from lightning_nrl.report import Page, installed_versions
from lightning_nrl.report.document import Shown

if TYPE_CHECKING:
    from lightning_nrl.analysis.sweep.grid import Setting
    from lightning_nrl.analysis.sweep.store import Kept

__all__ = ["SweepResult"]


@dataclass(frozen=True)
class SweepResult(Shown):
    """Runs of many settings and seeds. `rich.print(result)` shows means and spread for each setting.

    Attributes:
        runs: one a setting and seed, settings in their order.
        target: which failures were to be repaired, in words.
        layer: what was to be changed, as it was asked for.
        versions: versions of the software by name.
        settings: the settings by name; none if the result was read from a file.
        weights: what was found, by setting and seed; likewise.
        original: the layers as they were, by whether biases were searched too; likewise.
    """

    runs: tuple[Run, ...]
    target: str = ""
    layer: str = ""
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    settings: Mapping[str, Setting] = field(default_factory=dict, compare=False, repr=False)
    weights: Mapping[tuple[str, int], Kept] = field(default_factory=dict, compare=False, repr=False)
    original: Mapping[bool, Mapping[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, setting: str) -> tuple[Run, ...]:
        """The runs of one setting.

        Raises:
            ConfigurationError: it is not there; the nearest name is given.
        """
        names = tuple(dict.fromkeys(run.setting for run in self.runs))
        check_choice("setting", setting, names)
        return tuple(run for run in self.runs if run.setting == setting)

    def pareto(self, role: str = "known") -> tuple[Run, ...]:
        """The front over all runs of repaired against broken: who repairs more breaks more. From few broken to many.

        Args:
            role: `known`, `calibration` or `unseen`. The front of unseen data describes; it is not to be chosen from.

        Raises:
            ConfigurationError: there were no such data.
        """
        check_choice("role", role, ROLES)
        if not all(run.has(role) for run in self.runs):
            raise ConfigurationError(explain(f"`role={role!r}`: there were no such data.", f"give `{role}` data."))
        front: list[Run] = []
        most = -1
        for run in sorted(self.runs, key=lambda run: (run.counts(role).broken, -run.counts(role).repaired)):
            if run.counts(role).repaired > most:
                front.append(run)
                most = run.counts(role).repaired
        return tuple(front)

    def best(self, under: str | Gate = "instance") -> Run | None:
        """The run to take, chosen on known and calibration data; unseen data have no part in it.

        Of the runs that repair a target and that the gate lets through on known data: the one with the most repaired
        less broken calibration samples, if there are any; of several, the one that breaks fewer of these, repairs more
        targets, breaks fewer known samples, repairs more of them, and comes first.

        Args:
            under: what may break of the known data: `instance`, `accuracy`, `tolerance:3`, `tolerance:1%`, or a gate.

        Returns:
            The run; None if there is none.
        """
        gate = Gate.parse(under, "under")

        def worth(run: Run) -> tuple[int, ...]:
            known, calibration = run.counts("known"), run.counts("calibration")
            gain = calibration.repaired - calibration.broken
            return gain, -calibration.broken, run.known_repaired_in_target, -known.broken, known.repaired

        fit = [
            run
            for run in self.runs
            if run.known_repaired_in_target and run.known_broken <= gate.allowed(run.counts("known"))
        ]
        return max(fit, key=worth, default=None)

    def arguments(self, run: Run) -> dict[str, Any]:
        """Arguments of `repair` that find a run's weights again, beside those that all runs share.

        Raises:
            ConfigurationError: the result was read from a file, which does not have them.
        """
        if run.setting not in self.settings:
            raise _without(run, "how it was made")
        return {**self.settings[run.setting].arguments(), "seed": run.seed}

    def state(self, run: Run) -> dict[str, Tensor]:
        """The whole parameters of the searched layers as a run would have them, on the CPU.

        Raises:
            ConfigurationError: the result was read from a file, which does not have them.
        """
        if (run.setting, run.seed) not in self.weights:
            raise _without(run, "its weights")
        kept = self.weights[run.setting, run.seed]
        original = self.original[self.settings[run.setting].localizer.include_bias]
        flat = torch.cat([value.flatten() for value in original.values()])
        flat[kept.where] = kept.values
        parts = flat.split([value.numel() for value in original.values()])
        return {name: part.view_as(value).clone() for part, (name, value) in zip(parts, original.items(), strict=True)}

    def write(self, model: nn.Module, run: Run) -> None:
        """Puts a run's weights into a model for good. Nothing judges them: look at the run's counts first.

        Args:
            model: the model that was swept, or another with the same parameters, on any device.
            run: such as that of `best`.

        Raises:
            ConfigurationError: as for `state`, or the parameters are not in the model; nothing was written.
        """
        write(model, self.state(run))

    def to_table(self) -> Page:
        """A line for each setting: means over its seeds and their spread."""
        return sweep_page(self)

    def to_csv(self, path: str | Path | None = None) -> str:
        """A line a run, empty where there is nothing to say.

        Args:
            path: a file to write it to as well.
        """
        out = io.StringIO()
        table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(run) for run in self.runs)
        return _written(out.getvalue(), path)

    @classmethod
    def from_csv(cls, source: str | Path) -> SweepResult:
        """Reads a table, without weights.

        Args:
            source: the file, or the text itself.

        Raises:
            ConfigurationError: it is no such table.
        """
        text = source if isinstance(source, str) and "\n" in source else Path(source).read_text(encoding="utf-8")
        try:
            return cls(tuple(map(Run.of_text, csv.DictReader(io.StringIO(text)))))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigurationError(
                explain(f"`source` is no table of a sweep: {error!r}.", "give what `SweepResult.to_csv` has written.")
            ) from error

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON of everything but the weights.

        Args:
            path: a file to write it to as well.
        """
        data = {name: getattr(self, name) for name in ("target", "layer", "versions", "runs")}
        return _written(dumps(plain(data)) + "\n", path)

    @classmethod
    def from_json(cls, text: str) -> SweepResult:
        """Reads what `to_json` gives."""
        data = json.loads(text)
        return cls(**{**data, "runs": tuple(Run(**run) for run in data["runs"])})

    def to_parquet(self, path: str | Path) -> None:
        """The table as a Parquet file.

        Raises:
            ConfigurationError: pyarrow is not installed.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigurationError(
                explain("`to_parquet` needs pyarrow.", 'pip install "lightning_nrl[parquet]", or use `to_csv`.')
            ) from error
        columns = {name: [getattr(run, name) for run in self.runs] for name in COLUMNS}
        parquet.write_table(pyarrow.table(columns), path)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of some numbers; of one number the deviation is 0."""
    column = torch.tensor(values, dtype=torch.float64)
    return float(column.mean()), float(column.std()) if len(values) > 1 else 0.0


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _without(run: Run, what: str) -> ConfigurationError:
    return ConfigurationError(
        explain(
            f"`run`: of {run.setting!r} with seed {run.seed} this result does not know {what}.",
            "call `sweep` again with the same `dirpath`, which makes no run twice; a table alone has none of it.",
        )
    )
