"""Two ranks of which one or both are ended in the middle of a repair, then started again: as if
nothing had been.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Digits, quiet_trainer
from killed_ranks import METHODS, End, Randomised, repaired
from two_processes import in_two_processes

KILLS = int(os.environ.get("NRL_RANK_DEATHS", "0"))
ENDS = [
    ((0,), signal.SIGKILL),
    ((1,), signal.SIGKILL),
    ((0, 1), signal.SIGKILL),
    ((1,), signal.SIGTERM),
    ((0, 1), signal.SIGTERM),
]


def left(folder: Path) -> list[dict[str, Any]]:
    """Weights and report of each rank."""
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [{"state": one["state"], "report": timeless(json.loads(one["report"]))} for one in found]


def timeless(value: Any) -> Any:
    """A report without seconds and paths."""
    if isinstance(value, dict):
        return {
            name: timeless(item) for name, item in value.items() if name not in ("seconds", "files")
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    assert one["report"] == other["report"]


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
def test_ranks_may_die_at_any_moment(method: str, trained: Path, tmp_path: Path) -> None:
    in_two_processes(repaired, tmp_path / "whole", trained, method, End())
    whole, other = left(tmp_path / "whole")
    assert_same(whole, other)
    moments = int((tmp_path / "whole" / "moments0").read_text())
    dice = random.Random(0)
    for number in range(KILLS):
        folder, (ranks, signum) = tmp_path / str(number), ENDS[number % len(ENDS)]
        end = End(ranks, dice.randrange(2, moments), signum)
        with pytest.raises(RuntimeError, match="the two processes ended with"):
            # None means that it had to be killed: the other rank waited for ever.
            in_two_processes(repaired, folder, trained, method, end, seconds=100)
        in_two_processes(repaired, folder, trained, method, End())
        for found in left(folder):
            assert_same(whole, found)
        assert not list(folder.glob(".resume-*"))
        print(method, end, "the same")
