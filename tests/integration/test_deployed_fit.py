"""What is judged is what is deployed: counts of a repair beside those of the module's own
validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deployed_models as models
import pytest
import torch
from digit_models import QUICK, Remember, quiet_trainer
from lightning_package import Callback

from lightning_nrl import ConfigurationError, DataOptions, RegressionFreeRepair, RegressionMetrics
from lightning_nrl.errors import DataWarning

ADAPTER = "deployed_models:predict"


class Training(Exception):
    """The rehearsal is over."""


class StopBeforeTraining(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise Training


def rehearse(tmp_path: Path, module: Any, adapter: Any = None, output: str | None = None) -> None:
    repair = RegressionFreeRepair(data=DataOptions(adapter=adapter, output=output), **QUICK)
    trainer = quiet_trainer(tmp_path, repair, StopBeforeTraining(), enable_checkpointing=False)
    trainer.fit(module, datamodule=models.Clusters())


@pytest.mark.parametrize("kind", ["Mixed", "Flipped", "Predicts", "PredictsProbabilities"])
def test_what_agrees_beyond_augmentation_and_regularisation_goes_on(tmp_path, kind):
    with pytest.raises(Training):
        rehearse(tmp_path, getattr(models, kind)())


class AveragesDraws(models.Plain):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self(torch.dropout(batch[0], 0.3, train=True)) for _ in range(8)) / 8


def test_predictions_that_are_drawn_are_named_as_the_cause(tmp_path):
    with (
        pytest.raises(Training),
        pytest.warns(DataWarning, match="`model`: its predictions are random"),
    ):
        rehearse(tmp_path, AveragesDraws(), output="logits")


def test_the_users_own_adapter_is_believed(tmp_path):
    module = models.BothNormalise()
    with pytest.raises(Training):
        rehearse(tmp_path, module, ADAPTER)
    with pytest.raises(Training), pytest.warns(DataWarning, match="other inputs"):
        rehearse(tmp_path, module, lambda module, batch: (module(batch[0]), batch[1]))
    # Forward stands for a step that predicts the same classes.
    with (
        pytest.raises(Training),
        pytest.warns(DataWarning, match="no logits, so `forward` is used instead"),
    ):
        rehearse(tmp_path, models.PredictsClasses())


OTHER_INPUTS = r"`{}` gives the layer 'net.2' other inputs.* loss .*\nHINT"


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("StepNormalises", OTHER_INPUTS.format("training_step")),
        ("StepNormalisesWithNoise", OTHER_INPUTS.format("training_step")),
        ("BothNormalise", OTHER_INPUTS.format("validation_step")),
        (
            "PredictsWithItsTeacher",
            r"`argmax` \(in `validation_step`\)[\s\S]*HINT[\s\S]*`output='logits'`",
        ),
        ("WithoutForward", "no `forward` and no `predict_step`(.|\n)*def predict"),
        ("SavesAverage", "does not save 'net.2.weight' as it is"),
    ],
)
def test_what_cannot_be_repaired_is_refused_before_training(tmp_path, kind, match):
    with pytest.raises(ConfigurationError, match=match):
        rehearse(tmp_path, getattr(models, kind)())


@pytest.mark.parametrize(
    ("kind", "adapter", "layer"),
    [
        ("PredictsProbabilities", None, "net.2"),
        ("WithoutForward", ADAPTER, "net.2"),
        ("LeavesOut", None, "net.2"),
        ("Averages", None, "average.2"),
    ],
)
def test_counts_are_those_of_the_own_validation(tmp_path, kind, adapter, layer):
    module, data = getattr(models, kind)(), models.Clusters()
    repair = RegressionFreeRepair(data=DataOptions(adapter=adapter), **QUICK)
    quiet_trainer(
        tmp_path, trained := Remember(), repair, max_epochs=2, enable_checkpointing=False
    ).fit(module, data)
    assert repair.report.layers == (layer,)
    [split] = [split for split in repair.report.splits if split.split == "val"]
    assert split.repaired

    def right(state: dict[str, Any]) -> int:
        other = getattr(models, kind)()
        other.load_state_dict(state, strict=kind != "LeavesOut")
        trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
        return round(trainer.validate(other, data, verbose=False)[0]["right"] * split.n)

    assert right(trained.state) == split.counts.kept + split.counts.broken
    repaired = torch.load(repair.repaired_model_path, weights_only=True)["state_dict"]
    assert repaired.keys() == trained.state.keys()
    assert right(repaired) == split.counts.kept + split.counts.repaired


def test_a_prediction_of_several_inputs_is_made_from_their_tuple(tmp_path):
    data = models.Clusters()
    data.train, data.val = (
        [((x[:3], x[3:]), y) for x, y in split] for split in (data.train, data.val)
    )
    module = models.PredictsTuples()
    repair = RegressionFreeRepair(**QUICK, data=DataOptions(output="logits"))
    quiet_trainer(tmp_path, repair, max_epochs=1, enable_checkpointing=False).fit(module, data)
    with torch.no_grad():
        right = [
            int(module.predict_step([x.unsqueeze(0) for x in inputs], 0).argmax()) == y
            for inputs, y in data.val
        ]
    [split] = [split for split in repair.report.splits if split.split == "val"]
    assert sum(right) == split.kept + split.repaired


def test_an_update_is_counted_on_what_is_deployed(tmp_path):
    module, data = models.Predicts(), models.Clusters()
    metrics = RegressionMetrics(models.Predicts())
    trainer = quiet_trainer(tmp_path, metrics, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data)
    own = trainer.validate(module, data, verbose=False)[0]
    assert own["regression/accuracy"] == pytest.approx(float(own["right"]))
    assert own["regression/accuracy"] > own["regression/reference_accuracy"]


def test_the_module_is_as_found_after_its_step(tmp_path):
    class Remembers(models.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.seen = []
            self.total = torch.zeros(1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.seen.append(len(batch[0]))
            self.total += 1
            self.count = 1

    module = Remembers()
    with pytest.raises(Training):
        rehearse(tmp_path, module)
    sanity = [40, 40]
    assert module.seen == sanity
    assert module.total.item() == len(sanity)
    assert module.training
    assert "log" not in vars(module)
