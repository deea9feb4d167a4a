"""The core: known data in, report and weights out. Knows nothing of Lightning and never writes to the live model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_nrl.account import Account
from lightning_nrl.as_found import as_found
from lightning_nrl.batches import Batch, Source
from lightning_nrl.collective import Collective
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, EvidenceError, RepairError, explain
from lightning_nrl.evidence import Context, Evidence, collect, non_finite
from lightning_nrl.gate import judge
from lightning_nrl.localization import Localization
from lightning_nrl.report import RepairReport
from lightning_nrl.scoring import Recording, make_scorer, record
from lightning_nrl.search import SearchHistory, SearchResult, Spread, search
from lightning_nrl.settings import Settings
from lightning_nrl.sites import find_sites
from lightning_nrl.targets import Target
from lightning_nrl.tasks import Multiclass, Task

__all__ = ["Observer", "Outcome", "repair_module"]


class Observer(Protocol):
    """Is told how a repair goes on."""

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Entered around a stage: `collect`, `localize`, `search` or `judge`."""
        ...

    def search(self, done: int, total: int, repaired: int, broken: int) -> None:
        """After some iterations: how many of how many, and the best candidate's counts."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of a repair.

    Attributes:
        report: the account of it.
        parameters: whole repaired parameters by dotted name, to be written into the model; None unless accepted.
        change: `K`, the change of each localised weight, accepted or not; None if no candidate was found.
    """

    report: RepairReport
    parameters: Mapping[str, Tensor] | None = None
    change: Tensor | None = None

    @torch.no_grad()
    def write(self, model: nn.Module) -> bool:
        """Copies the repaired parameters into a model; one whose repair was not accepted stays as it is.

        Args:
            model: the model that was repaired, or another with the same parameters, on any device.

        Returns:
            Whether the model was changed.

        Raises:
            ConfigurationError: a parameter is not in the model, or has another shape; nothing was written.
        """
        live = dict(model.named_parameters(remove_duplicate=False))
        new = self.parameters or {}
        for name, value in new.items():
            if name not in live or live[name].shape != value.shape:
                found = f"has the shape {list(live[name].shape)}" if name in live else "is not there"
                raise ConfigurationError(
                    explain(f"`model`: its parameter {name!r} {found}.", "give the model that was repaired.")
                )
        for name, value in new.items():
            live[name].copy_(value)
        return bool(new)


def repair_module(
    model: nn.Module,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    unseen: Sequence[Source] = (),
    task: Task | None = None,
    context: Context = nullcontext,
    collective: Collective | None = None,
    observer: Observer | None = None,
) -> Outcome:
    """Collects evidence, localises, searches and judges. The model is left as found: `Outcome.write` changes it.

    Args:
        model: the trained model on its device; it runs in evaluation mode.
        known: data that the repair may look at; all of it is what the gate judges by.
        settings: what to repair and how.
        unseen: data that is only counted, before and after an accepted repair; its marks do not matter.
        task: what passed and loss mean; None: `Multiclass`.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the data; each ends with the same outcome.
        observer: is told how it goes.

    Returns:
        The outcome. That there is nothing to repair, or no way to, is a report, not an exception.

    Raises:
        ConfigurationError: the layer, the data, the target or the task cannot be used.
        EvidenceError: the original model gives losses that are not finite; the samples are named.
    """
    settings, task = settings or Settings(), task or Multiclass()
    collective, clock = collective or Collective(), _Clock(observer)
    _check_sources(known, unseen, settings)
    space = find_sites(model, settings.layer, include_bias=settings.localizer.include_bias)
    see = partial(collect, task=task, context=context, collective=collective)
    with as_found(model):
        with clock.stage("collect"):
            before = see(model, known, target=settings.target)
            unseen_before = _see_unseen(see, model, unseen, settings.target, collective) if unseen else None
        _check_losses(before)
        account = Account(model, space, settings, task, before, unseen_before, clock.seconds)
        if not before.targeted.any():
            return Outcome(account.closed("nothing to repair", _nothing(before, known, settings.target)))
        passed = _passed_rows(before, known, settings)
        if not passed.any():
            return _given_up(account, _nothing_passes(before, known))
        try:
            with clock.stage("localize"):
                batches = _rows(known, before)
                keep = before.targeted | before.passed
                recording = record(model, batches, space, task, keep, context=context, budget=_half(settings.budget))
                localization = settings.localizer(
                    recording, task, failed=before.targeted, passed=before.passed, collective=collective
                )
        except EmptyLocalizationError as error:
            return _given_up(account, str(error))
        with clock.stage("search"):
            result = _search(recording, localization, before, passed, task, settings, collective, clock)
        del recording
        account = account.searched(localization, result, int(passed.sum()))
        values, old = _agreed(result.values, collective), space.flat()[localization.weights.to(space.device)]
        if torch.equal(values, old):
            return Outcome(account.closed("not repaired", "the search found nothing better than the original weights."))
        parameters = space.changed(localization.weights, values)
        with clock.stage("judge"), space.holding(parameters):
            after = see(model, known)
            verdict = judge(before, after, settings.gate)
            unseen_after = see(model, unseen) if unseen and verdict.accepted else None
        report = account.judged(verdict, parameters, after, unseen_after)
        change = (values.cpu().double() - old.cpu().double()).float()
        return Outcome(report, parameters if verdict.accepted else None, change)


