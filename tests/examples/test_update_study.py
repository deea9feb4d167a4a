"""The study of updates: its networks in use, where it keeps what it ran, and a run from end to end on garments."""

from __future__ import annotations

import gzip
import sys
from math import isnan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from repository import ROOT
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

STUDY = ROOT / "examples" / "case_study"
sys.path[:0] = [str(STUDY), str(STUDY.parent / "studies")]

import fashion_mnist  # noqa: E402
import in_use  # noqa: E402
import updates  # noqa: E402

SERVED = ("", ", repaired")


@pytest.fixture
def garments(tmp_path, monkeypatch):
    """Files as Debian's package has them, with digits for garments; few of them are enough."""
    digits = load_digits()
    images = np.pad(np.kron(digits.images, np.ones((3, 3))) * 15, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for part, rows in {"train": slice(0, 1500), "t10k": slice(1500, None)}.items():
        columns = {"images-idx3": b"\0" * 16 + images[rows].tobytes()}
        columns["labels-idx1"] = b"\0" * 8 + digits.target[rows].astype(np.uint8).tobytes()
        for name, column in columns.items():
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(column))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setattr(fashion_mnist, "SPLITS", {"train": 128, "val": 8, "repair": 128, "test": 80})
    monkeypatch.chdir(tmp_path)


def without_nan(rows: dict[str, updates.Row]) -> dict[str, updates.Row]:
    return {name: tuple(value for value in row if not isnan(value)) for name, row in rows.items()}


def test_a_network_in_use_has_its_data_and_its_files(monkeypatch):
    for name in ("Vehicles", "DriftingFashion"):
        monkeypatch.setattr(in_use, name, lambda *args, name=name: (name, *args))
    found = [in_use.vehicles(3), in_use.vehicles(0, 2, experiment="A"), in_use.fashion(3), in_use.fashion(0, 2)]
    assert [(use.data, str(use.path), use.epochs) for use in found] == [
        (("Vehicles", "C", 3), "runs/vehicles_C_3.ckpt", 40),
        (("Vehicles", "A", 0), "runs/vehicles_A_0_2_epochs.ckpt", 2),
        (("DriftingFashion", 3), "runs/fashion_3.ckpt", 10),
        (("DriftingFashion", 0), "runs/fashion_0_2_epochs.ckpt", 2),
    ]
    assert [str(found[0].folder(update)) for update in updates.UPDATES] == [
        "runs/update_C_from_scratch/seed_3",
        "runs/update_C_from_scratch_congruent/seed_3",
        "runs/update_C_from_the_old_weights/seed_3",
        "runs/update_C_from_the_old_weights_congruent/seed_3",
    ]
    assert str(found[1].folder("from scratch")) == "runs/update_A_2_epochs_from_scratch/seed_0"
    assert str(found[2].folder("from scratch")) == "runs/update_fashion_from_scratch/seed_3"
    assert str(found[3].folder("from scratch")) == "runs/update_fashion_2_epochs_from_scratch/seed_0"


def test_a_quarter_of_the_test_data_is_not_unseen():
    data = SimpleNamespace(data={"test": TensorDataset(torch.arange(10))})
    orders = []
    for seed in (0, 1):
        calibration, unseen = in_use.InUse("any", data, Path("any.ckpt"), seed, 1).quarters()
        assert (len(calibration), len(unseen)) == (2, 8)
        orders.append([int(row) for part in (calibration, unseen) for (row,) in part])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]


def test_a_row_counts_what_is_served_against_what_was():
    right, wrong, labels = [0.0, 1.0], [1.0, 0.0], torch.ones(8, dtype=torch.long)
    before = torch.tensor([right] * 5 + [wrong] * 3)
    served = torch.tensor([right] * 4 + [wrong] + [right] * 2 + [wrong])
    *counts, known, seconds = updates._against(before, served, labels)
    assert counts == [0.75, 2, 1, 0.125]
    assert isnan(known)
    assert isnan(seconds)


