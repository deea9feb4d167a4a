"""Two ranks of which one or both are ended in the middle of a repair, then started again: as if
nothing had been.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Digits, quiet_trainer, same
from killed_ranks import METHODS, End, Randomised, repaired
from two_processes import in_two_processes

from lightning_nrl import RepairReport

KILLS = int(os.environ.get("NRL_RANK_DEATHS", "0"))
ENDS = [
    ((0,), signal.SIGKILL),
    ((1,), signal.SIGKILL),
    ((0, 1), signal.SIGKILL),
    ((1,), signal.SIGTERM),
    ((0, 1), signal.SIGTERM),
]


def results(folder: Path) -> list[tuple[Any, Any]]:
    """Weights of each rank, and what its report counts."""
    files = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    reports = [RepairReport.from_json(file["report"]) for file in files]
    return [
        (file["state"], (report.splits, report.hashes))
        for file, report in zip(files, reports, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trainer = quiet_trainer(folder, enable_checkpointing=False)
    trainer.fit(Randomised("cnn"), datamodule=Digits())
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


@pytest.mark.skipif(
    not KILLS, reason="it takes minutes: NRL_RANK_DEATHS=20 tries as many of each method"
)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_may_die_at_any_moment(method, trained, tmp_path):
    in_two_processes(repaired, tmp_path / "whole", trained, method, End())
    (state, counts), (other_state, other_counts) = results(tmp_path / "whole")
    assert same(state, other_state)
    assert counts == other_counts
    moments = int((tmp_path / "whole" / "moments0").read_text())
    dice = random.Random(0)
    for number in range(KILLS):
        folder, (ranks, signum) = tmp_path / str(number), ENDS[number % len(ENDS)]
        end = End(ranks, dice.randrange(2, moments), signum)
        with pytest.raises(RuntimeError, match="the two processes ended with"):
            # None means that it had to be killed: the other rank waited for ever.
            in_two_processes(repaired, folder, trained, method, end, seconds=100)
        in_two_processes(repaired, folder, trained, method, End())
        for resumed_state, resumed_counts in results(folder):
            assert same(state, resumed_state)
            assert counts == resumed_counts
        assert not list(folder.glob(".resume-*"))
        print(method, end, "the same")
