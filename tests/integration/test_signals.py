"""Ctrl-C and SIGTERM during a repair: heeded within seconds, the model as it was or repaired, and
that is said.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer, same, state_of
from distributed_fit import Continued
from lightning_package import pl
from options import with_options

from lightning_nrl import ParticleSwarm, RepairReport, repair
from lightning_nrl.methods import Auto

LONGEST_WAIT = 15
"""Seconds from a signal to the end of the repair."""

METHODS = {
    "swarm": QUICK["method"],
    "training": Continued(),
    "auto": Auto(ParticleSwarm(particles=20, iterations=20)),
}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers are as found afterwards; Lightning ignores Ctrl-C once it has seen one."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {signum: signal.getsignal(signum) for signum in before}
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after[signal.SIGTERM] == before[signal.SIGTERM]
    assert after[signal.SIGINT] in (before[signal.SIGINT], signal.SIG_IGN)


class Signalling(Classifier):
    """Does something in one of the passes of it and of its copies."""

    passes: ClassVar[int] = 0
    act: ClassVar[Callable[[], None]]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Signalling.passes += 1
        if Signalling.passes == 30:  # before it is tried out, and signals are not heeded
            Signalling.act()
        return super().forward(images)


@pytest.fixture
def model(trained_path: Path) -> Signalling:
    return Signalling.load_from_checkpoint(trained_path)


def repaired(
    model: Signalling, folder: Path, act: Callable[[], None], method: str = "swarm"
) -> RepairReport:
    """A repair that draws no page; `act` is called when it has begun."""
    Signalling.passes, Signalling.act = 0, act
    settings = with_options({**QUICK, "method": METHODS[method], "save_every": None})
    return repair(quiet_trainer(folder), model, datamodule=Digits(), **settings)


@pytest.mark.parametrize(
    ("signum", "method"), [("SIGTERM", "swarm"), ("SIGTERM", "training"), ("SIGINT", "swarm")]
)
def test_a_signal_leaves_everything_as_it_was_and_that_is_said(
    tmp_path, model, capsys, method, signum
):
    before, modes = state_of(model), [module.training for module in model.modules()]
    stopped = pl.utilities.exceptions.SIGTERMException if signum == "SIGTERM" else SystemExit
    with pytest.raises(stopped) as error:
        repaired(model, tmp_path, partial(signal.raise_signal, signal.Signals[signum]), method)
    # A job that is stopped does not end as if it were done.
    assert error.value.code == 143 or signum == "SIGINT"
    assert same(before, model)
    assert [module.training for module in model.modules()] == modes
    assert not (tmp_path / "repair").exists()
    said = capsys.readouterr().err
    name = "Ctrl-C" if signum == "SIGINT" else signum
    assert f"{name}: the repair stops." in said
    assert "The repair was stopped: the weights are unchanged, and no files were written." in said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_the_trained_weights_or_a_whole_repair(
    tmp_path, model, signum
):
    """NRL_SIGNALS says how many moments; seeds of the moments are their numbers."""
    before, main_thread = state_of(model), threading.main_thread().ident
    for number in range(int(os.environ.get("NRL_SIGNALS", "1"))):
        model.load_state_dict(before)
        folder, dice = tmp_path / str(number), random.Random(f"{signum} {number}")
        delay = 1.5 * dice.random()
        timer = threading.Timer(delay, signal.pthread_kill, (main_thread, signum))
        began = time.monotonic()
        try:
            repaired(model, folder, timer.start, dice.choice(list(METHODS)))
        except BaseException:
            assert time.monotonic() - began < delay + LONGEST_WAIT
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        files = {path.name for path in folder.rglob("repair/*")}
        if "report.json" in files:
            assert same(model, folder / "repair" / "repaired.ckpt")
        else:
            assert files == set()
            assert same(before, model)
