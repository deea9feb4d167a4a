"""A repair by adapters in a real Trainer: a checkpoint, and a folder that `peft` loads."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Few,
    quick_repair,
    quiet_trainer,
    right,
    same,
    state_of,
)
from self_writing import classifier
from torch import Tensor, nn

from lightning_nrl import RegressionFreeRepair, repair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.methods import FineTunePolish


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_checkpoint_and_the_folder_give_the_same_predictions(tmp_path, network):
    peft = pytest.importorskip("peft")
    model, data = Classifier(network), Few()
    quiet_trainer(tmp_path, max_epochs=3).fit(model, datamodule=data)
    old = copy.deepcopy(model)
    callback = RegressionFreeRepair(lora=4, dirpath=tmp_path / "repair", verbose=False)
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(model, datamodule=data)
    report = callback.report
    assert report is not None
    assert report.status == "repaired"
    assert [step.name for step in report.steps] == ["fit", "polish", "adapter"]
    assert report.steps[0].note.startswith("continued training")
    assert callback.repaired_model_path is not None
    assert same(callback.repaired_model_path, model)

    # The same repair of the same weights, as files of another run in the same folder.
    again = copy.deepcopy(old)
    second = repair(
        quiet_trainer(tmp_path),
        again,
        datamodule=data,
        lora=4,
        dirpath=tmp_path / "repair",
        verbose=False,
    )
    assert second.files["adapter"] == str(tmp_path / "repair" / "adapter")
    assert not list(tmp_path.glob("repair/earlier-*"))
    size = sum(path.stat().st_size for path in (tmp_path / "repair" / "adapter").iterdir())
    assert size < 20_000
    beside = peft.PeftModel.from_pretrained(copy.deepcopy(old), second.files["adapter"])
    for split in (data.train, data.repair, data.test):
        assert torch.equal(right(beside.base_model.model, split), right(again, split))
    assert not (right(old, data.train) & ~right(again, data.train)).any()
    assert int((~right(old, data.repair) & right(again, data.repair)).sum()) > 20
    # Only weights of layers changed, not the statistics of batch norm.
    before, after = state_of(old), state_of(again)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {"mlp": ["1", "3"], "cnn": ["0", "3", "7"]}[network]
    assert names == {f"network.{layer}.weight" for layer in layers}
    assert same(state_of(beside.merge_and_unload()), after)
    assert same(torch.load(second.files["checkpoint"], weights_only=True)["state_dict"], again)


def test_a_module_that_merges_adapters_of_its_own(tmp_path):
    pytest.importorskip("peft")
    model, data = classifier("merge"), Digits()
    quiet_trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    objects = [type(part) for part in model.modules()]
    before = right(model, data.train), right(model, data.repair)
    report = repair(quiet_trainer(tmp_path), model, datamodule=data, lora=4, verbose=False)
    assert report.status == "repaired"
    assert [type(part) for part in model.modules()] == objects
    assert not (before[0] & ~right(model, data.train)).any()
    assert int((~before[1] & right(model, data.repair)).sum()) > 10
    assert same(report.files["checkpoint"], model.train())


def test_a_folder_of_the_user_stays_where_it_is(tmp_path):
    notes = tmp_path / "adapter" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    model, data = Classifier(), Digits()
    callback = quick_repair(dirpath=tmp_path)
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, datamodule=data)
    assert callback.report is not None
    assert callback.report.status == "repaired"
    assert notes.read_text() == "mine"


class Frozen(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.network.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) * self.scale


def test_what_cannot_work_is_refused_before_the_training(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    with pytest.raises(ConfigurationError, match=r"`lora=4`: \w+ changes whole weights"):
        RegressionFreeRepair(lora=4, method="convex")
    model = Frozen()
    before = state_of(model)
    callback = RegressionFreeRepair(lora=4, dirpath=tmp_path / "repair", verbose=False)
    with pytest.raises(ConfigurationError, match="leave `lora` out"):
        quiet_trainer(tmp_path, callback).fit(model, datamodule=Digits())
    assert same(before, model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning_nrl\[lora\]'"):
        FineTunePolish(lora=4)