@torch.no_grad()
def _search(
    recording: Recording,
    localization: Localization,
    before: Evidence,
    passed: Tensor,
    task: Task,
    settings: Settings,
    collective: Collective,
    clock: _Clock,
) -> SearchResult:
    space = recording.space
    where = localization.weights.to(space.device)
    passed_loss = getattr(settings.fitness, "uses_passed_loss", True)
    scorer = make_scorer(
        recording,
        where,
        before.targeted,
        passed,
        task,
        collective=collective,
        budget=_half(settings.budget),
        passed_loss=passed_loss,
        fragility=before.loss,
    )
    result = search(
        scorer,
        space.flat()[where],
        spread=Spread.around(space, where),
        fitness=settings.fitness,
        settings=settings.method,
        seed=settings.seed,
        on_progress=partial(clock.searched, total=settings.method.iterations, n_passed=int(passed.sum())),
    )
    if passed_loss:
        return result
    unknown = torch.full_like(result.history.loss_passed, torch.nan)
    return replace(result, history=replace(result.history, loss_passed=unknown))


def _half(budget: int | None) -> int | None:
    """Recording and scoring share what the search may use."""
    return None if budget is None else max(1, budget // 2)


def _see_unseen(
    see: Callable[..., Evidence], model: nn.Module, unseen: Sequence[Source], target: Target, collective: Collective
) -> Evidence:
    """The evidence on unseen data; what the target would be there is for the report alone, so it may fail."""
    try:
        return see(model, unseen, target=target, everywhere=True)
    except Exception as error:
        # If one rank fails all do; they try again only if all can.
        if collective.any(not isinstance(error, RepairError)):
            raise
        warnings.warn(f"the target's failures are not counted on unseen data: {error}", stacklevel=3)
        return see(model, unseen)


def _rows(known: Sequence[Source], before: Evidence) -> Iterator[tuple[Batch, Tensor]]:
    for source in known:
        for batch in source:
            yield batch, before.rows(source.split, batch.position)


def _passed_rows(before: Evidence, known: Sequence[Source], settings: Settings) -> Tensor:
    """I_pos, `N` bool: every known passed sample, or a sample of those from the passed data (#pos in the paper)."""
    if settings.n_passed is None:
        return before.passed
    pool = torch.zeros_like(before.passed)
    for source in known:
        if source.passed:
            pool[before.of(source.split)] = before.passed[before.of(source.split)]
    rows = pool.nonzero().flatten()
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.zeros_like(pool)
    drawn[rows[torch.randperm(len(rows), generator=generator)[: settings.n_passed]]] = True
    return drawn


def _nothing_passes(before: Evidence, known: Sequence[Source]) -> str:
    if not before.passed.any():
        return "no known sample passes, so there is nothing to keep and nothing to compare with."
    names = " and ".join(source.split for source in known if source.passed)
    return f"no sample of {names} passes, so `n_passed` has nothing to draw from."


def _check_sources(known: Sequence[Source], unseen: Sequence[Source], settings: Settings) -> None:
    names = [source.split for source in (*known, *unseen)]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            explain(f"`known` and `unseen` have the splits {names}.", "give each split a name of its own.")
        )
    if not any(source.failed for source in known):
        raise ConfigurationError(
            explain("`known`: no source is marked `failed`.", "mark the one whose failures are to be repaired.")
        )
    if settings.n_passed is not None and not any(source.passed for source in known):
        raise ConfigurationError(
            explain(
                f"`n_passed={settings.n_passed}`: no known source is marked `passed`.",
                "mark the one that they are drawn from, or leave `n_passed` out to score every known passed sample.",
            )
        )


def _agreed(values: Tensor, collective: Collective) -> Tensor:
    """The first rank's values on every rank, whatever rounding did elsewhere."""
    return collective.sum(values if collective.rank == 0 else torch.zeros_like(values))


def _check_losses(before: Evidence) -> None:
    wrong = non_finite(before)
    if wrong:
        samples = "; ".join(f"{split}: {ids[:10]}{' ...' if len(ids) > 10 else ''}" for split, ids in wrong.items())
        raise EvidenceError(
            explain(
                f"the model's loss is NaN or infinite on {sum(map(len, wrong.values()))} known samples ({samples}).",
                "look at these inputs, or at the training; a model that gives NaN cannot be repaired.",
            )
        )


def _nothing(before: Evidence, known: Sequence[Source], target: Target) -> str:
    failed = ~before.passed
    counts = ", ".join(f"{int(failed[before.of(source.split)].sum())} in {source.split}" for source in known)
    where = " and ".join(source.split for source in known if source.failed)
    return f"no failed sample of {where} is in the target ({target}); failures in all: {counts}."


def _given_up(account: Account, reason: str) -> Outcome:
    warnings.warn(f"not repaired: {reason}", stacklevel=3)
    return Outcome(account.closed("not repaired", reason))


class _Clock:
    """Seconds spent in each stage, in the order of the stages; passes on to an observer what it should know."""

    def __init__(self, observer: Observer | None) -> None:
        self.observer = observer
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.observer.stage(name) if self.observer else nullcontext():
                yield
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 3)

    def searched(self, done: int, history: SearchHistory, *, total: int, n_passed: int) -> None:
        if self.observer:
            self.observer.search(done, total, int(history.patched[-1]), n_passed - int(history.intact[-1]))
