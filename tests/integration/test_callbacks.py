"""What holds for each callback: an argument without a meaning is refused at once, a configuration
file is enough.
"""

from __future__ import annotations

import pytest
import yaml
from digit_models import mlp
from test_cli import cli

from lightning_nrl import (
    ConfigurationError,
    OldModel,
    PositiveCongruentTraining,
    RegressionMetrics,
    ReleaseGate,
    RepairInTraining,
    TrainingHistory,
    WeightInterpolation,
)
from lightning_nrl.updates import FocalDistillation, MarginHinge

UPDATES = (PositiveCongruentTraining, RegressionMetrics, ReleaseGate, WeightInterpolation)
REFUSED = [
    *((kind, {"reference": None}, "`reference=None`") for kind in UPDATES),
    *((kind, {"task": "multi-class"}, "`task='multi-class'` is unknown") for kind in UPDATES),
    (ReleaseGate, {"reference": "nowhere.ckpt"}, r"`reference='nowhere\.ckpt'` does not exist"),
    (PositiveCongruentTraining, {"term": "distillation"}, "did you mean 'focal_distillation'"),
    (PositiveCongruentTraining, {"index": "nowhere:ids"}, "`index='nowhere:ids'` was not found"),
    (
        RegressionMetrics,
        {"slices": 3.5},
        "`slices`: a value of type float is not a column of a batch",
    ),
    (RegressionMetrics, {"prefix": ""}, "`prefix=''` is no name"),
    (RegressionMetrics, {"dataloader": -1}, "`dataloader=-1` is out of range"),
    (ReleaseGate, {"rules": "nothing"}, "is no rule"),
    (ReleaseGate, {"require": "net"}, "`require='net'` is unknown"),
    (ReleaseGate, {"loaders": {}}, "`loaders={}` is no mapping of data loaders"),
    (ReleaseGate, {"seed": -1}, "`seed=-1` is out of range"),
    (WeightInterpolation, {"strength": "most"}, "`strength='most'` is no strength"),
    (WeightInterpolation, {"tolerance": -1}, "`tolerance=-1` is no share"),
    (WeightInterpolation, {"calibration": "valid"}, "`calibration='valid'` is no split"),
    (WeightInterpolation, {"calibration": None}, "`strength='auto'` needs calibration data"),
    (WeightInterpolation, {"batches": 0}, "`batches=0` is out of range"),
    (
        WeightInterpolation,
        {"reference": OldModel({}, classes={0: 1})},
        "an OldModel with `classes` has other inputs",
    ),
    (TrainingHistory, {"splits": "validation"}, "is no split"),
    (TrainingHistory, {"every_n_epochs": 0}, "every_n_epochs"),
    (RepairInTraining, {}, "are both None"),
    (RepairInTraining, {"monitor": "loss", "mode": "least"}, "mode"),
    (RepairInTraining, {"monitor": "loss", "min_delta": -1}, "min_delta"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED)
def test_an_argument_without_a_meaning_is_refused_at_once(kind, arguments, message):
    given = {"reference": mlp()} if kind in UPDATES else {}
    with pytest.raises(ConfigurationError, match=message):
        kind(**{**given, **arguments})


def test_predictions_have_no_weights_to_go_back_to(tmp_path):
    (tmp_path / "old.csv").write_text("split,id,prediction\nval,0,1\n")
    with pytest.raises(ConfigurationError, match="it has no weights"):
        WeightInterpolation(tmp_path / "old.csv")


TERM = {"class_path": "lightning_nrl.updates.FocalDistillation", "init_args": {"temperature": 2.0}}
CONFIGURED = [
    (
        PositiveCongruentTraining,
        {"term": [TERM, "margin_hinge"], "index": "digit_models:digit"},
        lambda made: (made.terms, made.index.__name__),
        ((FocalDistillation(temperature=2.0), MarginHinge()), "digit"),
    ),
    (
        RegressionMetrics,
        {"slices": "digit_models:digit", "prefix": "old"},
        lambda made: (made.slices.__name__, made.prefix),
        ("digit", "old"),
    ),
    (
        ReleaseGate,
        {"rules": ["accuracy", "nfr:5%"], "require": "better", "slices": "digit_models:digit"},
        lambda made: [str(rule) for rule in made.criteria.rules],
        ["accuracy", "nfr:5%", "better"],
    ),
    (
        WeightInterpolation,
        {"strength": 0.9, "calibration": "test", "batches": 20},
        lambda made: (made.strength, made.calibration, made.batches, made.tolerance),
        (0.9, "test", 20, 0.005),
    ),
]


@pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", "ignore:[\\s\\S]*deprecated in v4.49.0"
)
@pytest.mark.parametrize(("kind", "written", "look", "expected"), CONFIGURED)
def test_a_configuration_file_is_enough(kind, written, look, expected, trained_path, tmp_path):
    words = yaml.safe_dump({"reference": str(trained_path), **written})
    (made,) = (
        c
        for c in cli(tmp_path, words, run=False, kind=kind).trainer.callbacks
        if isinstance(c, kind)
    )
    assert look(made) == expected
