"""What is checked of settings and known data before a method runs."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError, UnusableSamplesError, check_kind
from lightning_nrl.evaluation import DOUBTFUL
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.tasks import Task

CLASSES: tuple[Need, ...] = ("classes",)


def given_or_default(settings: Settings | None) -> Settings:
    """The settings that were given, or the default ones; refuses a value of another kind."""
    settings = Settings() if settings is None else settings
    check_kind("settings", settings, isinstance(settings, Settings), "Settings", "Settings(target=..., layer=...)")
    return settings


def check_sources(known: Sequence[Source], unseen: Sequence[Source], settings: Settings) -> None:
    """Refuses what is no list of sources, splits of one name, and known data with nothing to repair or to draw from."""
    for argument, sources in (("known", known), ("unseen", unseen)):
        if not isinstance(sources, Sequence) or not all(isinstance(source, Source) for source in sources):
            problem = f"`{argument}`: found a {type(sources).__name__}, not one list of `Source` objects."
            raise ConfigurationError(problem, f"write `{argument}=[TensorSource(inputs, targets, split=...)]`.")
    names = [source.split for source in (*known, *unseen)]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"the data have the splits {names}.", "give each split a name of its own.")
    if not any(source.failed for source in known):
        raise ConfigurationError(
            "`known`: no source is marked `failed`.", "mark the one whose failures are to be repaired."
        )
    if settings.search.n_passed is not None and not any(source.passed for source in known):
        raise ConfigurationError(
            f"`n_passed={settings.search.n_passed}`: no known source is marked `passed`.",
            "mark the one that they are drawn from, or leave `n_passed` out to score every known passed sample.",
        )


def check_limit(settings: Settings, calibrated: bool) -> None:
    """Refuses a limit without calibration data, and one on the target."""
    limit = settings.limit
    if limit is not None and limit.needs_target:
        raise ConfigurationError(f"`limit='{limit}'`: a limit is about all calibration data.", "write `tolerance:1%`.")
    if limit is not None and not calibrated:
        raise ConfigurationError(
            f"`limit='{limit}'` needs calibration data, and there are none.",
            "give `calibration` data that the repair does not use, or leave `limit` out.",
        )


def check_task(settings: Settings, before: SampleResults, task: Task) -> None:
    """Refuses settings that need margins or classes where the task has none, by results on some samples at least."""
    check_needs(getattr(settings.method, "needs", ()), before, task)
    if settings.samples.set_aside == DOUBTFUL:
        hint = "set failures aside by a function of the batch, or leave `set_aside` out."
        check_needs(CLASSES, before, task, f"`set_aside={DOUBTFUL!r}`", hint)


def check_losses(before: SampleResults) -> None:
    """Raises an `EvaluationError` that names the samples whose losses are not finite, if there are any."""
    wrong = before.non_finite()
    if wrong:
        samples = "; ".join(f"{split}: {ids[:10]}{' ...' if len(ids) > 10 else ''}" for split, ids in wrong.items())
        raise UnusableSamplesError(
            f"the model's loss is NaN or infinite on {sum(map(len, wrong.values()))} known samples ({samples}).",
            "check these inputs, or the training; a model that gives NaN cannot be repaired.",
            wrong,
        )


def check_targets(before: SampleResults, settings: Settings) -> None:
    """Refuses known data of which none fails in the target, or none passes."""
    if not (before.targeted.any() and before.passed.any()):
        what = "fails in the target" if before.passed.any() else "passes"
        raise ConfigurationError(
            f"`known`: no sample {what} ({settings.target}).", "give data on which there is something to repair."
        )
