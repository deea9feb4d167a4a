"""Adapters move instead of weights: merged by hand, and beside the old weights by `peft`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import same, snapshot
from toy_repairs import known, quick, right, trained, unseen

from lightning_nrl import repair_module
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.methods import Convex, FineTunePolish, with_lora
from lightning_nrl.methods.lora import NAME, LoraAdapter

peft = pytest.importorskip("peft")

AS_MERGED = "beside the old weights; 0 known predictions differ from merged"


def ranks(old: dict[str, Tensor], new: Any) -> dict[str, int]:
    return {
        name: int(torch.linalg.matrix_rank(new[name].double() - old[name].double(), rtol=1e-4))
        for name in new
    }


def loaded(model: nn.Module, adapter: LoraAdapter, folder: Path) -> Any:
    """What `peft` makes of a copy of the model and the folder of the adapter."""
    adapter.write(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def test_weights_are_old_weights_and_a_product_of_two_factors(tmp_path):
    model = trained()
    before, objects = snapshot(model), list(model.modules())
    outcome = repair_module(model, known(), quick(method=FineTunePolish(lora=2)), unseen=unseen())
    assert outcome.report.status == "repaired"
    assert outcome.parameters is not None
    # The model is as it was.
    assert same(before, snapshot(model))
    assert list(model.modules()) == objects
    assert not hasattr(model, "peft_config")
    assert all(x.requires_grad and x.grad is None for x in model.parameters())
    # Weights alone have changed, each by a product of rank 2, twice: `lora_alpha` is 4.
    factors = outcome.adapter.state
    assert ranks(before, outcome.parameters) == {"0.weight": 2, "2.weight": 2}
    for layer in ("0", "2"):
        a, b = (factors[f"{layer}.lora_{part}.{NAME}.weight"] for part in "AB")
        by_hand = before[f"{layer}.weight"] + 2 * (b @ a)
        assert torch.equal(outcome.parameters[f"{layer}.weight"], by_hand)
    # `peft` merges to the same bits, and without merging decides alike.
    beside = loaded(model, outcome.adapter, tmp_path / "adapter")
    outcome.write(model)
    for source in (*known(), *unseen()):
        assert torch.equal(right(beside, source), right(model, source))
    assert same(snapshot(model), snapshot(beside.merge_and_unload()))
    step = outcome.report.steps[-1]
    assert (step.name, step.broken) == ("adapter", 0)
    assert step.repaired == outcome.report.steps[-2].repaired > 0
    assert step.note == AS_MERGED


class Net(nn.Module):
    """Layers of all kinds: which of them can have adapters?"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.tied = nn.Linear(4, 4)
        self.also_tied = nn.Linear(4, 4)
        self.also_tied.weight = self.tied.weight
        self.norm = nn.BatchNorm1d(4)
        self.xhead = nn.Linear(4, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 2, 2))
        x = self.circular(self.dilated(self.grouped(x)))
        x = self.block(x.flatten(2).transpose(1, 2)).mean(1)
        return self.head(torch.relu(self.xhead(self.norm(self.also_tied(self.tied(x))))))


def test_only_layers_whose_adapters_do_what_merged_weights_do_have_some():
    model, data = trained(Net, seed=1), known(1)
    names = {"stem", "xhead", "head"}
    outcome = repair_module(model, data, quick(method=FineTunePolish(lora=4)))
    assert outcome.report.status == "repaired"
    assert outcome.adapter is not None
    assert outcome.parameters.keys() == {f"{name}.weight" for name in names}
    assert outcome.report.steps[-1].note == AS_MERGED
    some = peft.LoraConfig(r=3, target_modules=["stem", "xhead"], exclude_modules=["head"])
    outcome = repair_module(model, data, quick(method=FineTunePolish(lora=some)))
    assert outcome.parameters.keys() == {"stem.weight", "xhead.weight"}
    assert outcome.report.steps[-1].note == AS_MERGED
    # The block's fast path would pass adapters of its layers by, in `PeftModel` too.
    with pytest.raises(ConfigurationError, match="can have adapters"):
        LoraAdapter.configured(2, model, [name for name in snapshot(model) if "block" in name])


