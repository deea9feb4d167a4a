"""Repairs of models that do not give one class a sample, each task with each method, through a
Trainer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import quiet_trainer
from lightning_package import TensorBoardLogger, seed_everything
from options import with_options
from task_models import CASES, Case, Data, Net, Tokens, dim, rows_of_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl import (
    ConfigurationError,
    OldModel,
    ParticleSwarm,
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RegressionMetrics,
    RepairReport,
    Target,
    compare,
    diagnose,
    repair,
)
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto
from lightning_nrl.tasks import Multilabel, Sequence
from lightning_nrl.updates import FocalDistillation

SWARM = ParticleSwarm(particles=12, iterations=8)
METHODS: dict[str, Any] = {
    "auto": Auto(SWARM),
    "finetune-polish": "finetune-polish",
    "linearized": "linearized",
    "swarm": SWARM,
}
MARGINS = [name for name in CASES if name != "custom"]


@pytest.fixture
def learned(trained_tasks: dict[str, Path]) -> Callable[[str], tuple[Case, Data, Net]]:
    """A case by its name, its data, and its trained model."""

    def found(name: str) -> tuple[Case, Data, Net]:
        data, model = CASES[name].make()
        model.load_state_dict(torch.load(trained_tasks[name], weights_only=True)["state_dict"])
        return CASES[name], data, model

    return found


def arguments(case: Case, **more: Any) -> dict[str, Any]:
    quick = {
        "task": case.task,
        "unseen": "test",
        "verbose": False,
        "localizer": NeuRecoverLite(n_weights=24),
    }
    return with_options({**quick, **more})


def by_split(case: Case, model: Net, data: Data) -> dict[str, Tensor]:
    return {name: case.counted(model, getattr(data, name)) for name in ("train", "repair", "test")}


def check_counts(report: RepairReport, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for split in report.splits:
        before, after = old[split.split], new[split.split]
        counts = [
            (a & b).sum()
            for a, b in ((before, after), (before, ~after), (~before, after), (~before, ~after))
        ]
        assert [split.kept, split.broken, split.repaired, split.failing] == [
            int(count) for count in counts
        ]
        assert not split.broken or split.role == "unseen"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_each_task_is_repaired_by_each_method_or_refused(
    tmp_path: Path, learned: Any, name: str, method: str
) -> None:
    case, data, model = learned(name)
    old = by_split(case, model, data)
    given, trainer = arguments(case, method=METHODS[method], max_time=30), quiet_trainer(tmp_path)
    if name == "custom" and method in ("finetune-polish", "linearized"):
        with pytest.raises(
            ConfigurationError, match=r"Custom has no `margin`[\s\S]*HINT: [\s\S]*swarm"
        ):
            repair(trainer, model, datamodule=data, **given)
        return
    report = repair(trainer, model, datamodule=data, **given)
    check_counts(report, old, by_split(case, model, data))
    if method == "finetune-polish":
        assert report.status == "repaired", report.reason
    assert f"right means: {case.task}" in re.sub(r"[*`|]", "", report.to_markdown())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, {"method": "convex"}, r"'convex'` needs a class for each sample[\s\S]*HINT: ")
        for name in CASES
    ),
    ("custom", {"method": "finetune-polish"}, "Custom has no `margin`"),
    (
        "multilabel",
        {"set_aside": "doubtful"},
        r"`set_aside='doubtful'` needs a class for each sample[\s\S]*HINT: ",
    ),
    (
        "regression",
        {"target": Target.label(3)},
        "'label 3' asks for classes, and the task has none",
    ),
    ("regression", {"task": "multilabel"}, "multilabel needs logits"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_a_task_lacks_is_refused_before_training(
    tmp_path: Path, name: str, given: dict[str, Any], message: str
) -> None:
    data, model = CASES[name].make()
    trainer = quiet_trainer(tmp_path, RegressionFreeRepair(**arguments(CASES[name], **given)))
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == 0


def test_a_callback_repairs_after_fit_and_tensorboard_says_what_right_means(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    case = CASES["sequence"]
    data, model = case.make()
    callback = RegressionFreeRepair(
        **arguments(case, method="finetune-polish", target=Target.all())
    )
    logger = TensorBoardLogger(tmp_path)
    quiet_trainer(tmp_path, callback, max_epochs=12, logger=logger).fit(model, datamodule=data)
    report = callback.report
    assert report.status == "repaired", report.reason
    new = by_split(case, model, data)
    assert {s.split: s.kept + s.repaired for s in report.splits} == {
        name: int(x.sum()) for name, x in new.items()
    }
    events = EventAccumulator(f"{logger.log_dir}/repair").Reload()
    assert events.Scalars("repair/known_broken")[-1].value == 0
    page = events.Tensors("repair/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Sequence: every token right" in page
    assert RepairReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("name", MARGINS)
def test_a_diagnosis_says_what_can_be_said_without_classes(
    tmp_path: Path, learned: Any, name: str
) -> None:
    case, data, model = learned(name)
    found = diagnose(quiet_trainer(tmp_path), model, datamodule=data, task=case.task)
    assert found.task == str(case.task)
    assert found.known["targeted"] > 0
    # Costs of a swarm are told for a last Linear, which that network does not have.
    swarm = set() if name == "segmentation" else {"swarm"}
    assert (
        set(found.costs)
        == {
            "linearized",
            "finetune-polish",
            "auto",
        }
        | swarm
    )
    page = found.to_markdown()
    assert str(case.task) in page
    assert "convex" not in page


def test_a_comparison_leaves_out_what_needs_classes_and_says_why(
    tmp_path: Path, learned: Any
) -> None:
    case, data, model = learned("multilabel")
    given = {key: value for key, value in arguments(case).items() if key != "verbose"}
    methods = ["convex", "linearized"]
    found = compare(quiet_trainer(tmp_path), model, datamodule=data, methods=methods, **given)
    notes = {entry.method: entry.note for entry in found.entries}
    assert "needs a class for each sample" in notes["convex"]
    assert "needs a class" not in notes["linearized"]


@pytest.mark.parametrize("name", MARGINS)
def test_an_update_repairs_what_the_replaced_model_got_right(
    tmp_path: Path, learned: Any, name: str
) -> None:
    case, data, old = learned(name)
    seed_everything(1, verbose=False)
    _, new = case.make()
    reference = OldModel(old, cache=tmp_path / "old.csv")
    callback = RegressionFreeRepair(
        **arguments(case, reference=reference, method=METHODS["auto"], max_time=6)
    )
    quiet_trainer(tmp_path, callback, max_epochs=12).fit(new, datamodule=data)
    was, now = by_split(case, old, data), by_split(case, new, data)
    for split in callback.report.update:
        assert split.now.broken == int((was[split.split] & ~now[split.split]).sum())
    assert (tmp_path / "old.csv").read_text().startswith("# weights ")


def test_validations_count_regressions_of_any_task(tmp_path: Path, learned: Any) -> None:
    case, data, old = learned("multilabel")
    _, new = case.make()
    data.val_dataloader = data.repair_dataloader
    trainer = quiet_trainer(tmp_path, RegressionMetrics(old, task="multilabel"), max_epochs=2)
    trainer.fit(new, datamodule=data)
    was, now = case.counted(old, data.repair), case.counted(new, data.repair)
    assert trainer.callback_metrics["regression/broken"] == int((was & ~now).sum())
    assert trainer.callback_metrics["regression/repaired"] == int((~was & now).sum())


class TestSequencesOfSeveralLengths:
    """Batches are padded to their longest sample, so that a sample comes in several shapes."""

    @staticmethod
    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        strips, labels = (torch.stack(column) for column in zip(*samples, strict=True))
        longest = int((labels != -100).sum(1).max())
        return strips[:, :, : 8 * longest], labels[:, :longest]

    def data(self) -> Data:
        strips, labels = rows_of_digits(3)
        length = torch.randint(1, 4, (len(labels),), generator=torch.Generator().manual_seed(0))
        # Long ones are rare, so that batches differ.
        length = torch.where(
            torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.95, 2, length
        )
        labels = labels.masked_fill(torch.arange(3) >= length[:, None], -100)
        return Data(strips, labels, dim, self.collate)

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target)

    @pytest.mark.parametrize("method", ["auto", "finetune-polish", "linearized", "swarm"])
    def test_they_are_repaired(self, tmp_path: Path, method: str) -> None:
        seed_everything(0, verbose=False)
        data = self.data()
        shapes = {
            tuple(x.shape[2:]) for x, _ in (*data.train_dataloader(), *data.repair_dataloader())
        }
        assert len(shapes) > 1
        model = Net(Tokens(), self.loss)
        counted = Case(
            Sequence(), self.data, lambda o, y: ((o.argmax(2) == y) | (y < 0)).all(1).tolist()
        )
        callback = RegressionFreeRepair(
            **arguments(counted, method=METHODS[method], layer="network.head")
        )
        quiet_trainer(tmp_path, callback, max_epochs=12).fit(model, datamodule=data)
        report = callback.report
        assert not any(split.broken for split in report.splits if split.role == "known")
        if method == "finetune-polish":
            assert report.status == "repaired", report.reason
        for split in report.splits:
            assert split.kept + split.repaired == int(
                counted.counted(model, getattr(data, split.split)).sum()
            )

    def test_padding_is_not_distilled(self, tmp_path: Path) -> None:
        seed_everything(0, verbose=False)
        data = self.data()
        old, new = (Net(Tokens(), self.loss, lr=0.0) for _ in range(2))
        term = FocalDistillation(base=1.0, focus=0.0)
        trainer = quiet_trainer(
            tmp_path, PositiveCongruentTraining(old, term, task=Sequence()), max_epochs=1
        )
        trainer.fit(new, datamodule=data)
        x, y = data.train.tensors
        with torch.no_grad():
            ours, theirs = (model.network(x).log_softmax(2) for model in (new, old))
        apart, counts = (theirs.exp() * (theirs - ours)).sum(2), y != -100
        expected = float(((apart * counts).sum(1) / counts.sum(1)).mean())
        assert trainer.callback_metrics["regression/focal_distillation"] == pytest.approx(
            expected, rel=1e-4
        )
        assert expected != pytest.approx(float(apart.mean()), rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_training_may_be_held_to_the_replaced_model(
    tmp_path: Path, learned: Any, name: str
) -> None:
    case, data, old = learned(name)
    _, new = case.make()
    terms = ["focal_distillation", "margin_hinge"] if name in MARGINS else ["focal_distillation"]
    trainer = quiet_trainer(
        tmp_path, PositiveCongruentTraining(old, term=terms, task=case.task), max_epochs=1
    )
    trainer.fit(new, datamodule=data)
    assert all(trainer.callback_metrics[f"regression/{term}"].isfinite() for term in terms)


def test_the_task_of_a_cache_must_be_the_same(tmp_path: Path) -> None:
    case = CASES["multilabel"]
    data, old = case.make()
    reference = OldModel(old, cache=tmp_path / "old.csv")
    seals = set()
    for task in (Multilabel(), Multilabel(wrong=1)):
        _, new = case.make()
        given = arguments(case, task=task, reference=reference, method=SWARM, max_time=2)
        quiet_trainer(tmp_path, RegressionFreeRepair(**given), max_epochs=1).fit(
            new, datamodule=data
        )
        seals.add((tmp_path / "old.csv").read_text().splitlines()[0])
    assert len(seals) == 2
