"""The release gate in `trainer.test` and `trainer.validate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deployed_models
import pytest
import torch
from digit_models import Classifier, Digits, digit, is_noisy, quiet_trainer, right
from lightning_package import LightningModule, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, RegressionMetrics, ReleaseGate
from lightning_nrl._trainer.reading import loaders
from lightning_nrl.errors import DataWarning, ModelError, OtherRankError
from lightning_nrl.release import ProtectedIntact, ReleaseReport
from lightning_nrl.updates import Predictions

RULES = ["accuracy", "nfr:10%", "slices"]


@pytest.fixture
def new(trained: Classifier) -> Classifier:
    """Another model: the last layer moved a little."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        trained.network[3].weight.add_(0.1 * torch.randn_like(trained.network[3].weight))
    return trained


def gate_of(reference: Any, **arguments: Any) -> ReleaseGate:
    return ReleaseGate(
        reference, **{"rules": RULES, "slices": digit, "verbose": False, **arguments}
    )


def report_of(
    gate: ReleaseGate, model: LightningModule, folder: Path, data: Any = None, **arguments: Any
) -> ReleaseReport:
    """The report after a test of the model, on `Digits` unless other data are given."""
    trainer = quiet_trainer(folder, gate, enable_checkpointing=False, **arguments)
    trainer.test(model, Digits() if data is None else data, verbose=False)
    return gate.report


def test_the_test_is_followed_by_a_verdict(old, new, trained_path, tmp_path, capsys):
    data = Digits()
    was, now = right(old, data.test), right(new, data.test)
    gate = gate_of(trained_path, rules=["instance", ProtectedIntact(where=is_noisy)], verbose=True)
    trainer = quiet_trainer(tmp_path, gate, enable_checkpointing=False)
    (metrics,) = trainer.test(new, datamodule=data, verbose=False)
    report = gate.report
    broken = (was & ~now).nonzero().flatten().tolist()
    assert broken
    assert report.broken_ids == {"test": broken}
    assert report.findings[1].ids["test"] == [at for at in broken if data.test.tensors[2][at]]
    assert (report.status, report.exit_status) == ("refused", 1)
    assert [row.slice for row in report.rows] == ["", *map(str, range(10))]
    assert metrics["release/accepted"] == 0.0
    assert metrics["release/test/broken"] == len(broken)
    assert metrics["release/test/accuracy"] == pytest.approx(int(now.sum()) / len(now))
    assert ReleaseReport.from_json((tmp_path / "release" / "report.json").read_text()) == report
    assert (tmp_path / "release" / "report.md").read_text() == report.to_markdown()
    assert "REFUSED" in capsys.readouterr().out


def test_predictions_of_the_user_are_not_replaced(old, tmp_path):
    (tmp_path / "predictions.csv").write_text("split,id,prediction\n")
    gate = gate_of(old, rules="instance", dirpath=tmp_path)
    with pytest.raises(ConfigurationError, match=r"predictions\.csv is no file of this package"):
        report_of(gate, old, tmp_path)


def test_validate_and_test_are_judged_and_fit_is_not(old, new, trained_path, tmp_path):
    gate = gate_of(old, rules="instance")
    trainer = quiet_trainer(tmp_path, gate, enable_checkpointing=False, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Digits())
    assert gate.report is None
    trainer.validate(old, datamodule=Digits(), verbose=False)
    assert gate.report.accepted
    assert gate.report.rows[0].split == "val"
    assert trainer.callback_metrics["release/accepted"] == 1.0
    trainer.test(new, ckpt_path=trained_path, datamodule=Digits(), verbose=False)
    assert gate.report.accepted
    assert gate.report.new.name == f"Classifier from {trained_path}"
    assert gate.report.new.sha256 == gate.report.old.sha256


class PredictsInPlace(deployed_models.Predicts):
    """Normalises in place, and predicts without gradients."""

    def inputs(self, x: Tensor) -> Tensor:
        return x.sub_(128).div_(40)

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().predict_step([batch[0].clone()], batch_idx)


