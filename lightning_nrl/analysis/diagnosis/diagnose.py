"""Runs a diagnosis: one pass over known data, an analysis of the last layer and of all layers,
costs, and advice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import no_autocast
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.formatting import rough_percent, rough_time
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.timing import Observer, StageTimer, rounded_seconds
from lightning_nrl.analysis.diagnosis._last_layer import (
    REQUIRED_MARGIN,
    LastLayer,
    analyze_last_layer,
    sample_places,
    untried_targets,
)
from lightning_nrl.analysis.diagnosis.diagnosis import Diagnosis
from lightning_nrl.analysis.diagnosis.findings import Cost, HeldOutCheck, LayerCapacity
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.head_features import HeadFeatures, collect_features, row_batches
from lightning_nrl.evaluation.layer_gradients import (
    LayerCall,
    is_by_sample,
    margin_calls,
    sample_gradients,
)
from lightning_nrl.evaluation.layers import Layer, last_linear, layers_of
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import budget
from lightning_nrl.methods.solvers.qp import solve_dual
from lightning_nrl.pipeline.input_checks import check_losses, check_sources, given_or_default
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import PATH_STRENGTHS
from lightning_nrl.records import Provenance
from lightning_nrl.search import ParticleSwarm

SKETCH_SIZE = 16_384  # gradients of layers with more weights are projected to this size at random
MAX_RELATIVE_CHANGE = 10.0  # relative to the layer's norm; larger changes count as impossible


@torch.no_grad()
def layer_capacities(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], results: SampleResults, seed: int
) -> tuple[LayerCapacity, ...]:
    """Estimates what a change of each layer can do. Returns `()` if no layer or no target with a
    margin exists.

    `batches` has this rank's part of the samples to use: pairs of a batch and its samples' rows in
    `results`.
    """
    if not results.targeted.any() or bool(results.margin[results.targeted].isnan().all()):
        return ()
    layers = layers_of(evaluator.model)
    at, margin, gradients = _gradients(evaluator, layers, batches, seed)
    targets, margin = results.targeted[at], margin.double()
    t, p = targets.nonzero().flatten(), (~targets).nonzero().flatten()
    if not gradients or not len(t):
        return ()
    rows = torch.cat([t[:, None], p.expand(len(t), -1)], 1)
    asked = (
        torch.where(targets, REQUIRED_MARGIN, (0.5 * margin).clamp_max(REQUIRED_MARGIN)) - margin
    )
    grams, bounds = [], []
    for name, gradient in gradients.items():
        norm = max(float(layers[name].weight.detach().float().norm()), 1e-12)
        # The matrices are so small that a CPU is as fast. Rows get unit length so that one
        # tolerance suits all.
        length = gradient.flatten(1).float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        unit = gradient.flatten(1).float() / length[:, None]
        gram, length = (unit @ unit.T).cpu().double(), length.cpu().double() * norm
        grams.append(gram[rows[:, :, None], rows[:, None, :]])
        bounds.append((asked / length)[rows])
    gram, bound = torch.cat(grams), torch.cat(bounds)
    among, against = gram[:, 1:, 1:].contiguous(), -gram[:, 1:, 0]
    lost = solve_dual(among, against).value if len(p) else torch.zeros(len(gram))
    needed = solve_dual(gram, bound, max_value=0.5 * MAX_RELATIVE_CHANGE**2).value
    room, change = (1 - 2 * lost).clamp(0, 1).sqrt().float(), (2 * needed.clamp_min(0)).sqrt()
    change = torch.where(change > MAX_RELATIVE_CHANGE, torch.inf, change).float()
    return tuple(
        LayerCapacity(
            name,
            type(layers[name]).__name__,
            layers[name].weight.numel(),
            room=round(float(own_room.mean()), 4),
            change=float(own_change.median()),
        )
        for name, own_room, own_change in zip(
            gradients, room.split(len(t)), change.split(len(t)), strict=True
        )
    )


def _gradients(
    evaluator: Evaluator,
    layers: Mapping[str, Layer],
    batches: Iterable[tuple[Batch, Tensor]],
    seed: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns rows, margins and the margins' gradients in each layer, for all ranks' samples by
    ascending row.
    """
    collective = evaluator.collective
    rows, margins = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch, at in batches:
        margin, calls = margin_calls(
            evaluator.model, layers, batch, evaluator.task, evaluator.context
        )
        rows.append(at)
        margins.append(margin.detach().float().cpu())
        for name in list(parts):
            if is_by_sample(calls[name], len(at)):
                parts[name].append(_sketch(layers[name], calls[name], len(at), seed))
            else:
                del parts[name]
    usable = [not collective.any(bool(rows) and name not in parts) for name in layers]
    found = {
        name: _gather(parts.get(name, []), collective)
        for name, use in zip(layers, usable, strict=True)
        if use
    }
    all_rows, all_margins = (_gather(x, collective) for x in (rows, margins))
    order = all_rows.argsort()
    return (
        all_rows[order],
        all_margins[order],
        {name: x[order.to(x.device)] for name, x in found.items() if len(x)},
    )


