"""What a report needs, gathered while a repair goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._utils.state import State
from lightning_nrl.evaluation import DOUBTFUL
from lightning_nrl.evaluation.quotas import needed
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.gate import Verdict
from lightning_nrl.pipeline.line_search import Strength
from lightning_nrl.pipeline.report_parts import (
    localization_report,
    search_report,
    set_aside_samples,
    slice_reports,
    split_report,
    update_split,
    update_text,
    weight_change,
)
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Solution
from lightning_nrl.reference.update import Update
from lightning_nrl.report import (
    CalibrationBounds,
    Hashes,
    RepairReport,
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    Status,
    UpdateSplit,
    hash_tensors,
)
from lightning_nrl.tasks import Task

__all__ = ["ReportBuilder"]

NOTHING: Mapping[Role, SampleResults] = MappingProxyType({})
UNDECIDED = Strength(chosen=None)


@dataclass(frozen=True)
class ReportBuilder:
    """A report in the making.

    Attributes:
        model: the original model.
        space: the layers that are to be changed.
        settings: what was asked for.
        task: what right and wrong mean.
        known: the evidence that the repair looks at, before it.
        aside: the evidence that no search looks at, before it, by role.
        seconds: wall time by stage, still growing.
        solution: what the method found, once it is over.
        n_passed: passed samples that it scored candidates on, |I_pos|.
        strength: how far the repair goes, once that is known.
        update: what the replaced model does, in an update.
        left_out: `N` bool, known failed samples that are set aside; None: none.
    """

    model: nn.Module
    space: ParameterSpace
    settings: Settings
    task: Task
    known: SampleResults
    aside: Mapping[Role, SampleResults]
    seconds: Mapping[str, float]
    solution: Solution | None = None
    n_passed: int | None = None
    strength: Strength = UNDECIDED
    update: Update | None = None
    left_out: Tensor | None = None

    def solved(self, solution: Solution, n_passed: int) -> ReportBuilder:
        """The account after the method; a swarm scores this many passed samples (|I_pos|) unless it says otherwise."""
        scored = n_passed if solution.n_passed is None else solution.n_passed
        return replace(self, solution=solution, n_passed=scored)

    def at(self, strength: Strength) -> ReportBuilder:
        """The account after the choice of a strength."""
        return replace(self, strength=strength)

    def closed(self, status: Status, reason: str) -> RepairReport:
        """The report of a repair that ended without a candidate: the weights stay."""
        old = self._layers()
        layers, model = hash_tensors(old), self._hash_model({})
        hashes = Hashes(layers, layers, model, model)
        slices = self._slices()
        return self._report(status, reason, self._splits(), update=self._updates(), hashes=hashes, slices=slices)

    def judged(
        self,
        verdict: Verdict,
        old: State,
        new: State,
        after: SampleResults,
        aside: Mapping[Role, SampleResults] = NOTHING,
        bounds: CalibrationBounds | None = None,
    ) -> RepairReport:
        """The report of a candidate.

        Args:
            verdict: what the gate said.
            old: the tensors that the candidate changes, as they are, by the names of the state dict.
            new: likewise as the candidate has them.
            after: the evidence on known data under the candidate.
            aside: likewise on the data that no search looks at, if it was accepted.
            bounds: what the calibration data say of it, if there are any and it was accepted.
        """
        before = hash_tensors(old), self._hash_model({})
        now = (hash_tensors(new), self._hash_model(new)) if verdict.accepted else before
        candidate = self._splits(after, aside)
        return self._report(
            verdict.status,
            verdict.reason,
            candidate if verdict.accepted else self._splits(),
            layers=_layers(new),
            candidate=() if verdict.accepted else tuple(split for split in candidate if split.role == "known"),
            update=self._updates(after, aside) if verdict.accepted else self._updates(),
            slices=self._slices(after, aside if verdict.accepted else NOTHING),
            change=weight_change(old, new),
            bounds=bounds,
            hashes=Hashes(before[0], now[0], before[1], now[1]),
        )

    def _report(
        self,
        status: Status,
        reason: str,
        splits: tuple[SplitReport, ...],
        layers: tuple[str, ...] = (),
        update: tuple[UpdateSplit, ...] = (),
        **rest: Any,
    ) -> RepairReport:
        found = self.solution or Solution(None)
        reason = f"{reason} {update_text(update)}".rstrip()
        return RepairReport(
            status=status,
            reason=reason,
            layers=layers or tuple(site.name or type(site.module).__name__ for site in self.space.sites),
            target=str(self.settings.target),
            gate=str(self.settings.gate),
            task=str(self.task),
            splits=splits,
            update=update,
            localization=None if found.localization is None else localization_report(found.localization),
            search=None
            if found.result is None
            else search_report(found.result, int(self.known.targeted.sum()), self.n_passed),
            steps=found.steps,
            strength=self.strength.path,
            chosen_strength=self.strength.chosen,
            set_aside=self._set_aside(),
            seed=self.settings.seed,
            seconds=dict(self.seconds),
            settings=self.settings.plain(),
            **rest,
        )

    def _splits(
        self, after: SampleResults | None = None, aside: Mapping[Role, SampleResults] = NOTHING
    ) -> tuple[SplitReport, ...]:
        known = [split_report(split, "known", self.known, after) for split in self.known.splits]
        others = [
            split_report(split, role, evidence, aside.get(role))
            for role, evidence in self.aside.items()
            for split in evidence.splits
        ]
        return (*known, *others)

    def _slices(
        self, after: SampleResults | None = None, aside: Mapping[Role, SampleResults] = NOTHING
    ) -> tuple[SliceReport, ...]:
        quotas = needed(self.known, self.settings.samples.quotas or {})[0]
        known = slice_reports("known", self.known, after, quotas)
        others = [slice_reports(role, before, aside.get(role)) for role, before in self.aside.items()]
        return tuple(one for part in (known, *others) for one in part)

    def _set_aside(self) -> tuple[SetAside, ...]:
        if self.left_out is None:
            return ()
        why = "its label looks wrong" if self.settings.samples.set_aside == DOUBTFUL else "chosen by `set_aside`"
        return set_aside_samples(self.known, self.left_out, why)

    def _updates(
        self, after: SampleResults | None = None, aside: Mapping[Role, SampleResults] = NOTHING
    ) -> tuple[UpdateSplit, ...]:
        if self.update is None:
            return ()
        before, now = {"known": self.known, **self.aside}, {"known": after, **aside}
        return tuple(
            update_split(split, role, old, before[role], now.get(role))
            for role, old in self.update.answers.items()
            for split in old.splits
        )

    def _layers(self) -> dict[str, Tensor]:
        return {name: value for site in self.space.sites for name, value in site.parameters.items()}

    def _hash_model(self, changed: State) -> str:
        """Of the whole state dict with some tensors changed."""
        return hash_tensors({**self.model.state_dict(), **changed})


def _layers(state: State) -> tuple[str, ...]:
    """Dotted names of the layers that a state changes, in order; the model itself has no name."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in state))
