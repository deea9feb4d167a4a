"""Ctrl-C and SIGTERM in a trainer while a repair works, and what is said of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_nrl._lightning.packages import Trainer, class_for, rank_zero_only
from lightning_nrl._utils.interrupts import interruptible


@contextmanager
def heeding_signals(
    trainer: Trainer,
    may_end_early: bool,
    is_decided: Callable[[], bool],
    saved_in: Callable[[], Path | None] = lambda: None,
) -> Iterator[None]:
    """Inside, signals end the repair as Lightning ends a fit: Ctrl-C by KeyboardInterrupt, SIGTERM by an own exception.

    Lightning itself looks at signals between batches only, and while a repair works there are none.

    Args:
        trainer: processes that it has started are told of SIGTERM.
        may_end_early: whether the first Ctrl-C lets the repair end with what it has; on a single process only.
        is_decided: whether the repair is over and saved, for what is said at the end.
        saved_in: where it is saved as far as it is done, likewise.
    """

    def terminated() -> BaseException:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        error: BaseException = class_for(trainer, "pytorch.utilities.exceptions.SIGTERMException")()
        error.code = 128 + signal.SIGTERM  # type: ignore[attr-defined]  # as a shell has it; without, it is 0: success
        return error

    try:
        with interruptible(terminated=terminated, may_end_early=may_end_early and trainer.world_size == 1, say=_say):
            yield
    except (KeyboardInterrupt, SystemExit):
        if is_decided():
            _say("The repair was over before: its files and the weights are those of its report.")
        else:
            place = saved_in()
            text = "The repair was stopped: the weights are as training left them, and it has written no files."
            _say(text if place is None else f"{text} The same call resumes with the steps that are finished ({place}).")
        raise


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