def _sketch(layer: Layer, calls: Sequence[LayerCall], n: int, seed: int) -> Tensor:
    """Returns the gradient of each sample's margin in the layer's weights, projected to at most `n
    x SKETCH_SIZE`.
    """
    size = layer.weight.numel()
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(SKETCH_SIZE, (size,), generator=generator).to(layer.weight.device)
    sign = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(
        layer.weight.device, torch.float32
    )
    parts = []
    with no_autocast(layer.weight.device):
        for weight, _ in sample_gradients(layer, calls, n):
            gradient = weight.flatten(1)
            if size > SKETCH_SIZE:
                gradient = torch.zeros(
                    len(gradient), SKETCH_SIZE, device=gradient.device
                ).index_add_(1, bucket, gradient.float() * sign)
            parts.append(gradient)
    return torch.cat(parts)


def _gather(parts: Sequence[Tensor], collective: Collective) -> Tensor:
    mine = torch.cat(list(parts)) if parts else torch.zeros(0)
    shares = [x for x in collective.gather(mine) if len(x)]
    return torch.cat(shares) if shares else mine


LAYER_TARGETS, LAYER_PASSED, LAYER_BATCH = (
    16,
    64,
    64,
)  # for the comparison of layers: medians need few samples
PASSES_AROUND_SEARCH = 4 + len(
    PATH_STRENGTHS
)  # evaluate, localise, count twice, and count at each strength


def diagnose_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    epochs: int | None = None,
    observer: Observer | None = None,
) -> Diagnosis:
    """Predicts which failures a repair can fix, which samples prevent fixes, and which layers could
    be
    repaired.

    Takes about as long as two passes over the known data. The model stays unchanged.

    Model and data are as in `repair_module`. Of the settings only target and seed matter. `epochs`,
    the length of the model's training, serves to estimate the cost of further training.

    Raises:
        ConfigurationError: the data, the target or the task cannot be used.
        EvaluationError: the model gives losses that are not finite. The error names the samples.
    """
    settings, evaluator, clock = (
        given_or_default(settings),
        Evaluator.of(model),
        StageTimer(observer),
    )
    check_sources(known, (), settings)
    head, layer = last_linear(evaluator.model, evaluator.called)
    with preserve_state(evaluator.model):
        with clock.stage("collect"):
            seen = collect_features(evaluator, known, layer, settings.target)
        results = seen.results
        check_losses(results)
        last = analyze_last_layer(layer, seen, known, settings.seed, clock)
        with clock.stage("layers"):
            chosen = row_batches(known, results, _near(results, settings.seed), LAYER_BATCH)
            layers = layer_capacities(evaluator, chosen, results, settings.seed)
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
            layers=layers,
            costs=costs(*_measure_times(seen, layer, last, evaluator.collective), epochs),
            notes=_notes(results, seen, last, layers),
            seconds=rounded_seconds(clock.seconds),
            provenance=Provenance.of(evaluator.model, results),
        )
    if isinstance(last, LastLayer):
        targets, binding, check, mixing, doubts, _ = last
        found = replace(
            found,
            head=head,
            targets=targets,
            binding=binding,
            check=check,
            mixing=mixing,
            doubts=doubts,
        )
    return replace(found, advice=advise(found))


