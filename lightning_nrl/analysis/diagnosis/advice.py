"""Estimates how long each method takes, and advises what to do."""

from __future__ import annotations

import math

from lightning_nrl._utils.formatting import rough_percent, rough_time
from lightning_nrl.analysis.diagnosis.diagnosis import Diagnosis
from lightning_nrl.methods import budget
from lightning_nrl.search import ParticleSwarm

PASSES_AROUND_SEARCH = 2  # evaluate and record; judge
# If at least this share of targets has a doubtful label, the advice begins with labels.
DOUBTED_SHARE = 0.2
# The last layer is advised only if its fixes repair this many other targets per broken sample, and
# if it needs at most this many times the easiest layer's change.
MIN_EXCHANGE_RATE = 2.0
MAX_CHANGE_RATIO = 4.0
# Relative to a layer's norm; first-order estimates are invalid for larger changes.
MAX_SMALL_CHANGE = 0.5


def estimate_costs(
    one_pass: float, head: float, alone: float, has_margins: bool, epochs: int | None
) -> dict[str, float]:
    """Estimates the seconds of each method, in ascending order, without methods of unknown time.

    `one_pass`, `head` and `alone` are the measured seconds of a pass over the known data, of the
    last Linear in such a pass, and of the fixes of all targets (NaN: unknown). `epochs` is the
    length of the model's training.
    """
    swarm = ParticleSwarm()
    search = budget.SCORED_SHARE * swarm.particles * swarm.iterations * head
    seconds = {"swarm": search, "auto": search}
    if has_margins:
        passes = (epochs or budget.LEAST_EPOCHS) * budget.FORWARD_BACKWARD + budget.POLISH_PASSES
        seconds["convex"] = budget.CONVEX_SOLVES * alone
        seconds["finetune-polish"] = seconds["auto"] = passes * one_pass
        for cost in (budget.LADDER_SEARCHES * search, seconds["convex"]):
            if not math.isnan(cost):
                seconds["auto"] += cost
    around = PASSES_AROUND_SEARCH * one_pass
    known = {method: around + cost for method, cost in seconds.items() if not math.isnan(cost)}
    return dict(sorted(known.items(), key=lambda item: item[1]))


def advise(diagnosis: Diagnosis) -> str:
    """Advises which method to use, or to get data, or to look at doubtful labels first."""
    n_targets, n_doubts = diagnosis.known["targeted"], len(diagnosis.doubts)
    if not n_targets:
        return "Nothing to repair: no failed sample is in the target."
    if not diagnosis.known["passed"]:
        return (
            "Get data: no known sample passes, so there is nothing to keep and nothing to compare "
            "with."
        )
    if all(math.isnan(target.margin) for target in diagnosis.targets):
        return (
            "Use method='auto', which is the swarm here: the task has no margins, so little can be "
            "predicted."
        )
    advice = _advise_method(diagnosis)
    if n_doubts < max(1, DOUBTED_SHARE * n_targets):
        return advice
    return (
        f"Look at labels first: those of {n_doubts:,} of {n_targets:,} targets may be wrong, since "
        f"neighbours and model agree on another class. Then: {advice}"
    )


def _advise_method(diagnosis: Diagnosis) -> str:
    best, mixing = diagnosis.easiest_layer, diagnosis.mixing
    times = {method: rough_time(seconds) for method, seconds in diagnosis.costs.items()}
    facts = f"{_fixes(diagnosis)} {_changes(diagnosis)}".strip()
    objection = _objection(diagnosis)
    if not objection:
        return (
            f"Use method='convex', {times.get('convex', 'seconds')}: the last layer "
            f"({diagnosis.head}) is likely to be enough. {facts} The default, method='auto', "
            f"{times['auto']}, changes the whole network and may repair more."
        )
    if best is None:
        return f"Use the default, method='auto', {times['auto']}. {facts}".strip()
    if best.change < MAX_SMALL_CHANGE:
        reason = f": {objection}" if diagnosis.n_tried else ""
        return (
            f"Use the default, method='auto', on the whole network, {times['auto']}{reason}. "
            f"{facts} To change a single layer, use method='finetune-polish' on {best.layer}, "
            f"{times['finetune-polish']}."
        )
    if mixing is not None:
        share = rough_percent(mixing.targets)
        facts += f" Of the nearest passed samples, {share} have the target's label."
    return (
        "Get more data like the targets and train on it: no layer repairs them by a small change. "
        f"{facts}"
    )


def _objection(diagnosis: Diagnosis) -> str:
    """Says what speaks against a change of the last layer alone; empty if nothing does."""
    check, best, head = diagnosis.check, diagnosis.easiest_layer, diagnosis.head_layer
    last = f"the last layer ({diagnosis.head})"
    if 2 * diagnosis.count("yes") <= diagnosis.n_tried:
        return f"{last} is not enough"
    if check is None:
        return f"what {last} would break on other data is not known"
    if check.rate < MIN_EXCHANGE_RATE:
        return f"{last} would break too much on other data"
    if best is not None and head is not None and head.change > MAX_CHANGE_RATIO * best.change:
        return f"{last} would have to change much more than other layers"
    return ""


def _fixes(diagnosis: Diagnosis) -> str:
    if not diagnosis.n_tried:
        return ""
    text = (
        f"One at a time, the last layer can fix {diagnosis.count('yes'):,} of "
        f"{diagnosis.n_tried:,} targets without known regressions"
    )
    check = diagnosis.check
    if check is None:
        return f"{text}."
    return (
        f"{text}; on samples held out, fixing one repairs {check.repaired:.1f} other targets and "
        f"breaks {check.broken:.1f} passed samples."
    )


def _changes(diagnosis: Diagnosis) -> str:
    best, head = diagnosis.easiest_layer, diagnosis.head_layer
    if best is None or best.change == math.inf:
        return ""
    change = rough_percent(best.change)
    text = f"A typical target needs a change of {best.layer} by {change} of its norm"
    if head is None or head == best:
        return f"{text}."
    if head.change == math.inf:
        return f"{text}; no change of {head.layer} suffices."
    return f"{text}, of {head.layer} by {rough_percent(head.change)}."