@pytest.mark.parametrize("kind", [deployed_models.Predicts, PredictsInPlace])
def test_a_module_is_judged_by_its_predict_step(kind, tmp_path):
    model, data = kind(), deployed_models.Clusters()
    gate = ReleaseGate(kind(), "accuracy", verbose=False)
    trainer = quiet_trainer(tmp_path, gate, enable_checkpointing=False)
    (metrics,) = trainer.validate(model, data, verbose=False)
    assert metrics["release/val/accuracy"] == pytest.approx(metrics["right"])


@pytest.mark.parametrize("kind", [ReleaseGate, RegressionMetrics])
def test_a_step_that_changes_the_inputs_is_refused(kind, tmp_path):
    model, data = deployed_models.BothNormalise(), deployed_models.Clusters()
    trainer = quiet_trainer(tmp_path, kind(deployed_models.BothNormalise()))
    with pytest.raises(ConfigurationError, match=r"`validation_step` gives .*'net.2' other"):
        trainer.validate(model, data, verbose=False)


class Several(Digits):
    """Two data loaders, as a list or with names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def test_dataloader(self) -> Any:
        loaders = [DataLoader(self.val, 64), DataLoader(self.test, 64, shuffle=True)]
        if self.names[0] == "test:0":
            return loaders
        return dict(zip(self.names, loaders, strict=True))


class Plain(Classifier):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize("names", [["test:0", "test:1"], ["suite", "later"]])
def test_each_data_loader_is_a_split(names, old, tmp_path):
    model = Plain()
    model.load_state_dict(old.state_dict())
    gate = gate_of(old, rules=[f"instance in {names[0]}", f"nfr:5% in {names[1]}"])
    report = report_of(gate, model, tmp_path, Several(names))
    assert report.accepted
    assert [(row.split, row.counts.n) for row in report.rows if not row.slice] == [
        (names[0], 100),
        (names[1], 300),
    ]


def test_a_report_is_kept_beside_the_next_and_a_fast_run_writes_none(old, tmp_path):
    gate = gate_of(old, junit=tmp_path / "release.xml")
    fast = report_of(gate, old, tmp_path, fast_dev_run=True)
    assert fast.rows[0].counts.n == 64
    assert not fast.files
    assert not list(tmp_path.glob("release*"))
    _, second = (report_of(gate, old, tmp_path) for _ in range(2))
    assert Path(second.files["json"]).parent == tmp_path / "release-1"
    assert (tmp_path / "release" / "report.json").exists()
    assert (tmp_path / "release.xml").exists()


def test_tensorboard_shows_the_page_and_the_numbers(old, new, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    report = report_of(gate_of(old), new, tmp_path, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    (page,) = events.Tensors("release/report/text_summary")
    assert page.tensor_proto.string_val[0].decode() == report.to_markdown()
    (point,) = events.Scalars("release/test/nfr_upper")
    assert point.value == pytest.approx(report.rows[0].upper)
    assert Path(report.files["json"]).parent == Path(logger.log_dir) / "release"


def test_it_is_the_deployed_precision_that_is_judged(old, new, tmp_path):
    data = Digits()
    report = report_of(gate_of(old), new, tmp_path, data, precision="bf16-mixed")
    assert report.precision == "float32 on cpu, autocast to bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        broken = right(old, data.test) & ~right(new, data.test)
    assert report.rows[0].counts.broken == int(broken.sum())


class Untested(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the test has begun")


class Stream(IterableDataset):
    """The first test data, in order."""

    def __init__(self, n: int = 300) -> None:
        self.n = n

    def __iter__(self) -> Any:
        yield from Subset(Digits().test, range(self.n))


class WrittenTo(Classifier):
    """Normalises its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5).mul_(2))


