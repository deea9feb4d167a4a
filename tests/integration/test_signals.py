"""Ctrl-C and SIGTERM during a repair: heeded within seconds, the model as it was or repaired, and
that is said.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer, same, state_of
from distributed_fit import Continued
from lightning_package import pl
from options import with_options
from test_faults import assert_same, picture

import lightning_nrl._utils.timing
from lightning_nrl import ParticleSwarm, RepairReport, repair
from lightning_nrl._utils import interrupts
from lightning_nrl.methods import Auto

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


def repaired(
    model: Classifier, folder: Path, method: str = "swarm", **arguments: Any
) -> RepairReport:
    """A repair that draws no page."""
    given = {**QUICK, "method": METHODS[method], "save_every": None, **arguments}
    return repair(quiet_trainer(folder), model, datamodule=Digits(), **with_options(given))


def signal_at_tell(monkeypatch: pytest.MonkeyPatch, signum: int, number: int = 1) -> None:
    """Sends a signal when the work tells for the given time how far it is."""
    told, tell = [0], lightning_nrl._utils.timing.StageTimer.tell

    def telling(*args: Any, **kwargs: Any) -> None:
        told[0] += 1
        if told[0] == number:
            signal.raise_signal(signum)
        tell(*args, **kwargs)

    monkeypatch.setattr(lightning_nrl._utils.timing.StageTimer, "tell", telling)


@pytest.mark.parametrize("method", ["swarm", "training"])
@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_everything_as_it_was_and_that_is_said(
    tmp_path: Path,
    trained: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    signum: str,
) -> None:
    trainer = quiet_trainer(tmp_path)
    before = picture(trainer, trained)
    signal_at_tell(monkeypatch, signal.Signals[signum])
    stopped = pl.utilities.exceptions.SIGTERMException if signum == "SIGTERM" else SystemExit
    with pytest.raises(stopped) as error:
        repaired(trained, tmp_path, method)
    # A job that is stopped does not end as if it were done.
    assert error.value.code == 143 or signum == "SIGINT"
    assert same(before["state"], trained)
    assert_same(before["training"], picture(trainer, trained)["training"])
    assert not (tmp_path / "repair").exists()
    said = capsys.readouterr().err
    name = "Ctrl-C" if signum == "SIGINT" else signum
    assert f"{name}: the repair stops." in said
    assert "The repair was stopped: the weights are unchanged, and no files were written." in said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_the_trained_weights_or_a_whole_repair(
    tmp_path: Path, trained: Classifier, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    """NRL_SIGNALS says how many moments; seeds of the moments are their numbers."""
    tell = lightning_nrl._utils.timing.StageTimer.tell
    before = state_of(trained)
    for number in range(int(os.environ.get("NRL_SIGNALS", "2"))):
        trained.load_state_dict(before)
        folder = tmp_path / str(number)
        delay = 1.5 * random.Random(f"{signum} {number}").random()
        timer, began = (
            threading.Timer(delay, signal.pthread_kill, (threading.main_thread().ident, signum)),
            [],
        )

        def telling(
            *args: Any, timer: threading.Timer = timer, began: list[float] = began, **kwargs: Any
        ) -> None:
            if not began:  # the work has begun: before and after it a SIGTERM would end the tests
                began.append(time.monotonic())
                timer.start()
            tell(*args, **kwargs)

        monkeypatch.setattr(lightning_nrl._utils.timing.StageTimer, "tell", telling)
        try:
            repaired(trained, folder, random.Random(number).choice(list(METHODS)))
        except BaseException:
            assert time.monotonic() - began[0] < delay + interrupts.OVERDUE_SECONDS + 2
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        files = {path.name for path in folder.rglob("repair/*")}
        if "report.json" in files:
            checkpoint = torch.load(folder / "repair" / "repaired.ckpt", weights_only=True)[
                "state_dict"
            ]
            assert same(trained, checkpoint)
        else:
            assert files == set()
            assert same(before, trained)
