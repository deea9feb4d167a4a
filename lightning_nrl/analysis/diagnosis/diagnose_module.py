"""The diagnosis itself: one pass over known data, then small programmes on what was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_nrl._model.layers import last_linear, layers_of
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.diagnosis.advice import advise
from lightning_nrl.analysis.diagnosis.cost_estimates import Timings, costs
from lightning_nrl.analysis.diagnosis.diagnosis_result import (
    Binding,
    Cost,
    Diagnosis,
    DoubtfulLabel,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
    Verdict,
)
from lightning_nrl.analysis.diagnosis.fixability import REQUIRED_MARGIN
from lightning_nrl.analysis.diagnosis.last_layer import LastLayer, analyze_last_layer, sample_places
from lightning_nrl.analysis.diagnosis.layer_capacity import layer_capacities, sketch_gradients
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.head_features import HeadFeatures, collect_features, drawn
from lightning_nrl.evaluation.neighbors import NEIGHBOURS
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.pipeline.input_checks import check_losses, check_sources, given_or_default
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.tasks import Task

__all__ = ["diagnose_module"]

LAYER_TARGETS, LAYER_PASSED, LAYER_BATCH = 16, 64, 64
"""Targets and nearest passed samples that layers are compared on: medians over a few targets rank layers well."""


def diagnose_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    epochs: int | None = None,
    observer: Observer | None = None,
) -> Diagnosis:
    """Says what can be known before a repair: what can be fixed, what stands in the way, which layer has room.

    It takes about as long as two passes over the known data. The model is left as found.

    Args:
        model: the trained model on its device, as for `repair_module`; it runs in evaluation mode.
        known: data that a repair may look at.
        settings: the target and the seed; the rest does not matter here.
        epochs: how long the model was trained, if that is known; for the cost of training on.
        observer: is told how it goes.

    Raises:
        ConfigurationError: the data, the target or the task cannot be used.
        EvaluationError: the model gives losses that are not finite; the samples are named.
    """
    settings, evaluator, clock = given_or_default(settings), Evaluator.of(model), StageTimer(observer)
    check_sources(known, (), settings)
    head, layer = last_linear(evaluator.model)
    with preserve(evaluator.model):
        with clock.stage("collect"):
            seen = collect_features(evaluator, known, layer, settings.target)
        evidence = seen.evidence
        check_losses(evidence)
        last = _last_layer(layer, seen, known, settings.seed, clock)
        with clock.stage("layers"):
            chosen = drawn(known, evidence, _near(evidence, settings.seed), LAYER_BATCH)
            rooms = _rooms(evaluator, chosen, evidence, settings.seed)
        pace = _pace(evidence, seen, layer, last, evaluator.collective)
    notes = [f"What the last layer can fix, and neighbourhoods: {last}"] if isinstance(last, str) else []
    if seen.features is not None and len(seen.features.rows) < len(evidence):
        some = f"{len(seen.features.rows):,} of {len(evidence):,} known samples, those nearest to failing"
        notes.append(f"What the last layer can fix, and neighbourhoods: only {some}, were looked at.")
    notes += [] if rooms else ["Room by layer: there is no target, no margin or no layer to compare."]
    return _diagnosis(evidence, settings, evaluator.task, head, last, rooms, costs(pace, epochs), clock, tuple(notes))


def _last_layer(
    layer: nn.Linear | None, seen: HeadFeatures, known: Sequence[Source], seed: int, clock: StageTimer
) -> LastLayer | str:
    """What the last layer can do, or why that cannot be said."""
    if layer is None:
        return "the model has no Linear layer."
    if seen.features is None:
        return "the last Linear does not give the logits."
    failing = torch.zeros(len(seen.evidence), dtype=torch.bool)
    for source in known:
        failing[seen.evidence.of(source.split)] = source.failed
    return analyze_last_layer(layer, seen.features, seen.evidence, failing, seed, clock)


def _near(evidence: SampleResults, seed: int) -> Tensor:
    """Rows of some targets, and of the passed samples that are nearest to failing."""
    targets = evidence.targeted.nonzero().flatten()
    targets = targets[sample_places(len(targets), LAYER_TARGETS, torch.Generator().manual_seed(seed))]
    nearness = torch.where(evidence.passed, evidence.margin.nan_to_num(torch.inf), torch.inf)
    passed = nearness.argsort(stable=True)[: min(LAYER_PASSED, int(evidence.passed.sum()))]
    return torch.cat([targets, passed])


def _rooms(
    evaluator: Evaluator, chosen: Iterable[tuple[Batch, Tensor]], evidence: SampleResults, seed: int
) -> tuple[LayerCapacity, ...]:
    if not evidence.targeted.any() or bool(evidence.margin[evidence.targeted].isnan().all()):
        return ()
    layers = layers_of(evaluator.model)
    sketches = sketch_gradients(evaluator, chosen, seed=seed)
    norms = {name: max(float(layer.weight.detach().float().norm()), 1e-12) for name, layer in layers.items()}
    rooms = layer_capacities(sketches, evidence.targeted[sketches.rows], norms, REQUIRED_MARGIN)
    return tuple(
        LayerCapacity(
            layer=name,
            kind=type(layers[name]).__name__,
            weights=layers[name].weight.numel(),
            room=round(float(own.share.mean()), 4),
            change=float(own.change.median()),
        )
        for name, own in rooms.items()
    )


def _pace(
    evidence: SampleResults, seen: HeadFeatures, layer: nn.Linear | None, last: LastLayer | str, collective: Collective
) -> Timings:
    """What was measured by the first rank, so that all tell the same."""
    n = len(evidence)
    head = math.nan if layer is None else n / collective.world_size * _head_seconds(layer)
    alone = last.seconds if isinstance(last, LastLayer) else math.nan
    measured = torch.tensor([seen.seconds, head, alone], dtype=torch.float64).nan_to_num(-1.0)
    one_pass, head, alone = collective.agreed(measured).tolist()
    margins = not bool(evidence.margin.isnan().all())
    return Timings(one_pass, None if head < 0 else head, None if alone < 0 else alone, margins)


@torch.no_grad()
def _head_seconds(layer: nn.Linear, n: int = 1024) -> float:
    """What a Linear takes for a sample."""
    inputs = layer.weight.new_zeros(n, layer.in_features)
    layer(inputs).sum().item()  # the first call may be slow
    start = time.perf_counter()
    layer(inputs).sum().item()
    return (time.perf_counter() - start) / n


def _diagnosis(
    evidence: SampleResults,
    settings: Settings,
    task: Task,
    head: str | None,
    last: LastLayer | str,
    rooms: tuple[LayerCapacity, ...],
    prices: tuple[Cost, ...],
    clock: StageTimer,
    notes: tuple[str, ...],
) -> Diagnosis:
    """The findings as a diagnosis."""
    counts = {
        "samples": len(evidence),
        "passed": int(evidence.passed.sum()),
        "failed": int((~evidence.passed).sum()),
        "targeted": int(evidence.targeted.sum()),
    }
    some = last if isinstance(last, LastLayer) else None
    targets = _targets(evidence, some)
    check = some.check if some else None
    mixing = _mixing(some) if some else None
    doubts = _doubts(evidence, some) if some else ()
    head = head if some else None
    return Diagnosis(
        advice=advise(counts, targets, check, mixing, doubts, rooms, head, prices),
        target=str(settings.target),
        task=str(task),
        known=counts,
        head=head,
        targets=targets,
        binding=_binding(evidence, some) if some else (),
        check=check,
        mixing=mixing,
        doubts=doubts,
        layers=rooms,
        costs=prices,
        notes=notes,
        seconds=dict(clock.seconds),
    )


class _Places:
    """Rows of the evidence as splits and positions in their data sets."""

    def __init__(self, evidence: SampleResults) -> None:
        self.split = [split for split, size in zip(evidence.splits, evidence.sizes, strict=True) for _ in range(size)]
        self.id = evidence.index.tolist()


def _targets(evidence: SampleResults, last: LastLayer | None) -> tuple[TargetFinding, ...]:
    rows, places = evidence.targeted.nonzero().flatten().tolist(), _Places(evidence)
    verdicts: list[Verdict] = ["not tried"] * len(rows)
    change, agreement = [math.nan] * len(rows), [math.nan] * len(rows)
    if last is not None:
        agreement = last.near.agreement.tolist()
        for at, yes, no, size in zip(
            last.tried.tolist(),
            last.fixability.fixable.tolist(),
            last.fixability.unfixable.tolist(),
            (last.fixability.size / last.fixability.limit).tolist(),
            strict=True,
        ):
            verdicts[at], change[at] = "yes" if yes else "no" if no else "undecided", size
    return tuple(
        TargetFinding(
            split=places.split[row],
            id=places.id[row],
            label=int(evidence.label[row]),
            prediction=int(evidence.prediction[row]),
            margin=float(evidence.margin[row]),
            fixable=verdict,
            change=size,
            agreement=agreed,
        )
        for row, verdict, size, agreed in zip(rows, verdicts, change, agreement, strict=True)
    )


def _binding(evidence: SampleResults, last: LastLayer) -> tuple[Binding, ...]:
    count, places = last.fixability.binds.sum(0), _Places(evidence)
    order = count.argsort(descending=True, stable=True)[: int((count > 0).sum())]
    found = []
    for row, targets in zip(last.passed[order].tolist(), count[order].tolist(), strict=True):
        label, margin = int(evidence.label[row]), float(evidence.margin[row])
        found.append(Binding(places.split[row], places.id[row], label, margin, targets))
    return tuple(found)


def _mixing(last: LastLayer) -> NeighbourMixing:
    k = min(NEIGHBOURS, max(1, len(last.passed) - 1))
    shares = (near.agreement[~near.agreement.isnan()] for near in (last.near, last.near_passed))
    groups = ((share * k).round().long().bincount(minlength=k + 1).tolist() for share in shares)
    return NeighbourMixing(k, *(tuple(group) for group in groups))


def _doubts(evidence: SampleResults, last: LastLayer) -> tuple[DoubtfulLabel, ...]:
    places, found = _Places(evidence), []
    for at in last.doubted.nonzero().flatten().tolist():
        row = int(last.targets[at])
        label, prediction = int(evidence.label[row]), int(evidence.prediction[row])
        agreed, lead = float(last.near.share[at]), float(last.lead[at])
        found.append(DoubtfulLabel(places.split[row], places.id[row], label, prediction, agreed, lead))
    return tuple(sorted(found, key=lambda doubt: (-doubt.agreed, -doubt.lead)))
