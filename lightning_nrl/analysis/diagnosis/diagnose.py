"""Runs a diagnosis: passes over the known data, analyses of the last layer and of all layers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.timing import Observer, StageTimer, rounded_seconds
from lightning_nrl.analysis.diagnosis._last_layer import (
    LastLayer,
    analyze_last_layer,
    sample_places,
    untried_targets,
)
from lightning_nrl.analysis.diagnosis.advice import advise, estimate_costs
from lightning_nrl.analysis.diagnosis.diagnosis import Diagnosis
from lightning_nrl.analysis.diagnosis.layer_capacity import layer_capacities
from lightning_nrl.data import Source
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.head_features import HeadFeatures, collect_features, row_batches
from lightning_nrl.evaluation.layers import last_linear
from lightning_nrl.pipeline import Settings
from lightning_nrl.pipeline.input_checks import check_losses, check_sources, given_or_default
from lightning_nrl.records import Provenance

# For the comparison of layers; medians need few samples.
LAYER_TARGETS = 16
LAYER_PASSED = 64
LAYER_BATCH = 64
TIMED_ROWS = 1024  # of the last Linear


def diagnose_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    epochs: int | None = None,
    observer: Observer | None = None,
) -> Diagnosis:
    """Predicts which failures a repair can fix, what prevents fixes, and which layers need least.

    Takes about as long as two passes over the known data. The model stays unchanged.

    Model and data are as in `repair_module`. Of the settings only target and seed matter. `epochs`,
    the length of the model's training, serves to estimate the cost of further training.

    Raises:
        ConfigurationError: the data, the target or the task cannot be used.
        EvaluationError: the model gives losses that are not finite. The error names the samples.
    """
    settings = given_or_default(settings)
    evaluator = Evaluator.of(model)
    clock = StageTimer(observer)
    check_sources(known, (), settings)
    head, layer = last_linear(evaluator.model, evaluator.called)
    with preserve_state(evaluator.model):
        with clock.stage("collect"):
            seen = collect_features(evaluator, known, layer, settings.target)
        results = seen.results
        check_losses(results)
        last = analyze_last_layer(layer, seen, known, settings.seed, clock)
        notes = []
        about = "What the last layer can fix, and neighbourhoods"
        if isinstance(last, str):
            notes.append(f"{about}: {last}")
            last, head = LastLayer(untried_targets(results)), None
        if seen.features is not None and len(seen.features.rows) < len(results):
            notes.append(
                f"{about}: only {len(seen.features.rows):,} of {len(results):,} known samples, "
                "those nearest to failing, were looked at."
            )
        with clock.stage("layers"):
            batches = row_batches(
                known, results, _rows_for_layers(results, settings.seed), LAYER_BATCH
            )
            layers = layer_capacities(evaluator, batches, results, settings.seed)
        if not layers:
            notes.append("Change by layer: there is no target, no margin or no layer to compare.")
        diagnosis = Diagnosis(
            advice="",
            target=str(settings.target),
            task=str(evaluator.task),
            known={
                "samples": len(results),
                "passed": int(results.passed.sum()),
                "failed": int((~results.passed).sum()),
                "targeted": int(results.targeted.sum()),
            },
            head=head,
            targets=last.targets,
            binding=last.binding,
            check=last.check,
            mixing=last.mixing,
            doubts=last.doubts,
            layers=layers,
            costs=_costs(evaluator, seen, layer, last.seconds, epochs),
            notes=tuple(notes),
            seconds=rounded_seconds(clock.seconds),
            provenance=Provenance.of(evaluator.model, results),
        )
    return replace(diagnosis, advice=advise(diagnosis))


def _rows_for_layers(results: SampleResults, seed: int) -> Tensor:
    """Chooses some targets at random, and the passed samples nearest to failing."""
    targets = results.targeted.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    targets = targets[sample_places(len(targets), LAYER_TARGETS, generator)]
    nearness = torch.where(results.passed, results.margin.nan_to_num(torch.inf), torch.inf)
    n_passed = min(LAYER_PASSED, int(results.passed.sum()))
    return torch.cat([targets, nearness.argsort(stable=True)[:n_passed]])


@torch.no_grad()
def _costs(
    evaluator: Evaluator,
    seen: HeadFeatures,
    layer: nn.Linear | None,
    alone: float,
    epochs: int | None,
) -> dict[str, float]:
    """Estimates costs from times on the first rank."""
    head = math.nan
    if layer is not None:
        inputs = layer.weight.new_zeros(TIMED_ROWS, layer.in_features)
        layer(inputs).sum().item()  # warm up
        start = time.perf_counter()
        layer(inputs).sum().item()
        n_batches = len(seen.results) / TIMED_ROWS / evaluator.collective.world_size
        head = n_batches * (time.perf_counter() - start)
    one_pass, head, alone = evaluator.collective.agreed(
        torch.tensor([seen.seconds, head, alone], dtype=torch.float64)
    ).tolist()
    return estimate_costs(one_pass, head, alone, seen.results.has_margins, epochs)
