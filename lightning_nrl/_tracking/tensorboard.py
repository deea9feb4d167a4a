"""What TensorBoard shows of a repair: numbers, figures, pictures of samples, text, a histogram, its hyperparameters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_nrl._tracking.repair_hparams import write_row
from lightning_nrl._tracking.repair_log import RepairLog
from lightning_nrl._tracking.scalars import final_numbers, search_curves, strength_curves
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.page import Facts, Heading, Page


def write_tensorboard(log: RepairLog, writer: SummaryWriter) -> None:
    """Writes a repair to a run of its own, a sub-run of that of training which is called as the repair is.

    In the run of training every number would be there twice, since the HParams tab needs a run for a row. Tags are the
    same in each, so that two repairs stand in one card. Curves are figures: the tab's smoothing would bend scalars.
    """
    report, step = log.report, log.step
    with SummaryWriter(_free_run(str(writer.log_dir), log.name)) as run:
        for tag, value in final_numbers(report).items():
            run.add_scalar(tag, value, step)
        run.add_text("repair/report", report.to_markdown(), step)
        for title, views in log.texts.items():
            page = Page((Heading(title), Facts(tuple((view.caption, view.text) for view in views))))
            run.add_text(f"repair_samples/{title}", page.markdown(), step)
        changes = [change.detach().float().flatten().cpu() for change in (log.changes or {}).values()]
        flat = torch.cat(changes) if changes else torch.zeros(0)
        if bool((flat != 0).any()):
            run.add_histogram("repair_weights/change", flat[flat != 0], step)
        write_row(run, report, log.hparams)
        _write_pictures(log, run)


def _write_pictures(log: RepairLog, run: SummaryWriter) -> None:
    """Last, since a figure that cannot be drawn should cost no numbers."""
    if log.drawn:
        # A capital sorts before all numbers.
        run.add_image("repair/Summary", image_of(log.summary), log.step, dataformats="HWC")
        for group, figures in (("repair_figures", log.figures), ("repair_samples", log.galleries)):
            for title, figure in figures.items():
                run.add_image(f"{group}/{title}", image_of(figure), log.step, dataformats="HWC")
    else:
        for at, scalars in (*enumerate(search_curves(log.report)), *strength_curves(log.report).items()):
            for tag, value in scalars.items():
                run.add_scalar(tag, value, at)
        for title, views in log.pictures.items():
            for view in views:
                run.add_image(f"repair_samples/{title}, {view.caption}", view.pixels, log.step, dataformats="HWC")


def _free_run(log_dir: str, name: str) -> str:
    """The folder of the first of `name`, `name-1`, ... that no repair has written events to."""
    k, free = 0, f"{log_dir}/{name}"
    while any(Path(free).glob("events.out.tfevents.*")):
        k += 1
        free = f"{log_dir}/{name}-{k}"
    return free