def test_garments_are_updated_and_what_was_run_is_read(garments, monkeypatch):
    update, use = "from the old weights, congruent", in_use.fashion(5, epochs=2)
    rows = updates.updated(update, use)
    between = [f"{update}, interpolated {share}" for share in (0.1, 0.2, 0.3)]
    back = [f"{update}, interpolated{name}" for name in SERVED]
    assert list(rows) == [*(f"{update}{name}" for name in SERVED), *between, *back]
    report = updates.RepairReport.from_json((use.folder(update) / "report.json").read_text())
    assert report.pooled_update("known").trained.n == 256
    assert report.pooled_update("unseen").trained.n == 60
    assert rows[f"{update}, repaired"][4] <= rows[update][4]
    assert rows[f"{back[0]}, repaired"][4] <= rows[back[0]][4]
    monkeypatch.setattr(updates.Trainer, "fit", None)
    again = updates.updated(update, use)
    assert without_nan(again) == without_nan(rows)  # with the seconds of the first run


def test_between_the_models_are_their_weights(garments):
    torch.manual_seed(3)
    use = in_use.fashion(5)
    old, new = use.data.network().eval(), use.data.network().eval()
    unseen = use.quarters()[1]
    images, labels = unseen.dataset.tensors[0][unseen.indices], unseen.dataset.tensors[1][unseen.indices]
    before, after = ((model(images).argmax(1) == labels).tolist() for model in (old, new))
    broken = sum(was and not now for was, now in zip(before, after, strict=True))
    assert updates._between(old, new, 0.0, use)[:3:2] == (sum(after) / 60, broken)
    assert updates._between(old, new, 1.0, use)[:3] == (sum(before) / 60, 0, 0)


@pytest.mark.parametrize("update", updates.UPDATES)
def test_an_update_begins_where_it_says_whatever_ran_before(garments, monkeypatch, update):
    use, begun = in_use.fashion(5), []
    torch.manual_seed(11)
    old = use.data.network()
    use.path.parent.mkdir()
    torch.save(old.state_dict(), use.path)

    def stopped(trainer, model, batches):
        held = [one for one in trainer.callbacks if isinstance(one, updates.PositiveCongruentTraining)]
        begun.append((model.state_dict(), torch.get_rng_state(), len(batches.dataset), len(held)))
        raise KeyboardInterrupt

    monkeypatch.setattr(updates.Trainer, "fit", stopped)
    for _ in range(2):
        torch.rand(7)
        with pytest.raises(KeyboardInterrupt):
            updates._train(update, old, use)
    (first, state, n, held), (second, again, *_) = begun
    assert torch.equal(state, again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    as_old = all(torch.equal(first[name], value) for name, value in old.state_dict().items())
    assert (as_old, n, held) == ("old weights" in update, 256, "congruent" in update)


def test_the_table_names_each_update_once(capsys):
    row = (0.75, 2, 1, 0.125, 0, 1.0)
    names = ("from scratch", "from scratch, repaired", "from scratch, congruent", "from scratch, congruent, repaired")
    updates.print(updates.table_of([dict.fromkeys(names, row)]))
    lines = [line.split("0.75")[0].rstrip() for line in capsys.readouterr().out.splitlines() if "0.75" in line]
    assert [line.strip() for line in lines] == ["from scratch", "repaired", "from scratch, congruent", "repaired"]


def test_the_command_takes_seeds_and_data(monkeypatch, capsys):
    asked = []
    row = (0.75, 2, 1, 0.125, 0, 1.0)
    fakes = {name: lambda *args, name=name, **more: (name, args, more) for name in updates.DATA}
    monkeypatch.setattr(updates, "DATA", fakes)
    monkeypatch.setattr(updates, "updated", lambda update, use: asked.append((update, *use)) or {update: row})
    for line in ("--seeds 2 --first 4", "--data fashion --seeds 1 --epochs 3", "--experiment A --seeds 1"):
        monkeypatch.setattr(sys, "argv", ["updates.py", *line.split(), "--updates", "from scratch"])
        updates.main()
    assert asked == [
        ("from scratch", "vehicles", (4,), {}),
        ("from scratch", "vehicles", (5,), {}),
        ("from scratch", "fashion", (0,), {"epochs": 3}),
        ("from scratch", "vehicles", (0,), {"experiment": "A"}),
    ]
    assert "Updates, means of 2 seeds" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["updates.py", "--data", "fashion", "--experiment", "C"])
    with pytest.raises(SystemExit):
        updates.main()
    assert "`--experiment` is of the vehicles, and --data is fashion\nHINT:" in capsys.readouterr().err


def test_without_garments_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        in_use.fashion(0)