def _near(results: SampleResults, seed: int) -> Tensor:
    targets = results.targeted.nonzero().flatten()
    targets = targets[
        sample_places(len(targets), LAYER_TARGETS, torch.Generator().manual_seed(seed))
    ]
    nearness = torch.where(results.passed, results.margin.nan_to_num(torch.inf), torch.inf)
    passed = nearness.argsort(stable=True)[: min(LAYER_PASSED, int(results.passed.sum()))]
    return torch.cat([targets, passed])


def _notes(
    results: SampleResults,
    seen: HeadFeatures,
    last: LastLayer | str,
    layers: Sequence[LayerCapacity],
) -> tuple[str, ...]:
    about = "What the last layer can fix, and neighbourhoods"
    notes = [f"{about}: {last}"] if isinstance(last, str) else []
    if seen.features is not None and len(seen.features.rows) < len(results):
        some = f"{len(seen.features.rows):,} of {len(results):,} known samples, those nearest to failing"
        notes.append(f"{about}: only {some}, were looked at.")
    if not layers:
        notes.append("Room by layer: there is no target, no margin or no layer to compare.")
    return tuple(notes)


@torch.no_grad()
def _measure_times(
    seen: HeadFeatures, layer: nn.Linear | None, last: LastLayer | str, collective: Collective
) -> tuple[float, float, float, bool]:
    """Returns the first rank's seconds for the model, the last Linear and all fixes, and True if
    there is no margin.
    """
    head = math.nan
    if layer is not None:
        inputs = layer.weight.new_zeros(1024, layer.in_features)
        layer(inputs).sum().item()  # warm up
        start = time.perf_counter()
        layer(inputs).sum().item()
        head = (time.perf_counter() - start) / 1024 * len(seen.results) / collective.world_size
    alone = last.seconds if isinstance(last, LastLayer) else math.nan
    measured = torch.tensor([seen.seconds, head, alone], dtype=torch.float64)
    one_pass, head, alone = collective.agreed(measured).tolist()
    return one_pass, head, alone, bool(seen.results.margin.isnan().all())


def costs(
    one_pass: float, head: float, alone: float, without_margins: bool, epochs: int | None = None
) -> tuple[Cost, ...]:
    """Estimates the seconds of each method, in ascending order. Leaves out methods whose time is
    unknown.

    `one_pass`, `head` and `alone` are the measured seconds of a pass over the known data, of the
    last Linear in such a pass, and of the fixes of all targets (NaN: unknown). `epochs` is the
    length of the model's training.
    """
    around, swarm = PASSES_AROUND_SEARCH * one_pass, ParticleSwarm()
    candidates = swarm.particles * swarm.iterations
    search = budget.SCORED_SHARE * candidates * head
    how = f"at most {candidates:,} candidates for the last Linear"
    found = [Cost("swarm", around + search, how)]
    if without_margins:
        found.append(Cost("auto", around + search, f"{how}; nothing else works without margins"))
    else:
        found.append(
            Cost(
                "convex",
                around + budget.CONVEX_SOLVES * alone,
                "convex problems for the last Linear",
            )
        )
        found.append(
            Cost(
                "linearized",
                around + budget.LINEARIZED_PASSES * one_pass,
                "steps that change one layer",
            )
        )
        fit = (
            (epochs or budget.LEAST_EPOCHS) * budget.FORWARD_BACKWARD + budget.POLISH_PASSES
        ) * one_pass
        how = (
            f"{epochs} more epochs of training"
            if epochs
            else f"a fit of {budget.LEAST_EPOCHS} epochs"
        )
        found.append(Cost("finetune-polish", around + fit, f"{how}, then a polish"))
        parts = (budget.LADDER_SEARCHES * search, budget.CONVEX_SOLVES * alone)
        layer = sum(part for part in parts if not math.isnan(part))
        found.append(
            Cost("auto", around + fit + layer, f"searches of the layer, {how}, then a polish")
        )
    return tuple(
        sorted(
            (cost for cost in found if not math.isnan(cost.seconds)), key=lambda cost: cost.seconds
        )
    )


