from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

from lightning_nrl.analysis.sweep import SweepResult

HOW_TO = ROOT / "docs" / "sweep.md"


def test_the_how_to_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    with torch.random.fork_rng():
        for block in blocks:
            if "Trainer" not in block:
                exec(block, found)
    result = found["result"]
    assert len(result.runs) == 3 * 6
    assert SweepResult.from_csv(tmp_path / "sweep" / "sweep.csv").runs == result.runs
    assert SweepResult.from_csv(tmp_path / "sweep.csv").runs == result.runs
    state = found["state"]
    assert torch.equal(state["2.weight"], found["model"][2].weight)
