"""One report to all loggers of a trainer. Logging comes last and must never cost the repair, or the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_nrl._lightning import Logger, TensorBoardLogger, rank_zero_only, rank_zero_warn
from lightning_nrl._tracking.scalars import Scalars, final_numbers, search_curves, strength_curves
from lightning_nrl._tracking.tensorboard import write_extras
from lightning_nrl.errors import LoggingWarning
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView

__all__ = ["to_each", "track", "track_numbers", "track_release", "writer_of"]


@rank_zero_only
def track(
    report: RepairReport,
    loggers: Sequence[Logger],
    *,
    step: int,
    change: Tensor | None = None,
    name: str = "repair",
    views: Sequence[SampleView] = (),
) -> None:
    """Writes a repair to every logger, on rank zero.

    The search has its iterations for steps, the way to the patch its strength in percent; the outcome and the numbers
    of the splits stand at the step of training at which the repair was made. TensorBoard gets more, see `write_extras`.
    To be called before the loggers are finalised: a TensorBoard writer that is used later opens a second file.

    The change of every searched weight is for a histogram; None if there was no candidate. Tags begin with `name`; a
    second repair in the same log needs another one. Views of samples are for TensorBoard's images.
    """
    to_each(loggers, partial(_write, report, step=step, change=change, name=name, views=views), "repair")


@rank_zero_only
def track_release(report: ReleaseReport, loggers: Sequence[Logger], *, step: int, name: str = "release") -> None:
    """Writes the page of a release decision to every TensorBoard logger; its numbers go with the metrics."""

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            writer.add_text(f"{name}/report", report.to_markdown(), step)
            logger.save()

    to_each(loggers, write, "release report")


@rank_zero_only
def track_numbers(numbers: Scalars, loggers: Sequence[Logger], *, step: int, what: str) -> None:
    """Writes numbers by tag to every logger, on rank zero; `what` they are of is for the warning."""

    def write(logger: Logger) -> None:
        logger.log_metrics(numbers, step=step)
        logger.save()

    to_each(loggers, write, what)


def writer_of(logger: Logger) -> SummaryWriter | None:
    """TensorBoard's writer; None for any other logger."""
    writer = logger.experiment if isinstance(logger, TensorBoardLogger) else None
    return writer if isinstance(writer, SummaryWriter) else None


def to_each(loggers: Sequence[Logger], write: Callable[[Logger], None], what: str) -> None:
    """Writes to every logger; one that raises is warned of and left, the others go on."""
    for logger in loggers:
        try:
            write(logger)
        except Exception as error:
            rank_zero_warn(
                f"The {what} was not logged to {type(logger).__name__}, which raised {type(error).__name__}: {error}. "
                f"The {what} itself and its files are not affected.",
                category=LoggingWarning,
            )


def _write(
    report: RepairReport,
    logger: Logger,
    *,
    step: int,
    change: Tensor | None,
    name: str,
    views: Sequence[SampleView],
) -> None:
    for iteration, scalars in enumerate(search_curves(report, name)):
        logger.log_metrics(scalars, step=iteration)
    for strength, scalars in strength_curves(report, name).items():
        logger.log_metrics(scalars, step=strength)
    logger.log_metrics(final_numbers(report, name), step=step)
    if writer := writer_of(logger):
        write_extras(report, writer, step=step, change=change, name=name, views=views)
    # Now, as the process may end before loggers are finalised.
    logger.save()
