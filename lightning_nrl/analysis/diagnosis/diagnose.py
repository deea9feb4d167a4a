"""The diagnosis itself: one pass over known data, then small programmes on what was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.timing import Observer, StageTimer, in_milliseconds
from lightning_nrl.analysis.diagnosis._fixability import REQUIRED_MARGIN
from lightning_nrl.analysis.diagnosis._last_layer import LastLayer, analyze_last_layer, sample_places, untried_targets
from lightning_nrl.analysis.diagnosis._layer_capacity import layer_capacities, sketch_gradients
from lightning_nrl.analysis.diagnosis.diagnosis_result import Cost, Diagnosis, DoubtfulLabel, LayerCapacity, advise
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.head_features import HeadFeatures, collect_features, drawn
from lightning_nrl.evaluation.layers import last_linear, layers_of
from lightning_nrl.localization import TrainingRecord
from lightning_nrl.methods.budget import (
    CONVEX_SOLVES,
    LADDER_SEARCHES,
    LINEARIZED_PASSES,
    PASSES_PER_VISIT,
    POLISH_PASSES,
    SCORED_SHARE,
    VISITS_PER_SAMPLE,
)
from lightning_nrl.pipeline.input_checks import check_losses, check_sources, given_or_default
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import PATH_STRENGTHS
from lightning_nrl.search import ParticleSwarm

PASSES_AROUND_SEARCH = 4 + len(PATH_STRENGTHS)
"""Passes over the known data that any repair makes around its search: to collect, to record or localise, to count what
was found twice, and to count it at several strengths."""


class Timings(NamedTuple):
    """Seconds that were measured."""

    one_pass: float  # of the model over all known samples, by all ranks together
    head: float | None  # of the last Linear over all known samples; None where there is none
    alone: float | None  # a look at every target alone; None if that could not be done
    margins: bool  # whether the task has any: without them nothing can be done but swarm


def costs(pace: Timings, epochs: int | None = None) -> tuple[Cost, ...]:
    """A line for each method that can be used, the quickest first; without `epochs` training cannot go on."""
    around, swarm = PASSES_AROUND_SEARCH * pace.one_pass, ParticleSwarm()
    candidates = swarm.particles * swarm.iterations
    search = None if pace.head is None else SCORED_SHARE * candidates * pace.head
    found = []
    if search is not None:
        how = f"at most {candidates:,} candidates for the last Linear"
        found.append(Cost("swarm", around + search, how))
        if not pace.margins:
            found.append(Cost("auto", around + search, f"{how}; nothing else works without margins"))
    if pace.margins:
        if pace.alone is not None:
            found.append(Cost("convex", around + CONVEX_SOLVES * pace.alone, "exact programmes for the last Linear"))
        found.append(Cost("linearized", around + LINEARIZED_PASSES * pace.one_pass, "some steps of one layer"))
        fit = (epochs or VISITS_PER_SAMPLE) * PASSES_PER_VISIT * pace.one_pass + POLISH_PASSES * pace.one_pass
        how = f"{epochs} more epochs of training" if epochs else f"a fit of {VISITS_PER_SAMPLE} epochs"
        found.append(Cost("finetune-polish", around + fit, f"{how}, then a polish"))
        layer = LADDER_SEARCHES * (search or 0.0) + CONVEX_SOLVES * (pace.alone or 0.0)
        found.append(Cost("auto", around + fit + layer, f"searches of the layer, {how}, then a polish"))
    return tuple(sorted(found, key=lambda cost: cost.seconds))


MOST_NAMED = 10
"""Samples that a sentence names."""


def history_notes(record: TrainingRecord, results: SampleResults, doubts: Sequence[DoubtfulLabel]) -> tuple[str, ...]:
    """Sentences for a diagnosis; one that says so where no target is in the record.

    A target that was never right at any point, and whose neighbours agree with the model rather than with its label,
    most likely has a wrong label: what is mislabelled is learnt last (Toneva et al. 2019; Pleiss et al. 2020).
    """
    seen, never, lost = 0, [], 0
    for split in results.splits:
        if split not in record.splits:
            continue
        found = record.splits[split]
        places = {index: i for i, index in enumerate(found.index.tolist())}
        never_learned, forgotten = found.never_learned.tolist(), found.forgotten.tolist()
        for index in results.index[results.of(split)][results.targeted[results.of(split)]].tolist():
            if (place := places.get(index)) is not None:
                seen += 1
                never += [(split, index)] if never_learned[place] else []
                lost += forgotten[place] > 0
    if not seen:
        names = " and ".join(record.splits)
        return (f"The history of the training has no target: it records {names}.",)
    points = len(record.points)
    notes = [
        f"In the history of the training, {points} points, {len(never):,} of {seen:,} targets were never right, and "
        f"{lost:,} were forgotten at least once."
    ]
    doubted = [(doubt.split, doubt.id) for doubt in doubts if (doubt.split, doubt.id) in set(never)]
    if doubted:
        named = ", ".join(f"{split} {index}" for split, index in doubted[:MOST_NAMED])
        more = f" and {len(doubted) - MOST_NAMED:,} more" if len(doubted) > MOST_NAMED else ""
        notes.append(
            f"Never right, and their neighbours agree with the model: look first at the labels of {named}{more}."
        )
    return tuple(notes)


LAYER_TARGETS, LAYER_PASSED, LAYER_BATCH = 16, 64, 64
"""Targets and nearest passed samples that layers are compared on: medians over a few targets rank layers well."""


def diagnose_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    epochs: int | None = None,
    history: str | Path | TrainingRecord | None = None,
    observer: Observer | None = None,
) -> Diagnosis:
    """Says what can be known before a repair: what can be fixed, what stands in the way, which layer has room.

    It takes about as long as two passes over the known data. The model is left as found.

    Args:
        model: the trained model on its device, as for `repair_module`; it runs in evaluation mode.
        known: data that a repair may look at.
        settings: the target and the seed; the rest does not matter here.
        epochs: how long the model was trained, if that is known; for the cost of training on.
        history: the folder that `TrainingHistory` has written: notes say which targets were never learnt, which were
            forgotten, and which of the former have a label that looks wrong.
        observer: is told how it goes.

    Raises:
        ConfigurationError: the data, the target, the task or the history cannot be used.
        EvaluationError: the model gives losses that are not finite; the samples are named.
    """
    settings, evaluator, clock = given_or_default(settings), Evaluator.of(model), StageTimer(observer)
    check_sources(known, (), settings)
    record = TrainingRecord.read(history) if isinstance(history, (str, Path)) else history
    head, layer = last_linear(evaluator.model, evaluator.called)
    with preserve(evaluator.model):
        with clock.stage("collect"):
            seen = collect_features(evaluator, known, layer, settings.target)
        results = seen.results
        check_losses(results)
        last = _last_layer(layer, seen, known, settings.seed, clock)
        with clock.stage("layers"):
            chosen = drawn(known, results, _near(results, settings.seed), LAYER_BATCH)
            rooms = _rooms(evaluator, chosen, results, settings.seed)
        pace = _pace(results, seen, layer, last, evaluator.collective)
    notes = [f"What the last layer can fix, and neighbourhoods: {last}"] if isinstance(last, str) else []
    if seen.features is not None and len(seen.features.rows) < len(results):
        some = f"{len(seen.features.rows):,} of {len(results):,} known samples, those nearest to failing"
        notes.append(f"What the last layer can fix, and neighbourhoods: only {some}, were looked at.")
    notes += [] if rooms else ["Room by layer: there is no target, no margin or no layer to compare."]
    found = Diagnosis(
        advice="",
        target=str(settings.target),
        task=str(evaluator.task),
        known={
            "samples": len(results),
            "passed": int(results.passed.sum()),
            "failed": int((~results.passed).sum()),
            "targeted": int(results.targeted.sum()),
        },
        targets=untried_targets(results),
        layers=rooms,
        costs=costs(pace, epochs),
        notes=tuple(notes),
        seconds=in_milliseconds(clock.seconds),
    )
    if isinstance(last, LastLayer):
        targets, binding, check, mixing, doubts, _ = last
        found = replace(found, head=head, targets=targets, binding=binding, check=check, mixing=mixing, doubts=doubts)
    if record is not None:
        found = replace(found, notes=(*found.notes, *history_notes(record, results, found.doubts)))
    return replace(found, advice=advise(found))


def _last_layer(
    layer: nn.Linear | None, seen: HeadFeatures, known: Sequence[Source], seed: int, clock: StageTimer
) -> LastLayer | str:
    """What the last layer can do, or why that cannot be said."""
    if layer is None:
        return "the model has no Linear layer."
    if seen.features is None:
        return "the last Linear does not give the logits."
    failing = torch.zeros(len(seen.results), dtype=torch.bool)
    for source in known:
        failing[seen.results.of(source.split)] = source.failed
    return analyze_last_layer(layer, seen.features, seen.results, failing, seed, clock)


def _near(results: SampleResults, seed: int) -> Tensor:
    """Rows of some targets, and of the passed samples that are nearest to failing."""
    targets = results.targeted.nonzero().flatten()
    targets = targets[sample_places(len(targets), LAYER_TARGETS, torch.Generator().manual_seed(seed))]
    nearness = torch.where(results.passed, results.margin.nan_to_num(torch.inf), torch.inf)
    passed = nearness.argsort(stable=True)[: min(LAYER_PASSED, int(results.passed.sum()))]
    return torch.cat([targets, passed])


def _rooms(
    evaluator: Evaluator, chosen: Iterable[tuple[Batch, Tensor]], results: SampleResults, seed: int
) -> tuple[LayerCapacity, ...]:
    if not results.targeted.any() or bool(results.margin[results.targeted].isnan().all()):
        return ()
    layers = layers_of(evaluator.model)
    sketches = sketch_gradients(evaluator, chosen, seed=seed)
    norms = {name: max(float(layer.weight.detach().float().norm()), 1e-12) for name, layer in layers.items()}
    rooms = layer_capacities(sketches, results.targeted[sketches.rows], norms, REQUIRED_MARGIN)
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
    results: SampleResults, seen: HeadFeatures, layer: nn.Linear | None, last: LastLayer | str, collective: Collective
) -> Timings:
    """What was measured by the first rank, so that all tell the same."""
    n = len(results)
    head = math.nan if layer is None else n / collective.world_size * _head_seconds(layer)
    alone = last.seconds if isinstance(last, LastLayer) else math.nan
    measured = torch.tensor([seen.seconds, head, alone], dtype=torch.float64).nan_to_num(-1.0)
    one_pass, head, alone = collective.agreed(measured).tolist()
    margins = not bool(results.margin.isnan().all())
    return Timings(one_pass, None if head < 0 else head, None if alone < 0 else alone, margins)


@torch.no_grad()
def _head_seconds(layer: nn.Linear, n: int = 1024) -> float:
    """What a Linear takes for a sample."""
    inputs = layer.weight.new_zeros(n, layer.in_features)
    layer(inputs).sum().item()  # the first call may be slow
    start = time.perf_counter()
    layer(inputs).sum().item()
    return (time.perf_counter() - start) / n