def test_a_stream_and_loaders_of_ones_own_are_judged(old, new, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(loaders, "PIECE_SIZE", 3)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    changed = WrittenTo()
    changed.load_state_dict(new.state_dict())
    stream = DataLoader(Stream(), 16)
    whole_batches = DataLoader([stream.collate_fn(list(Stream()))], batch_size=None)
    rules = [*RULES, ProtectedIntact(where=is_noisy)]
    reports = []
    for data in (DataLoader(Digits().test, 16), stream, whole_batches):
        gate = gate_of(tmp_path / "old.pt", rules=rules, loaders={"suite": data})
        reports.append(report_of(gate, changed, tmp_path, DataLoader(Stream(100), 50)))
    assert not any("random" in str(warning.message) for warning in recwarn)
    expected = reports[0]
    assert expected.rows[0].counts.broken == int(
        (right(old, Digits().test) & ~right(new, Digits().test)).sum()
    )
    for report in reports:
        assert (report.rows, report.findings) == (expected.rows, expected.findings)
        assert report.broken_ids == expected.broken_ids


@pytest.mark.parametrize("data", [Digits().test, Stream()])
def test_a_limited_test_says_how_much_was_seen(data, old, new, tmp_path):
    report = report_of(gate_of(old), new, tmp_path, DataLoader(data, 10), limit_test_batches=2)
    seen = "20 samples" if isinstance(data, Stream) else "20 of 300 samples"
    assert f"{seen} were compared: limit_test_batches=2." in report.to_markdown()
    with pytest.raises(ConfigurationError, match="is no mapping of data loaders"):
        gate_of(old, loaders=DataLoader(data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": "instance in suite"}, r"names the split 'suite', but the data have \['test'\]"),
        ({"rules": "slices", "slices": None}, "the rule `slices` needs slices"),
        ({"loaders": {"night": DataLoader(Stream(0))}}, "`night` data are empty"),
        ({"loaders": {"night": Stream()}}, "`night` data: found Stream, not a DataLoader"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, message, old, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        report_of(gate_of(old, **arguments), Untested(), tmp_path)


class Odd(Digits):
    """203 samples, which two ranks cannot share evenly."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.repair, range(203)), 64)


def judged(folder: Path, name: str, strategy: str = "auto", devices: int = 1) -> ReleaseReport:
    """A test of one model against another, which differ by their seed; the report without its
    files.
    """
    model = Classifier()
    model.load_state_dict(torch.load(folder / "trained.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        model.network[3].weight.mul_(torch.linspace(0.5, 1.5, 10)[:, None])
    rules = [*RULES, ProtectedIntact(where=is_noisy)]
    gate = gate_of(folder / "trained.ckpt", rules=rules, dirpath=folder / name)
    return report_of(gate, model, folder, Odd(), strategy=strategy, devices=devices)


def test_two_processes_judge_as_one(trained_path):
    folder = trained_path.parent
    alone = judged(folder, "alone")
    reports = in_two_processes(judged, folder, "together", "ddp", 2)
    assert alone.rows[0].counts.n == 203
    assert alone.rows[0].counts.broken > 0
    for together in reports:
        assert (together.findings, together.rows) == (alone.findings, alone.rows)
        assert (together.provenance, together.new, together.old) == (
            alone.provenance,
            alone.new,
            alone.old,
        )
    one, two = (
        Predictions.read(folder / name / "predictions.csv") for name in ("alone", "together")
    )
    assert two == replace(one, confidences=two.confidences)
    assert two.confidences == pytest.approx(one.confidences, abs=1e-5)


class TornOnRank1(Digits):
    """The second rank cannot read the data."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Torn(), 4)


class Torn(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        if torch.distributed.get_rank():
            raise OSError("no such image")
        return torch.zeros(1, 8, 8), 0, False


def error_of(folder: Path) -> str:
    gate = gate_of(Classifier())
    with pytest.raises((OSError, OtherRankError)) as error:
        report_of(gate, Classifier(), folder, TornOnRank1(), strategy="ddp", devices=2)
    return str(error.value)


def test_the_other_rank_names_the_cause(tmp_path):
    other, torn = in_two_processes(error_of, tmp_path)
    assert torn == "no such image"
    cause = "the prediction could not be tried on another rank. OSError: no such image\nHINT: "
    assert other.startswith(cause)


class Reordered(Digits):
    """The test data with two samples of one class exchanged, or with a row inserted."""

    def __init__(self, change: str) -> None:
        super().__init__()
        rows = torch.arange(300)
        if change == "inserted":
            rows = torch.cat([rows[:7], rows[:-7]])
        else:
            same_class = (self.test.tensors[1] == 3).nonzero().flatten()[:2]
            rows[same_class] = same_class.flip(0)
        self.test = TensorDataset(*(column[rows] for column in self.test.tensors))


def test_predictions_of_other_samples_are_refused(old, new, tmp_path):
    file = report_of(gate_of(old), old, tmp_path).files["predictions"]
    by_file = report_of(gate_of(file), new, tmp_path, Digits(batch_size=5))
    report = report_of(gate_of(old), new, tmp_path)
    assert (by_file.findings, by_file.rows) == (report.findings, report.rows)
    # A row inserted at 7 is found in the first batch of 64, before the test.
    for change, n in (("exchanged", 2), ("inserted", 57)):
        message = rf"`reference`: {n} samples of `test` are not those that were predicted"
        with pytest.raises(ConfigurationError, match=message):
            report_of(gate_of(file), new, tmp_path, Reordered(change))
    # Without the identities, `passed` contradicts the labels.
    lines = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([line.rpartition(",")[0] for line in lines]))
    with pytest.raises(ConfigurationError, match="have a label that contradicts `passed`"):
        report_of(gate_of(file), new, tmp_path, Reordered("inserted"))


def test_a_test_of_nothing_leaves_no_earlier_verdict(old, tmp_path):
    gate = gate_of(old)
    with pytest.warns(DataWarning, match="`reference` is the tested model itself"):
        assert report_of(gate, old, tmp_path).accepted
    with pytest.raises(ConfigurationError, match=r"no sample was read \(limit_test_batches=0\)"):
        report_of(gate, old, tmp_path, limit_test_batches=0)
    assert gate.report is None


class Pickled:
    """What a checkpoint holds that is loaded with its code only."""


def test_a_reference_that_cannot_be_read_is_refused_before_the_test(tmp_path):
    torch.save({"state_dict": {}, "settings": Pickled()}, tmp_path / "old.ckpt")
    with pytest.raises(ConfigurationError, match="`reference"):
        report_of(gate_of(tmp_path / "old.ckpt"), Untested(), tmp_path)


def test_a_reference_that_cannot_run_is_refused_before_the_test(tmp_path):
    with pytest.raises(ModelError, match="`reference`: Linear raised RuntimeError on batch 0 of"):
        report_of(gate_of(nn.Linear(3, 10)), Untested(), tmp_path)


class Words(LightningModule):
    """Knows some words."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.layer = nn.Embedding(n_words, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(words)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1])


def test_a_word_that_the_old_model_does_not_know_is_named(tmp_path):
    loader = DataLoader(TensorDataset(torch.arange(60), torch.arange(60) % 3), 8)
    message = "`reference`: Words raised IndexError on batch 6 of `test` data, from sample 48 on"
    with pytest.raises(ModelError, match=message) as error:
        report_of(ReleaseGate(Words(50)), Words(60), tmp_path, loader)
    assert isinstance(error.value.__cause__, IndexError)


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.samples = iter(Subset(Digits().test, range(8)))

    def __iter__(self) -> Any:
        return self.samples


def test_a_stream_that_ends_before_it_is_judged_is_refused(old, tmp_path):
    gate = gate_of(old, loaders={"night": DataLoader(Once(), 8)})
    with pytest.raises(ConfigurationError, match=r"`night` data are empty\.\nHINT: .*once"):
        report_of(gate, Untested(), tmp_path, DataLoader(Stream(), 50))
