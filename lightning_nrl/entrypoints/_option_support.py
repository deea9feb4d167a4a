"""Which entry point heeds which option: the one declaration, for the refusal of options and for docs/options.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_nrl._trainer.data_options import DataOptions
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.pipeline.options import BoundOptions, SearchOptions, changed_options

__all__ = ["ENTRY_POINTS", "HEEDED_BY", "OPTION_CLASSES", "check_heeded", "heeded"]

OPTION_CLASSES = {"data": DataOptions, "samples": SampleOptions, "search": SearchOptions, "bounds": BoundOptions}
"""The arguments of a repair that are option objects."""

REPAIRS = ("RegressionFreeRepair", "repair", "repair_module")
WITH_A_TRAINER = ("RegressionFreeRepair", "repair", "compare", "diagnose", "sweep")
SEARCHES = (*REPAIRS, "compare", "sweep")
ENTRY_POINTS = (*REPAIRS, "compare", "diagnose", "sweep", "ReleaseGate")

HEEDED_BY: Mapping[str, tuple[str, ...]] = {
    "target": (*SEARCHES, "diagnose"),
    "layer": SEARCHES,
    "gate": REPAIRS,
    "method": (*REPAIRS, "sweep"),
    "task": ENTRY_POINTS,
    "reference": (*REPAIRS, "ReleaseGate"),
    "unseen": SEARCHES,
    "calibration": (*REPAIRS, "sweep"),
    "data.passed": WITH_A_TRAINER,
    "data.failed": WITH_A_TRAINER,
    "data.adapter": (*WITH_A_TRAINER, "ReleaseGate"),
    "data.draws": WITH_A_TRAINER,
    "data.render": ("RegressionFreeRepair", "repair"),
    "data.augment": ("RegressionFreeRepair", "repair", "compare"),
    "data.start_from": ("RegressionFreeRepair",),
    "samples.importance": SEARCHES,
    "samples.slices": (*REPAIRS, "ReleaseGate"),
    "samples.quotas": REPAIRS,
    "samples.protected": REPAIRS,
    "samples.risk": REPAIRS,
    "samples.set_aside": (*REPAIRS, "sweep"),
    "samples.keep": REPAIRS,
    "search.fitness": SEARCHES,
    "search.localizer": SEARCHES,
    "search.n_passed": SEARCHES,
    "search.budget": SEARCHES,
    "search.on_interrupt": ("RegressionFreeRepair", "repair"),
    "search.save_every": ("RegressionFreeRepair", "repair"),
    "search.n_scored": (*REPAIRS, "compare"),
    "bounds.strength": REPAIRS,
    "bounds.limit": REPAIRS,
    "bounds.sparse": REPAIRS,
    "bounds.confidence": REPAIRS,
    "max_time": (*REPAIRS, "compare"),
    "seed": (*REPAIRS, "compare", "diagnose", "ReleaseGate"),
    "dirpath": ("RegressionFreeRepair", "repair", "sweep", "ReleaseGate"),
    "verbose": ("RegressionFreeRepair", "repair", "ReleaseGate"),
}
"""By option, who heeds it. `ReleaseGate` has those that it heeds as arguments of its own."""

REFUSING = {
    "compare": "a comparison counts what methods give, and accepts and writes nothing",
    "sweep": "a sweep runs searches to their end, and judges and accepts nothing",
}
"""Who refuses options without effect, and why; `diagnose` takes them, so that it can be given what a repair is."""

INSTEAD = {
    ("compare", "method"): ("a comparison runs several", "name them: `methods=[{value!r}, ...]`."),
    ("sweep", "seed"): ("a sweep has `seeds`", "write `seeds=[{value!r}]`."),
    **dict.fromkeys(
        ((name, "data.start_from") for name in ("repair", "compare", "diagnose", "sweep")),
        ("it has no meaning without training", "name the checkpoint to start from as `ckpt_path`."),
    ),
}
"""What there is in place of an option."""


def check_heeded(entry_point: str, arguments: Mapping[str, Any]) -> None:
    """Refuses options that have no effect; of an option object, those that are not as by default."""
    for option, value in sorted(_given(arguments), key=lambda pair: pair[0]):
        if option not in HEEDED_BY or entry_point in HEEDED_BY[option]:
            continue
        name = option.rpartition(".")[2]
        if (entry_point, option) in INSTEAD:
            why, hint = INSTEAD[entry_point, option]
        elif entry_point in REFUSING:
            why = REFUSING[entry_point]
            hint = f"leave `{name}` out; it is an option of `repair` and `RegressionFreeRepair`."
        else:
            continue
        raise ConfigurationError(f"`{name}={value!r}`: {why}.", hint.format(value=value))


def heeded(entry_point: str, argument: str) -> bool:
    """Whether an argument, or any option in it, has an effect."""
    own = [names for option, names in HEEDED_BY.items() if option.partition(".")[0] == argument]
    return any(entry_point in names for names in own)


def _given(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, tuple(OPTION_CLASSES.values())):
            yield from ((f"{name}.{field}", own) for field, own in changed_options(value).items())
        else:
            yield name, value
