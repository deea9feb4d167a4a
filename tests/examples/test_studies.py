"""The studies over seeds: their commands run on small data, and their statistics are those counted
by hand.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch.utils.data import TensorDataset

from lightning_nrl import Target
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.study import Run

STUDIES = ROOT / "examples" / "studies"
sys.path.insert(0, str(STUDIES))

import ablation  # noqa: E402
import congruent  # noqa: E402
import default_problems  # noqa: E402
import defaults  # noqa: E402
import low_rank  # noqa: E402
import new_problems  # noqa: E402
import problems  # noqa: E402

PROBLEMS = {**default_problems.SMALL, **new_problems.NEW}


class Tiny(problems.SlashedZeros):
    """Few of the digits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.data = {
            split: TensorDataset(*(x[:120] for x in data.tensors))
            for split, data in self.data.items()
        }


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_figures: None) -> None:
    """One problem in a few seconds, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    tiny = problems.Problem(Tiny, problems.DigitNet, 3, Target.all(), ("classifier",))
    for name in ("slashed-zeros", "fashion"):
        for table in (problems.PROBLEMS, defaults.ALL):
            monkeypatch.setitem(table, name, tiny)
    monkeypatch.setattr(congruent, "EPOCHS", 2)
    monkeypatch.setattr(
        ablation, "LAST_LAYER", (ablation.ParticleSwarm(particles=5, iterations=2), None, 2)
    )


def printed(
    script: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list]:
    """The rows of the table that a command prints."""
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(line)])
    module = sys.modules.get(script.removesuffix(".py"))
    if hasattr(module, "main"):
        module.main()
    else:
        runpy.run_path(str(STUDIES / script), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


COMMANDS = {
    "repairs.py": (
        "slashed-zeros --seeds 2 --max-time 2",
        ["default, seed 0", "default, seed 1", "default"],
    ),
    "updates.py": (
        "--problem fashion --seeds 1 --updates 'from the old weights' repaired",
        [
            "",
            ", repaired",
            *(f", interpolated {strength}" for strength in (0.9, 0.8, 0.7)),
            *(", interpolated", ", interpolated, repaired", "repaired"),
        ],
    ),
    "congruent.py": (
        "--start old --terms plain --interpolate --seeds 1",
        ["plain", "plain, interpolated"],
    ),
    "defaults.py": ("--problems fashion --seeds 1", ["fine-tuning", "fine-tuning x 2", "default"]),
    "ablation.py": (
        "--problems fashion --seeds 1",
        ["neurecover-lite", "neurecover", "neurecover, last two"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_a_study_runs_and_is_read_where_it_was_run(script, monkeypatch, capsys):
    line, names = COMMANDS[script]
    rows = printed(script, line, monkeypatch, capsys)
    assert len(rows) >= len(names)
    for row, name in zip(rows, names, strict=False):
        assert row[0].endswith(name)
    monkeypatch.setattr(problems.Trainer, "fit", None)
    assert printed(script, line, monkeypatch, capsys) == rows


@pytest.mark.slow
def test_adapters_are_compared_with_all_weights(monkeypatch, capsys):
    pytest.importorskip("peft")
    small = replace(low_rank.NETWORKS["CNN"], data=Tiny)
    monkeypatch.setitem(low_rank.NETWORKS, "CNN", small)
    rows = printed("low_rank.py", "CNN --epochs 4 --ranks 2", monkeypatch, capsys)
    (whole, *whole_cells), (rank, *rank_cells) = rows
    assert (whole, rank) == ("CNN, all weights", "CNN, rank 2")
    columns = list(low_rank.HEADS)
    for column in ("state, MB", "patch, MB"):
        place = columns.index(column)
        assert 0 < float(rank_cells[place]) < float(whole_cells[place]) / 3
    assert rank_cells[columns.index("broken")] == "0.0"
    assert rank_cells[columns.index("differ")] == "0"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_cost_of_a_repair_is_measured_by_stage(monkeypatch, capsys):
    line = "cost.py --axis classes --most 10 --max-time 60"
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    runpy.run_path(str(STUDIES / "cost.py"), run_name="__main__")
    text = capsys.readouterr().out
    repaired, broken, megabytes = re.findall(r"^\| 10 \| (\d+) \| (\d+) .* (\d+) \|$", text, re.M)[
        0
    ]
    assert (int(repaired) > 0, int(broken)) == (True, 0)
    assert int(megabytes) > 0
    assert re.search(r"^\| fit \| \d+\.\d s, \d+ MB \|$", text, re.M)
    assert 0 < float(re.findall(r"took (.*) s of 60 s", text)[0]) < 60


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_the_same_data_for_the_same_seed_and_a_network_for_them(name):
    problem = PROBLEMS[name]
    first, again, other = (problem.data(seed).data for seed in (1, 1, 2))
    for split in default_problems.SPLITS:
        inputs, labels = first[split].tensors
        assert torch.equal(inputs, again[split].tensors[0])
        assert not torch.equal(inputs, other[split].tensors[0])
        assert labels.unique().tolist() == list(
            range(problem.network().eval()(inputs[:2]).shape[1])
        )


def run(localizer: str = "gradient", seed: int = 0, layer: str = "last", repaired: int = 5) -> Run:
    known, unseen = (
        TargetCounts(80, 1, 9, 10, 10, repaired, 40, 0),
        TargetCounts(80, 2, 4, 14, 10, 4, 40, 0),
    )
    more = {
        "known": known,
        "unseen": unseen,
        "patched": 0,
        "intact": 0,
        "changed": True,
        "iterations": 1,
    }
    return Run(f"eq1/{localizer}", "eq1", 6, False, 64, None, 5, seed, layer, 64, value=1.0, **more)


def test_a_difference_is_that_of_a_seed_and_layer_to_the_mean_of_its_draws():
    runs = [run(), run("random 0", repaired=1), run("random 1", repaired=3)]
    runs += [run(layer="first", repaired=9), run("random 0", layer="first", repaired=1)]
    runs += [run(seed=1, repaired=7), run("random 0", seed=1, repaired=8)]
    # Seed 0: 5 - 2 in one layer and 9 - 1 in the other; seed 1: 7 - 8.
    assert ablation.paired(runs, ablation.NUMBERS["repaired"]) == {"gradient": [5.5, -1.0]}
    assert (ablation.NUMBERS["known net"](runs[0]), ablation.NUMBERS["unseen net"](runs[0])) == (
        4,
        2,
    )


def test_statistics_by_hand():
    # Of the 8 choices of signs of 1, 2, 3 only +++ and --- reach a sum of 6; 4.3027 / sqrt(3) is
    # half of the interval.
    assert ablation.difference([1.0, 2.0, 3.0]) == "+2.0 [-0.5, +4.5] p=0.250"
    assert ablation.difference([1.0]) == "-"
    assert problems.interval([1.0, 2.0, 3.0], "+.2f") == "+2.00 ± 2.48"
    assert problems.interval([1.0]) == "1.0"