@pytest.mark.parametrize("strength", [0.8, 1.15])
def test_another_strength_keeps_the_rank(tmp_path, strength):
    model = trained()
    settings = quick(method=FineTunePolish(lora=2), strength=strength, gate="tolerance:20%")
    outcome = repair_module(model, known(), settings)
    assert outcome.parameters is not None
    assert outcome.adapter is not None
    assert set(ranks(snapshot(model), outcome.parameters).values()) == {2}
    merged = loaded(model, outcome.adapter, tmp_path / "adapter").merge_and_unload()
    outcome.write(model)
    for name, value in snapshot(merged).items():
        assert torch.allclose(value, snapshot(model)[name], atol=1e-6)


def test_half_precision_counts_the_rounded_weights(tmp_path):
    model = trained().bfloat16()
    sources = [replace(source, inputs=source.inputs.bfloat16()) for source in known()]
    outcome = repair_module(model, sources, quick(method=FineTunePolish(lora=2)))
    assert outcome.report.status == "repaired"
    assert outcome.adapter is not None
    merged = loaded(model, outcome.adapter, tmp_path / "adapter").merge_and_unload()
    old_right = torch.cat([right(model, source) for source in sources])
    outcome.write(model)
    assert not (old_right & ~torch.cat([right(model, source) for source in sources])).any()
    assert same(snapshot(model), snapshot(merged))


def with_own_adapters(frozen: bool) -> nn.Module:
    model = trained()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["2"])
    peft.inject_adapter_in_model(config, model)
    torch.nn.init.normal_(model[2].lora_B["default"].weight, std=0.1)
    model[0].requires_grad_(not frozen)
    return model


def test_own_adapters_stay_in_use():
    model = with_own_adapters(frozen=False)
    before, config = snapshot(model), model.peft_config
    flags = [x.requires_grad for x in model.parameters()]
    outcome = repair_module(model, known(1), quick(method=FineTunePolish(lora=4)))
    assert outcome.report.status == "repaired"
    assert outcome.parameters.keys() == {"0.weight"}
    assert same(before, snapshot(model))
    assert model.peft_config is config
    assert model[2].active_adapters == ["default"]
    assert [x.requires_grad for x in model.parameters()] == flags
    old_right = torch.cat([right(model, source) for source in known(1)])
    outcome.write(model)
    new_right = torch.cat([right(model, source) for source in known(1)])
    assert not (old_right & ~new_right).any()
    assert int((~old_right & new_right).sum()) > 0


def test_no_layer_is_left_beside_own_adapters():
    model = with_own_adapters(frozen=True)
    with pytest.raises(ConfigurationError, match="leave `lora` out"):
        FineTunePolish(lora=2).check(model)
    outcome = repair_module(model, known(1), quick(method=FineTunePolish()))
    assert outcome.parameters is not None
    assert all("lora_" in name for name in outcome.parameters)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (0, "`lora=0` is out of range"),
        ("8", "`lora='8'` is no rank or `LoraConfig`"),
        (peft.LoraConfig(use_dora=True), "`use_dora=True` is not plain LoRA"),
        (peft.LoraConfig(bias="all"), "`bias='all'` is not plain LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused(lora, words):
    with pytest.raises(ConfigurationError, match=words):
        FineTunePolish(lora=lora)


def test_other_methods_and_options_are_refused():
    assert with_lora(FineTunePolish(0.5), 2) == FineTunePolish(0.5, lora=2)
    with pytest.raises(ConfigurationError, match=r"`lora=2`: Convex changes whole weights"):
        with_lora(Convex(), 2)
    with pytest.raises(ConfigurationError, match=r"`sparse=0.1`: .* no low rank"):
        quick(method=FineTunePolish(lora=2), sparse=0.1)
    with pytest.raises(ConfigurationError, match="convolution"):
        FineTunePolish(lora=2).check(nn.LSTM(2, 2))
