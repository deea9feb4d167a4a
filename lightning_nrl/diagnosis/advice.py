"""What to do about failures, in a sentence or two with the reason in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_nrl.diagnosis.diagnosis import Check, Cost, Doubt, LayerRoom, Mixing, TargetFinding
from lightning_nrl.diagnosis.page import part, seconds

__all__ = ["advise"]

DOUBTED = 0.2
"""Share of targets with doubtful labels from which on labels come first."""

WORTH = 2.0
"""Others repaired for each one broken from which on a repair of the last layer is worth its unseen breaks."""

NEAR = 4.0
"""Times the roomiest layer's change that the last layer may need: both are medians over few targets."""

FAR = 0.5
"""A change of a layer by half of its norm is no small one: the first-order figures do not hold there."""


def advise(
    known: Mapping[str, int],
    targets: Sequence[TargetFinding],
    check: Check | None,
    mixing: Mixing | None,
    doubts: Sequence[Doubt],
    layers: Sequence[LayerRoom],
    head: str | None,
    costs: Sequence[Cost],
) -> str:
    """The advice. The rules are few and in order: labels, then the last layer, then the network, then data."""
    n, times = known["targeted"], {cost.method: seconds(cost.seconds) for cost in costs}
    if not n:
        return "Nothing to repair: no failed sample is in the target."
    if not known["passed"]:
        return "Get data: no known sample passes, so there is nothing to keep and nothing to compare with."
    first = _labels(n, doubts)
    best = min(layers, key=lambda layer: layer.change, default=None)
    own = next((layer for layer in layers if layer.layer == head), None)
    alone = sum(target.fixable == "yes" for target in targets)
    tried = sum(target.fixable != "not tried" for target in targets)
    figures = _figures(alone, tried, check, own, best)
    near = own is None or best is None or own.change <= NEAR * best.change
    if tried and alone > tried / 2 and near and check is not None and not check.rate < WORTH:
        return f"{first}Try method='convex' on {head}, about {times.get('convex', 'seconds')}: {figures}"
    if best is not None and best.change < FAR:
        where = f"the last layer has little room; {figures}" if tried else figures
        return (
            f"{first}Use method='constrained' on the whole network, about {times['constrained']}: {where} "
            f"If one layer must do, take {best.layer}."
        )
    mixed = ""
    if mixing is not None:
        mixed = f" Of the nearest passed samples {part(mixing.mean('targets'))} have a target's own label."
    return (
        f"{first}Get data like the targets and train on it: no layer repairs them by a small change; {figures}{mixed}"
    )


def _labels(n: int, doubts: Sequence[Doubt]) -> str:
    if len(doubts) < max(1, DOUBTED * n):
        return ""
    return (
        f"Look at the labels first: those of {len(doubts):,} of {n:,} targets look wrong, since neighbours and model "
        "agree on another class. Then: "
    )


def _figures(alone: int, tried: int, check: Check | None, own: LayerRoom | None, best: LayerRoom | None) -> str:
    parts = []
    if tried:
        parts.append(f"it can fix {alone:,} of {tried:,} targets alone at zero known regressions")
    if check is not None:
        parts.append(f"at {check.repaired:.1f} others repaired for {check.broken:.1f} broken among samples held out")
    text = " ".join(parts)
    if own is not None and best is not None and own != best:
        text += (
            f"{', and ' if text else ''}a target needs a change of {part(own.change)} of that layer, "
            f"of {best.layer} {part(best.change)}"
        )
    elif best is not None:
        text += f"{', and ' if text else ''}a target needs a change of {part(best.change)} of {best.layer}"
    return f"{text}." if text else "little could be looked at."
