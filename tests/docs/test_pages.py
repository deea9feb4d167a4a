"""Every block of code in README and docs runs, or says visibly why it does not."""

from __future__ import annotations

import contextlib
import doctest
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, blocks, name_of
from torch import nn

from lightning_nrl.analysis.sweep import SweepResult

CODE = [page for page in PAGES if any(blocks(page, "python"))]


def check_plain(found: dict[str, Any]) -> None:
    assert found["outcome"].report.task == "WithinTolerance"
    loaded = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    loaded.load_state_dict(torch.load("repaired.pt", weights_only=True))
    assert torch.equal(loaded[2].weight, found["model"][2].weight)


def check_sweep(found: dict[str, Any]) -> None:
    result = found["result"]
    assert len(result.runs) == 3 * 6
    assert SweepResult.from_csv("sweep/sweep.csv").runs == result.runs
    assert SweepResult.from_csv("sweep.csv").runs == result.runs
    assert torch.equal(found["state"]["2.weight"], found["model"][2].weight)


def check_training(found: dict[str, Any]) -> None:
    assert found["interpolation"].choice is not None
    assert found["choice"].curve[0].share == 0


def check_monitoring(found: dict[str, Any]) -> None:
    assert found["best"].best_model_path
    assert "regression/nfr" in found["trainer"].callback_metrics


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/monitoring.md": check_monitoring,
    "docs/plain_pytorch.md": check_plain,
    "docs/sweep.md": check_sweep,
    "docs/training.md": check_training,
}
"""What must have come of a page's code."""


@pytest.mark.slow
@pytest.mark.parametrize("page", CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, project: dict[str, Any]) -> None:
    found = project
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            if not block.runs:
                continue
            if block.code.lstrip().startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(block.code, found, block.name, str(page), block.line)
                assert doctest.DocTestRunner().run(test).failed == 0, block.name
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                exec(compile("\n" * block.line + block.code, str(page), "exec"), found)
            if block.printed is not None:
                assert out.getvalue() == block.printed, block.name
    CHECKS.get(name_of(page), lambda found: None)(found)


def test_few_blocks_do_not_run_and_each_says_why() -> None:
    still = [block for page in PAGES for block in blocks(page, "python") if not block.runs]
    assert [block.name for block in still if len(block.mark) < len("not run: x")] == []
    assert len(still) <= 6
