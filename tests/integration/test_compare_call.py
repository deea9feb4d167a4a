"""`compare(trainer, model, ...)`: repairs and baselines on a trained model, which stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, Untrainable, quick_repair, quiet_trainer, right

from lightning_nrl import ConfigurationError, Target, compare
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.analysis.baselines import FineTuning

QUICKLY: dict[str, Any] = {"search": QUICK["search"], "methods": {"swarm": QUICK["method"]}}


def noisy(batch: Any) -> Any:
    return batch[2]


def test_retraining_and_repair_beside_each_other(tmp_path: Path, trained_path: Path) -> None:
    data, model, trainer = Digits(), Classifier(), quiet_trainer(tmp_path, logger=True)
    random, methods = torch.get_rng_state(), {**QUICKLY["methods"], "retraining": "retraining"}
    arguments: dict[str, Any] = {"target": Target.where(noisy), "search": QUICK["search"]}
    comparison = compare(trainer, model, datamodule=data, ckpt_path=trained_path, methods=methods, **arguments)
    # The model holds the checkpoint, the trainer could train now, and nothing was written.
    trained = torch.load(trained_path, weights_only=True)["state_dict"]
    assert hash_tensors(model.state_dict()) == hash_tensors(trained)
    assert (trainer.max_epochs, trainer.should_stop) == (3, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(tmp_path.iterdir())
    model.load_state_dict(trained)
    wrong = ~right(model, data.repair) & data.repair.tensors[2]
    assert comparison.targets == int(wrong.sum()) > 0
    original = comparison["swarm"].curve[0]
    assert original.unseen.passed == int(right(model, data.test).sum())
    assert comparison["swarm"].scaled.known.broken == 0 < comparison["swarm"].scaled.targeted
    # Three epochs from fresh weights on 603 samples are at least as good on noise as on 400 without it.
    given = comparison["retraining"].given
    assert given.known.n == 603
    assert given.targeted > 0


def test_data_loaders_and_no_unseen_data_will_do(tmp_path: Path, trained_path: Path) -> None:
    model = Untrainable.load_from_checkpoint(trained_path)
    data = Digits()
    loaders = data.train_dataloader(), data.repair_dataloader()
    comparison = compare(quiet_trainer(tmp_path), model, *loaders, unseen=None, methods=[FineTuning(epochs=1)])
    (entry,) = comparison.entries
    assert (entry.method, entry.given.unseen.n) == ("FineTuning", 0)
    assert entry.given.known.n == 603


def test_what_cannot_be_compared_is_said_before_anything_runs(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match=r"`methods='retrain'` is unknown"):
        compare(quiet_trainer(tmp_path), trained, datamodule=Digits(), methods=["retrain"])
    with pytest.raises(ConfigurationError, match="`trainer` has a RegressionFreeRepair of its own"):
        compare(quiet_trainer(tmp_path, quick_repair()), trained, datamodule=Digits(), **QUICKLY)
    with pytest.raises(ConfigurationError, match=r"`gate='accuracy'`: a comparison counts[\s\S]*HINT: leave `gate`"):
        compare(quiet_trainer(tmp_path), trained, datamodule=Digits(), gate="accuracy", **QUICKLY)
    with pytest.raises(ConfigurationError, match=r"`method='swarm'`: a comparison runs several"):
        compare(quiet_trainer(tmp_path), trained, datamodule=Digits(), method="swarm")
