"""The study of the default: its problems, its counts, its tables, and a run from end to end on a small problem."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from repository import ROOT
from torch import nn
from torch.utils.data import TensorDataset

STUDY = ROOT / "examples" / "case_study"
sys.path[:0] = [str(STUDY), str(STUDY.parent / "studies")]

import default_fits  # noqa: E402
import default_tables  # noqa: E402
import defaults  # noqa: E402
from default_problems import PROBLEMS, SPLITS, Case, SensorNet, Splits, drifting_sensors  # noqa: E402
from default_records import Run, Seconds, read_or_run  # noqa: E402
from default_runs import Work, right  # noqa: E402

from lightning_nrl import RepairReport  # noqa: E402

RUN = Run("any", 0, "default", "repaired", 20, 15, 0, 30, 5, 100, 0.9, 0.5, 0.75, Seconds(4, 3), Seconds(4, 2))


def small(seed: int) -> Splits:
    whole = drifting_sensors(seed)
    data = {split: TensorDataset(*(column[:200] for column in whole.data[split].tensors)) for split in SPLITS}
    whole.data = data
    return whole


SMALL = Case(small, SensorNet, 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_the_same_data_for_the_same_seed_and_a_network_for_them(name):
    case = PROBLEMS[name]
    first, again, other = case.data(1), case.data(1), case.data(2)
    for split in SPLITS:
        inputs, labels = first.data[split].tensors
        assert torch.equal(inputs, again.data[split].tensors[0])
        assert not torch.equal(inputs, other.data[split].tensors[0])
        n_classes = case.network().eval()(inputs[:2]).shape[1]
        assert labels.unique().tolist() == list(range(n_classes))


def test_right_is_counted_with_dropout_off():
    class Dropped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.99)

        def forward(self, inputs):
            return self.dropout(inputs)

    logits = torch.eye(3).repeat(400, 1)
    labels = torch.arange(3).repeat(400)
    labels[1] = 0
    found = right(Dropped(), TensorDataset(logits, labels))
    assert found.shape == (1200,)
    assert (~found).nonzero().flatten().tolist() == [1]


@pytest.fixture
def small_problem(monkeypatch):
    monkeypatch.setitem(defaults.PROBLEMS, "small", SMALL)


def test_methods_are_compared_and_what_was_run_is_read(small_problem, monkeypatch, tmp_path, capsys):
    line = ["defaults.py", "--problems", "small", "--seeds", "1", "--first", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    defaults.main()
    printed = capsys.readouterr().out
    folder = tmp_path / "small" / "seed_3"
    report = RepairReport.from_json((folder / "default" / "report.json").read_text())
    run = read_or_run(folder / "default.json", None)
    known, unseen = report.pooled("known"), report.pooled("unseen")
    assert (run.targeted, run.repaired) == (known.targeted, known.repaired_in_target)
    assert (run.known_broken, run.unseen_repaired, run.unseen_broken) == (known.broken, unseen.repaired, unseen.broken)
    assert run.accuracy_after == pytest.approx(unseen.accuracy_after)
    assert run.same_start
    assert run.status == report.status
    monkeypatch.setattr(Work, "fit", None)
    defaults.main()
    assert capsys.readouterr().out == printed


def test_fine_tuning_begins_at_the_trained_weights_and_retraining_does_not(tmp_path, monkeypatch):
    work = Work("small", SMALL, 0, tmp_path)
    state, _ = work.trained()
    began = []
    monkeypatch.setattr(
        Work,
        "fit",
        lambda self, model, train_dataloaders: began.append((model.state_dict(), train_dataloaders)) or Seconds(1, 1),
    )
    tuned, scratch = work.fine_tuned(), work.retrained()
    same = [all(torch.equal(value, state[name]) for name, value in found.items()) for found, _ in began]
    assert same == [True, False]
    assert [(len(loader.dataset), loader.batch_size) for _, loader in began] == [(400, 64)] * 2
    assert (tuned.unseen_repaired, tuned.unseen_broken, tuned.known_broken) == (0, 0, 0)
    assert scratch.unseen_broken > 0


def test_times_are_shares_of_the_fit_s(small_problem, monkeypatch, tmp_path, capsys):
    limits = []

    def repaired(self, method, max_time):
        limits.append(max_time / self.trained()[1].wall)
        return replace(RUN, method=method)

    monkeypatch.setattr(Work, "repaired", repaired)
    line = ["defaults.py", "--problems", "small", "--seeds", "1", "--max-times", "0.1", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    defaults.main()
    assert limits == pytest.approx([0.1, 2])
    assert "| 0.1 x the fit | 15 of 20 | 0 | 30 : 5 | 6.0 | +25.00 |" in capsys.readouterr().out


def test_fits_after_the_training_start_from_its_weights(monkeypatch, tmp_path, capsys):
    owner = SMALL
    monkeypatch.setitem(defaults.FITS, "small", default_fits.fits_of(owner))
    fits = ["rate0", "plain"]
    line = ["defaults.py", "--problems", "small", "--seeds", "1", "--out", str(tmp_path), "--fits", *fits]
    parser_choices = ["--problems", "table, drift", "--fits", "rate0"]
    monkeypatch.setattr(sys, "argv", line)
    defaults.main()
    folder = tmp_path / "small" / "seed_0"
    assert read_or_run(folder / "rate0.json", None).same_start
    assert read_or_run(folder / "rate0.json", None).targeted == read_or_run(folder / "plain.json", None).targeted
    assert sorted(path.stem for path in folder.glob("*.json")) == ["fine-tuning", "plain", "rate0"]
    assert "| plain |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["defaults.py", *parser_choices])
    with pytest.raises(SystemExit):
        defaults.main()
    assert "HINT:" in capsys.readouterr().err


def test_a_constant_rate_has_the_owner_s_optimizer():
    optimizer = default_fits.at_rate(SensorNet, 0.25)().configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


def test_images_shifted_in_the_data_set_are_others_each_time():
    torch.manual_seed(0)
    data = default_fits.ShiftedImages(TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4)), by=2)
    draws = [data[3] for _ in range(8)]
    assert {int(label) for _, label in draws} == {3}
    assert all(image.shape == (1, 8, 8) for image, _ in draws)
    assert len({tuple(image.flatten().tolist()) for image, _ in draws}) > 1


def verdicts(default: Run, tuned: Run) -> list[str]:
    page = default_tables.compared({"any": {"fine-tuning": [tuned], "default": [default]}})
    (row,) = [line for line in page.splitlines() if line.startswith("| any | 90.0 |")]
    return [cell.strip() for cell in row.strip("| ").split("|")][3:]


def test_verdicts_hold_up_to_their_limits():
    tuned = replace(RUN, unseen_broken=10, seconds=Seconds(1, 2), known_broken=7)
    held = replace(RUN, unseen_broken=6, seconds=Seconds(9, 3), fit=Seconds(2, 2))
    assert verdicts(held, tuned) == ["+0.00", "+0.00", "0.60", "1.50 of 1.5", "0", "holds"]
    missed = replace(held, unseen_broken=7, accuracy_after=0.74, known_broken=1, seconds=Seconds(1, 4))
    assert verdicts(missed, tuned) == ["**-1.00**", "-1.00", "**0.70**", "**2.00 of 1.5**", "**1**", "**missed**"]
    short = replace(held, fit=Seconds(9, 1.9), seconds=Seconds(9, 4))
    assert verdicts(short, tuned) == ["+0.00", "+0.00", "0.60", "2.00 of 2", "0", "holds"]


def test_estimates_are_shown_beside_what_happened():
    page = default_tables.compared({"any": {"default": [RUN], "fine-tuning": [RUN]}})
    assert "within a factor" not in page
    close, far = replace(RUN, held_out=(12, 20, 2, 20)), replace(RUN, seed=1, held_out=(2, 20, 4, 20))
    page = default_tables.compared({"any": {"default": [close, far], "fine-tuning": [RUN, RUN]}})
    assert "| any | 0 | 12 of 20 | 39.4 to 78.3 | 60.0 | 2 of 20 | 1.8 to 28.3 | 10.0 | yes |" in page
    assert "| any | 1 | 2 of 20 | 1.8 to 28.3 | **60.0** | 4 of 20 | 7.1 to 40.1 | 10.0 | no |" in page
    assert "within a factor of 1.5 in 1 of 2 runs" in page
    assert "for repaired samples in 1, for broken ones in 2 of 2" in page


def test_few_held_out_samples_cannot_agree_however_right_their_rates_are():
    happened = (30, 50, 5, 50)
    few, many = (
        default_tables._agrees(default_tables._drawn(np.random.default_rng(0), (0, n, 0, n), happened), happened)
        for n in (10, 10_000)
    )
    assert few.mean() < 0.5 < 0.99 < many.mean()


def test_a_fit_is_measured_against_the_owner_s_training():
    owner = replace(RUN, repaired=20)
    fits = {
        "owner": [owner],
        "owner, limited": [owner],
        "rate0": [replace(RUN, repaired=17, accuracy_after=0.71)],
        "plain": [replace(RUN, repaired=16, accuracy_after=0.75)],
        "augmented-data": [replace(owner, seconds=Seconds(1, 6))],
    }
    page = default_tables.fitted("any", fits, {fit: [replace(RUN, accuracy_after=0.72)] for fit in fits})
    ends = {line.split("|")[1].strip(): line.split("|")[-4:-1] for line in page.splitlines() if line.startswith("| ")}
    assert [cell.strip() for cell in ends["owner"]] == ["72.00", "0", ""]
    assert [cell.strip() for cell in ends["rate0"]] == ["72.00", "1", "85 % of the repairs, 84 % of the points"]
    assert ends["plain"][-1].strip() == "**80 % of the repairs, 100 % of the points**"
    assert ends["augmented-data"][-1].strip() == "**100 % of the repairs, 100 % of the points, 2.00 x the time**"
