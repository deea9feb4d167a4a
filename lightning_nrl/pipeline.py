"""The core: known data in, report and weights out. Knows nothing of Lightning and never writes to the live model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_nrl.account import Account
from lightning_nrl.batches import Batch, Source
from lightning_nrl.collective import Collective
from lightning_nrl.errors import EmptyLocalizationError, EvidenceError, explain
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
    """Collects evidence, localises, searches and judges. The model is left as found.

    Args:
        model: the trained model, in evaluation mode, on its device.
        known: data that the repair may look at; all of it is what the gate judges by.
        settings: what to repair and how.
        unseen: data that is only counted, before and after an accepted repair.
        task: what passed and loss mean; None: `Multiclass`.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the data; each ends with the same outcome.
        observer: is told how it goes.

    Returns:
        The outcome. That there is nothing to repair, or no way to, is a report, not an exception.

    Raises:
        ConfigurationError: the layer, the data or the target cannot be used.
        EvidenceError: the original model gives losses that are not finite; the samples are named.
    """
    settings, task = settings or Settings(), task or Multiclass()
    collective, clock = collective or Collective(), _Clock(observer)
    space = find_sites(model, settings.layer, include_bias=settings.localizer.include_bias)
    see = partial(collect, task=task, context=context, collective=collective)
    with clock.stage("collect"):
        before = see(model, known, target=settings.target)
        unseen_before = see(model, unseen, target=settings.target) if unseen else None
    _check_losses(before)
    account = Account(model, space, settings, task, before, unseen_before, clock.seconds)
    if not before.targeted.any():
        return Outcome(account.closed("nothing to repair", _nothing(before, known, settings.target)))
    if not before.passed.any():
        return _given_up(account, "no known sample passes, so there is nothing to keep and nothing to compare with.")
    passed = _passed_rows(before, known, settings)
    with clock.stage("localize"):
        recording = record(
            model, _rows(known, before), space, task, before.targeted | before.passed, context=context,
            budget=settings.budget,
        )  # fmt: skip
        try:
            localization = settings.localizer(
                recording, task, failed=before.targeted, passed=before.passed, collective=collective
            )
        except EmptyLocalizationError as error:
            return _given_up(account, str(error))
    with clock.stage("search"):
        result = _search(recording, localization, before.targeted, passed, task, settings, collective, clock)
    account = account.searched(localization, result, int(passed.sum()))
    values = _agreed(result.values, collective)
    old = space.flat()[localization.weights.to(space.device)]
    if torch.equal(values.to(old.dtype), old):
        reason = "the search found nothing better than the original weights."
        return Outcome(account.closed("not repaired", reason))
    parameters = space.changed(localization.weights, values)
    repaired = partial(_call, model, parameters)
    with clock.stage("judge"):
        after = see(repaired, known)
        verdict = judge(before, after, settings.gate)
        unseen_after = see(repaired, unseen) if unseen and verdict.accepted else None
    report = account.judged(verdict, parameters, after, unseen_after)
    return Outcome(report, parameters if verdict.accepted else None, (values - old).float().cpu())


def _search(
    recording: Recording,
    localization: Localization,
    failed: Tensor,
    passed: Tensor,
    task: Task,
    settings: Settings,
    collective: Collective,
    clock: _Clock,
) -> SearchResult:
    flat = recording.space.flat()
    scorer = make_scorer(
        recording, localization.weights, failed, passed, task, collective=collective, budget=settings.budget
    )
    return search(
        scorer,
        flat[localization.weights.to(flat.device)],
        spread=Spread.of(flat),
        fitness=settings.fitness,
        settings=settings.method,
        seed=settings.seed,
        on_progress=partial(clock.searched, total=settings.method.iterations, n_passed=int(passed.sum())),
    )


def _call(model: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, dict(parameters), args, kwargs)


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