DOUBTED_SHARE = (
    0.2  # if at least this share of targets has a doubtful label, the advice begins with labels
)
MIN_EXCHANGE_RATE = 2.0  # the last layer is advised only if its fixes repair this many other targets per broken sample
MAX_CHANGE_RATIO = 4.0  # the last layer is advised only if it needs at most this many times the easiest layer's change
MAX_SMALL_CHANGE = (
    0.5  # relative to a layer's norm; first-order estimates are invalid for larger changes
)


def advise(found: Diagnosis) -> str:
    """Advises which method to use, or to get data. If many labels are doubtful, advises to look at
    them first.
    """
    if not found.known["targeted"]:
        return "Nothing to repair: no failed sample is in the target."
    if not found.known["passed"]:
        return "Get data: no known sample passes, so there is nothing to keep and nothing to compare with."
    if all(math.isnan(target.margin) for target in found.targets):
        return "Use method='auto', which is the swarm here: the task has no margins, so little can be predicted."
    n, doubts = found.known["targeted"], len(found.doubts)
    if doubts < max(1, DOUBTED_SHARE * n):
        return _method(found)
    return (
        f"Look at labels first: those of {doubts:,} of {n:,} targets may be wrong, since neighbours and model "
        f"agree on another class. Then: {_method(found)}"
    )


def _method(found: Diagnosis) -> str:
    head, check, best, mixing = (
        f"the last layer ({found.head})",
        found.check,
        found.easiest_layer,
        found.mixing,
    )
    times = {cost.method: rough_time(cost.seconds) for cost in found.costs}
    own = next((layer for layer in found.layers if layer.layer == found.head), None)
    alone, tried = found.count("yes"), len(found.targets) - found.count("not tried")
    last = " ".join((_alone(alone, tried, check), _change(own, best))).strip()
    against = ""
    if 2 * alone <= tried:
        against = f"{head} is not enough"
    elif check is None:
        against = f"what {head} would break on other data is not known"
    elif check.rate < MIN_EXCHANGE_RATE:
        against = f"{head} would break too much on other data"
    elif own is not None and best is not None and own.change > MAX_CHANGE_RATIO * best.change:
        against = f"{head} would have to change much more than other layers"
    if not against:
        return (
            f"Use method='convex', {times.get('convex', 'seconds')}: {head} is likely to be enough. {last} "
            f"The default, method='auto', {times['auto']}, changes the whole network and may repair more."
        )
    if best is None:
        return f"Use the default, method='auto', {times['auto']}. {last}".strip()
    if best.change < MAX_SMALL_CHANGE:
        return (
            f"Use the default, method='auto', on the whole network, {times['auto']}{f': {against}' * (tried > 0)}. "
            f"{last} To change a single layer, use method='linearized' on {best.layer}, {times['linearized']}."
        )
    mixed = ""
    if mixing is not None:
        mixed = f" Of the nearest passed samples, {rough_percent(mixing.mean('targets'))} have the target's label."
    return f"Get more data like the targets and train on it: no layer repairs them by a small change. {last}{mixed}"


def _alone(alone: int, tried: int, check: HeldOutCheck | None) -> str:
    others = "."
    if check is not None:
        repaired = f"repairs {check.repaired:.1f} other targets and breaks {check.broken:.1f} passed samples."
        others = f"; on samples held out, fixing one {repaired}"
    text = f"One at a time, the last layer can fix {alone:,} of {tried:,} targets without known regressions{others}"
    return text if tried else ""


def _change(own: LayerCapacity | None, best: LayerCapacity | None) -> str:
    if best is None or best.change == math.inf:
        return ""
    text = f"A typical target needs a change of {best.layer} by {rough_percent(best.change)} of its norm"
    if own is None or own == best:
        return f"{text}."
    if own.change == math.inf:
        return f"{text}; no change of {own.layer} suffices."
    return f"{text}, of {own.layer} by {rough_percent(own.change)}."
