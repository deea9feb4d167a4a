"""Attempts to talk the gate round: none of them is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from junitparser import Error, JUnitXml
from lightning_package import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_nrl import ConfigurationError, RegressionFreeRepair, ReleaseGate
from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import UnwritableFolderError
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.release import ReleaseReport
from lightning_nrl.release.model_pair import near_copies

pytestmark = [pytest.mark.filterwarnings("ignore:[\\s\\S]*deprecated")]

HEADER = "split,id,prediction,passed,key\n"
OLD, NEW = "+" * 100, "+" * 90 + "-" * 10


def rows(right: str, split: str = "test", key: str = "k{}") -> list[str]:
    """Predictions of class 1: `+` for a right sample, `-` for a wrong one."""
    return [
        f"{split},{at},{int(c == '+')},{int(c == '+')},{key.format(at)}"
        for at, c in enumerate(right)
    ]


def sure(right: str, confidence: str = "0.9", key: str = "k{}") -> list[str]:
    """The same with a confidence. The header has a sixth column only if the rows have one."""
    return [f"{row},{confidence}" for row in rows(right, key=key)]


def slices(*names: str) -> str:
    lines = [f"test,{at},{names[at % len(names)]}" for at in range(100)]
    return "split,id,slice\n" + "\n".join(lines)


def suite(line: str) -> dict[str, str]:
    return {"suite.csv": f"split,id,label,since,reason,key\n{line}"}


def rule(text: str, *more: str) -> list[str]:
    return ["--require", "any", "--rule", text, *more]


@dataclass(frozen=True)
class Attempt:
    """Two files of predictions, the arguments, further files, and the exit status.

    `header` is that of the new predictions.
    """

    status: int
    arguments: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    old: Sequence[str] = tuple(rows(OLD))
    new: Sequence[str] = tuple(rows(NEW))
    header: str = HEADER


KEPT = rows(OLD)
SUITE = rule("tolerance:50", "--suite", "suite.csv")
SLICED = rule("slices", "--slices", "slices.csv")
SLICED_SUITE = {"suite.csv": slices("night")}
SMALL_SLICES = {"slices.csv": slices(*map(str, range(10)))}
ONE_SAMPLE = rows("+" * 400, key="k")
SLIGHTLY_BELOW = rows("+" * 95 + "-" * 5)
NIGHT = {"slices.csv": slices("night")}
SWAPPED = rows("+" * 20 + "-" * 20 + "+" * 60), rows("-" * 20 + "+" * 80)
SURE_ONE_SAMPLE = sure("+" * 400, key="k")
ATTEMPTS = {
    "the change as it is": Attempt(1),
    "no predictions": Attempt(2, new=[]),
    "an id twice, right at last": Attempt(2, new=rows(NEW) + KEPT[95:]),
    "what broke left out": Attempt(2, new=rows(NEW[:90])),
    "another split may lack samples": Attempt(2, ["--allow-missing", "val"], new=rows(NEW[:90])),
    "a renamed split": Attempt(2, new=rows(OLD, "later")),
    "samples in another order": Attempt(2, new=rows(OLD, key="k1{}")),
    "an id in other digits": Attempt(2, new=[*KEPT[:-1], "test,\uff19\uff19,1,1,"]),
    "no word on what is right": Attempt(2, new=[row.replace(",0,0,", ",0,,") for row in rows(NEW)]),
    "right and wrong at once": Attempt(2, new=[row.replace(",0,0,", ",1,0,") for row in rows(NEW)]),
    "right by two predictions": Attempt(2, new=[row.replace(",1,1,k", ",2,1,k") for row in KEPT]),
    "nothing right before": Attempt(3, old=rows("-" * 100), new=rows("-" * 100)),
    "one easy sample many times": Attempt(3, rule("nfr:1%"), old=ONE_SAMPLE, new=ONE_SAMPLE),
    "a slice under two names": Attempt(2, SLICED, {"slices.csv": slices("night", "Night ")}),
    "no sample in a slice": Attempt(2, SLICED, {"slices.csv": slices("")}),
    "slices too small to judge": Attempt(
        3, rule("slice-nfr:5%", "--slices", "slices.csv"), SMALL_SLICES, new=KEPT
    ),
    "a rule for no split": Attempt(2, rule("instance in x")),
    "a limit of everything": Attempt(2, rule("nfr:100%")),
    "a floor of nothing": Attempt(2, rule("floor:0%")),
    "a limit that is no number": Attempt(2, rule("nfr:nan%")),
    "an infinite tolerance": Attempt(2, rule("tolerance:inf")),
    "a rule that nothing can satisfy yet": Attempt(3, ["--require", "better"], new=KEPT),
    "a floor with 5 % confidence": Attempt(2, rule("floor:96%:5%"), new=SLIGHTLY_BELOW),
    "a limit with 5 % confidence": Attempt(2, rule("nfr:0.2%:5%"), new=SLIGHTLY_BELOW),
    "slices at a level of 90 %": Attempt(2, ["--rule", "slices:90%", *SLICED[4:]], NIGHT, new=KEPT),
    "one sample or all": Attempt(2, rule("tolerance:1.0")),
    "equivalence with 5 % confidence": Attempt(2, rule("equivalent:1%:5%"), new=KEPT),
    "equivalence of too few samples": Attempt(3, rule("equivalent:1%"), new=KEPT),
    "equivalence of one sample many times": Attempt(
        3, rule("equivalent:1%"), old=ONE_SAMPLE, new=ONE_SAMPLE
    ),
    "breaks that repairs hide": Attempt(3, rule("non-inferior:5%"), old=SWAPPED[0], new=SWAPPED[1]),
    "calibration without confidences": Attempt(2, rule("calibration:50%"), new=KEPT),
    "a confidence in the new file alone": Attempt(2, rule("calibration:50%"), new=sure(OLD)),
    "a confidence for all samples but one": Attempt(
        2, rule("calibration:50%"), old=sure(OLD), new=[*sure(OLD)[:-1], f"{KEPT[-1]},"]
    ),
    "a confidence above 1": Attempt(
        2, rule("calibration:50%"), old=sure(OLD), new=sure(OLD, "1.01")
    ),
    "a confidence that is no number": Attempt(
        2, rule("calibration:50%"), old=sure(OLD), new=sure(OLD, "nan")
    ),
    "calibration of one sample many times": Attempt(
        3, rule("calibration:1%"), old=SURE_ONE_SAMPLE, new=SURE_ONE_SAMPLE
    ),
    "a noise floor does not excuse": Attempt(1, ["--noise", "old.csv", "new.csv"]),
    "a noise of one training": Attempt(2, ["--noise", "old.csv", "old.csv"], new=KEPT),
    "a noise of other samples": Attempt(
        2, ["--noise", "old.csv", "b.csv"], {"b.csv": HEADER + "\n".join(rows(OLD, key="k1{}"))}
    ),
    "a noise without the samples that broke": Attempt(
        2, ["--noise", "old.csv", "b.csv"], {"b.csv": HEADER + "\n".join(rows(NEW[:90]))}
    ),
    "a wrong word for undecided": Attempt(2, ["--on-undecided", "yes"], new=KEPT),
    "an emptied suite": Attempt(2, SUITE, suite("")),
    "a suite that is gone": Attempt(2, SUITE),
    "a suite of another split": Attempt(2, SUITE, suite("Test,95,1,2026-01-01,,")),
    "a suite of ids that are gone": Attempt(2, SUITE, suite("test,950,1,2026-01-01,,")),
    "a suite of moved samples": Attempt(2, SUITE, suite("test,3,1,2026-01-01,,k95")),
    "a misspelt column of the suite": Attempt(
        2, SUITE, {"suite.csv": "split,id,sinse\ntest,95,2026-01-01"}
    ),
    "a capital in a column": Attempt(2, SUITE, {"suite.csv": "split,id,Since\ntest,95,2026-01-01"}),
    "a suite without a header": Attempt(2, SUITE, {"suite.csv": "test,95"}),
    "a suite of slices": Attempt(2, SUITE, SLICED_SUITE),
    "a day that is none": Attempt(2, SUITE, suite("test,95,1,never,,")),
    "a day that comes never": Attempt(2, SUITE, suite("test,95,1,2026-02-30,,")),
    "a day in another order": Attempt(2, SUITE, suite("test,95,1,01/02/2026,,")),
    "a space for a day": Attempt(2, SUITE, suite("test,95,1, ,,"), old=rows(NEW)),
    "a line that is commented out": Attempt(2, SUITE, suite("#test,95,1,2026-01-01,,")),
    "a line without its commas": Attempt(2, SUITE, suite("test,95")),
    "a label that is none": Attempt(2, SUITE, suite("test,95,one,2026-01-01,,")),
    "another label": Attempt(2, SUITE, suite("test,95,0,2026-01-01,,")),
    "a sample under two numbers": Attempt(2, SUITE, suite("test,3,,,,\ntest,03,,,,"), new=KEPT),
    "a sample that broke, without a day": Attempt(1, SUITE, suite("test,95,,,,")),
    "a folder for a suite": Attempt(2, rule("tolerance:50", "--suite", ".")),
    "a suite that may not grow": Attempt(
        1, [*SUITE, "--grow", "false"], suite("test,95,1,2026-01-01,,"), old=rows(NEW)
    ),
    "a sample that the new model was not shown": Attempt(
        2, [*SUITE, "--allow-missing", "test"], suite("test,95,,,,"), new=KEPT[:90]
    ),
    "a column of predictions misspelt": Attempt(
        2, new=[row.replace("k", "") for row in rows(NEW)], header=HEADER.replace("key", "kye")
    ),
    "a sample of the suite twice": Attempt(2, SUITE, suite("test,3,,,,\ntest,3,,,,"), new=KEPT),
    "an old model that had lost it": Attempt(
        1, SUITE, suite("test,95,1,2026-01-01,,"), old=rows(NEW)
    ),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_attempt_is_accepted(attempt, tmp_path, monkeypatch):
    made = ATTEMPTS[attempt]
    monkeypatch.chdir(tmp_path)
    for name, header, lines in (
        ("old.csv", HEADER, made.old),
        ("new.csv", made.header, made.new),
    ):
        if lines and lines[0].count(",") > header.count(","):
            header = HEADER.replace("key", "key,confidence")
        Path(name).write_text(header + "\n".join(lines) + "\n")
    for name, text in made.files.items():
        Path(name).write_text(text + "\n")
    assert main(["release", "old.csv", "new.csv", *made.arguments]) == made.status
    for name, text in made.files.items():
        assert Path(name).read_text() == text + "\n"


def test_a_junit_file_of_before_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text(HEADER + "\n".join(rows(OLD)))
    Path("new.csv").write_text(HEADER + "\n".join(rows(NEW)))
    Path("release.xml").write_text("<testsuites><testsuite name='forged' tests='1'/></testsuites>")
    assert main(["release", "old.csv", "new.csv", "--junit", "release.xml"]) == 1
    text = Path("release.xml").read_text()
    assert "forged" not in text
    assert "<failure" in text


def test_equal_models_are_said_to_be_equal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text("# weights abc\n" + HEADER + "\n".join(rows(OLD)))
    assert main(["release", "new.csv", "new.csv"]) == 0
    assert "Both models have the same weights" in " ".join(capsys.readouterr().out.split())


class Line(LightningModule):
    """Classifies points; its `forward` can be changed, as in a pull request."""

    change: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, points: Tensor) -> Tensor:
        return type(self).change(self.layer(points))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing(Line):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("no such image")


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x + 0.5 * torch.randn(n, 4, generator=generator))[:, :3].argmax(1)


class Points(LightningDataModule):
    """`change` makes the test data from the training data and the original test data."""

    change: Callable[[Dataset, Dataset], Any] = staticmethod(lambda train, test: test)

    def __init__(self) -> None:
        super().__init__()
        self.train = TensorDataset(*points(300, 1))
        self.test = TensorDataset(*points(400, 2))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 100, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 100)

    def test_dataloader(self) -> Any:
        data = type(self).change(self.train, self.test)
        return data if isinstance(data, dict) else DataLoader(data, 100)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = Line()
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(3, 4))
        model.layer.bias.zero_()
    trainer = quiet(max_epochs=0)
    trainer.fit(model, datamodule=Points())
    old = folder / "old.ckpt"
    trainer.save_checkpoint(old)
    with torch.no_grad():
        model.layer.weight.mul_(1.5)
    trainer.save_checkpoint(folder / "new.ckpt")
    gate = ReleaseGate(old, verbose=False, dirpath=folder / "first")
    quiet(gate).test(Line(), ckpt_path=old, datamodule=Points(), verbose=False)
    (folder / "predictions.csv").write_text((folder / "first" / "predictions.csv").read_text())
    return folder


@pytest.fixture
def models(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `old.ckpt` and the equally good `new.ckpt`, and the predictions of the old."""
    copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quiet(*given: Any, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(given),
        **arguments,
    )


def judged(reference: Any = "old.ckpt", trainer: Any = None, **arguments: Any) -> ReleaseReport:
    """The report on `new.ckpt`, by a `ReleaseGate` in a Trainer."""
    gate = ReleaseGate(reference, verbose=False, dirpath="judged", **arguments)
    trainer = quiet(gate, **(trainer or {}))
    trainer.test(Line(), ckpt_path="new.ckpt", datamodule=Points(), verbose=False)
    assert gate.report is not None
    return gate.report


def compared(*arguments: str) -> int:
    """The exit status of `lightning-nrl compare` for `new.ckpt`."""
    project = ["--model", f"{__name__}.Line", "--data", f"{__name__}.Points"]
    project += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    project += ["--trainer.enable_progress_bar", "false", "--repair.dirpath", "judged"]
    return main(["compare", *project, "--new", "new.ckpt", *arguments])


def junit_errors(path: str) -> list[str]:
    return [
        result.message
        for suite in JUnitXml.fromfile(path)
        for case in suite
        for result in case.result
        if isinstance(result, Error)
    ]


FORWARDS = {
    "nothing": lambda logits: logits * torch.nan,
    "two classes exchanged": lambda logits: logits[:, [1, 0, 2]],
    "a class less": lambda logits: logits - torch.tensor([0.0, 0.0, 9.0]),
    "smaller is better": torch.neg,
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_changed_since_the_release_is_refused(forward, models, monkeypatch):
    assert judged().status == "accepted"
    assert not judged().caveats
    monkeypatch.setattr(Line, "change", staticmethod(FORWARDS[forward]))
    with pytest.raises(ConfigurationError, match="so the code has changed"):
        judged()
    # The file of predictions does not change with the code.
    assert judged("predictions.csv").status == "refused"


def test_a_forward_changed_since_a_repair_is_refused(models, monkeypatch):
    repair = RegressionFreeRepair(unseen="test", verbose=False, dirpath="repaired")
    torch.manual_seed(3)
    model = Line()
    quiet(repair, max_epochs=2).fit(model, datamodule=Points())
    assert repair.repaired_model_path is not None
    reference = repair.repaired_model_path
    Path("new.ckpt").write_bytes(Path(reference).read_bytes())
    report = judged(reference)
    assert report.status == "accepted"
    assert not report.caveats
    monkeypatch.setattr(Line, "change", staticmethod(FORWARDS["two classes exchanged"]))
    with pytest.raises(ConfigurationError, match="so the code has changed"):
        judged(reference)


@pytest.mark.parametrize(
    "rules", ["instance", "nfr:5%", "slices", "tolerance:3", "protected:label 1"]
)
@pytest.mark.parametrize("reference", ["old.ckpt", "old.pt"])
def test_nothing_right_before_is_not_satisfied(rules, reference, models, monkeypatch):
    Path("old.ckpt.predictions.csv").unlink()
    torch.save(torch.load("old.ckpt", weights_only=True)["state_dict"], "old.pt")
    monkeypatch.setattr(Line, "change", staticmethod(FORWARDS["nothing"]))
    report = judged(reference, rules=rules, require="any", slices=lambda batch: batch[1])
    assert report.status == "undecided"
    assert "right before" in report.findings[0].missing
    assert "nothing shows that it predicts" in report.to_markdown()


@pytest.mark.parametrize("change", ["removed", "of other weights", "of another split"])
def test_a_record_that_does_not_vouch_is_no_proof(change, models):
    record = Path("old.ckpt.predictions.csv")
    text = record.read_text()
    if change == "removed":
        record.unlink()
    elif change == "of other weights":
        record.write_text(text.replace("# weights ", "# weights 0", 1))
    else:
        record.write_text(text.replace("\ntest,", "\nval,"))
    assert "for 400 samples nothing shows" in judged().to_markdown()


@pytest.mark.parametrize("argument", ["limit_test_batches", "data"])
def test_a_test_of_nothing_is_an_error(argument, models, monkeypatch, capsys):
    limits = {}
    if argument == "data":
        empty = staticmethod(lambda train, test: Subset(test, []))
        monkeypatch.setattr(Points, "change", empty)
    else:
        limits["limit_test_batches"] = 0
    Path("release.xml").write_text("<testsuites/>")
    with pytest.raises(ConfigurationError, match="no sample was read"):
        judged(trainer=limits, junit="release.xml")
    assert "no sample was read" in junit_errors("release.xml")[0]
    Path("release.xml").unlink()
    words = [f"--trainer.{name}={value}" for name, value in limits.items()]
    assert compared("--old", "old.ckpt", "--junit", "release.xml", *words) == 2
    assert "no sample was read" in capsys.readouterr().err
    assert "no sample was read" in junit_errors("release.xml")[0]


def test_a_validation_of_nothing_is_an_error(models):
    trainer = quiet(ReleaseGate("old.ckpt", verbose=False), limit_val_batches=0)
    with pytest.raises(ConfigurationError, match="no sample was read"):
        trainer.validate(Line(), datamodule=Points(), verbose=False)


LESS = {
    "a part of the split": lambda train, test: Subset(test, range(200)),
    "another split": lambda train, test: {"later": DataLoader(test, 100)},
    "one of two splits": lambda train, test: {"test": DataLoader(test, 100)},
}


@pytest.mark.parametrize("change", LESS)
def test_less_than_was_predicted_is_refused(change, models, monkeypatch):
    if change == "one of two splits":
        night = Path("predictions.csv").read_text().splitlines()[1:]
        lines = [line.replace("test,", "night,", 1) for line in night if line.startswith("test,")]
        with Path("predictions.csv").open("a") as file:
            file.write("\n".join(lines))
    monkeypatch.setattr(Points, "change", staticmethod(LESS[change]))
    with pytest.raises(ConfigurationError, match=r"are missing|have no prediction"):
        judged("predictions.csv")
    assert compared("--old", "predictions.csv") == 2


def test_a_limited_test_may_see_less_than_was_predicted_and_says_so(models):
    report = judged("predictions.csv", trainer={"limit_test_batches": 1})
    assert "100 of 400 samples were compared" in report.to_markdown()


def copies(n: int, noise: float, only: int | None = None) -> Callable[[Any, Any], Dataset]:
    """The first test samples, or those of one class, and copies of these with a little noise."""

    def copied(train: Any, test: Any) -> Dataset:
        x, y = test.tensors
        if only is None:
            x, y = x[:60], y[:60]
        rows = torch.arange(len(y)) if only is None else (y == only).nonzero().flatten()[:30]
        torch.manual_seed(0)
        parts = [x[rows] + noise * torch.randn(len(rows), 4) for _ in range(n)]
        x, y = torch.cat([x, *parts]), torch.cat([y, y[rows].repeat(n)])
        order = torch.randperm(len(y))
        return TensorDataset(x[order], y[order])

    return copied


def n_repeated(report: ReleaseReport) -> int:
    [number] = re.findall("([0-9,]+) repeated samples do not count", report.findings[0].reason)
    return int(number.replace(",", ""))


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5])
@pytest.mark.parametrize("reference", ["old.ckpt", "old.pt"])
def test_copies_with_a_little_noise_count_once(noise, reference, models, monkeypatch):
    torch.save(torch.load("old.ckpt", weights_only=True)["state_dict"], "old.pt")
    Path("old.ckpt.predictions.csv").unlink()
    monkeypatch.setattr(Points, "change", staticmethod(copies(20, noise)))
    report = judged(reference, rules="nfr:2%")
    assert report.status == "undecided"
    assert 1190 <= n_repeated(report) <= 1210


def test_copies_in_one_class_count_once(models, monkeypatch):
    Path("old.ckpt.predictions.csv").unlink()
    monkeypatch.setattr(Points, "change", staticmethod(copies(20, 1e-6, only=1)))
    assert 590 <= n_repeated(judged(rules="nfr:2%")) <= 610


def test_samples_that_differ_count_each(models):
    report = judged(rules="nfr:2%")
    assert report.status == "accepted"
    assert "repeated" not in report.findings[0].reason


MARGINS = {
    "normal": torch.randn,
    "with a heavy tail": lambda n: torch.randn(n).mul(1.5).exp(),
    "right and wrong far apart": lambda n: torch.cat(
        [torch.randn(n - n // 4) + 40, torch.randn(n // 4)]
    ),
    "at most 1": lambda n: torch.sigmoid(6 * torch.randn(n)),
    "in half precision": lambda n: torch.randn(n).bfloat16().float(),
    "equal": torch.ones,
}


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("n", [1, 20, 100, 10_000])
def test_margins_of_independent_samples_do_not_look_like_copies(margins, n):
    torch.manual_seed(0)
    label, no = torch.randint(10, (n,)), torch.zeros(n).bool()
    margin = MARGINS[margins](n)
    results = SampleResults(("a",), (n,), torch.arange(n), label, label, margin, ~no, no, margin)
    assert near_copies(results) == []


def test_files_say_that_copies_cannot_be_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text(HEADER + "\n".join(rows("+" * 400)))
    main(["release", "old.csv", "old.csv", "--rule", "nfr:1%"])
    assert "if the data have near copies" in " ".join(capsys.readouterr().out.split())
    Path("old.csv").write_text(HEADER + "\n".join(rows("+" * 400, key="")))
    main(["release", "old.csv", "old.csv", "--rule", "nfr:1%"])
    assert "if the data have repeated samples" in " ".join(capsys.readouterr().out.split())


LEAKS = {
    "both together": lambda train, test: ConcatDataset([test, train]),
    "a copy of some": lambda train, test: TensorDataset(
        *(torch.cat([x, y[:50].clone()]) for x, y in zip(test.tensors, train.tensors, strict=True))
    ),
    "the training data": lambda train, test: train,
}


@pytest.mark.parametrize("leak", LEAKS)
def test_training_data_among_the_tested_data_are_named(leak, models, monkeypatch):
    Path("old.ckpt.predictions.csv").unlink()
    assert "training samples" not in judged().to_markdown()
    monkeypatch.setattr(Points, "change", staticmethod(LEAKS[leak]))
    n = 50 if leak == "a copy of some" else 300
    assert f"{n} of the first 300 training samples are among" in judged().to_markdown()


GREEN = "<testsuites><testsuite name='test' tests='1'><testcase name='x'/></testsuite></testsuites>"


@pytest.mark.parametrize(
    "words",
    [
        ["new.csv", "--junit", "release.xml"],
        ["old.csv", "--junit=release.xml", "--rules", "nfr:100%"],
        ["old.csv", "--junit", "release.xml", "--no-such-option"],
        ["old.csv", "--junit", "release.xml", "--require", "anything"],
        ["old.csv", "--junit", "release.xml", "--require", "better", "--require", "any"],
        ["old.csv", "--junit", "release.xml", "--suite", "gone.csv"],
    ],
)
def test_an_error_replaces_an_older_junit_file(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text(HEADER + "\n".join(rows(OLD)))
    Path("release.xml").write_text(GREEN)
    assert main(["release", "old.csv", *words]) == 2
    assert len(junit_errors("release.xml")) == 1


def test_an_error_replaces_the_junit_file_that_a_configuration_names(models):
    Path("release.xml").write_text(GREEN)
    Path("gate.yaml").write_text("{old: old.ckpt, junit: release.xml, rules: [nfr:100%]}")
    assert compared("--config", "gate.yaml") == 2
    assert "limit" in junit_errors("release.xml")[0]


def test_help_leaves_the_junit_file_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("release.xml").write_text(GREEN)
    assert main(["release", "--junit", "release.xml", "--help"]) == 0
    assert Path("release.xml").read_text() == GREEN


def test_an_error_in_a_test_replaces_an_older_junit_file(models):
    Path("release.xml").write_text(GREEN)
    gate = ReleaseGate("old.ckpt", verbose=False, junit="release.xml")
    with pytest.raises(RuntimeError, match="no such image"):
        quiet(gate).test(Failing(), datamodule=Points(), verbose=False)
    assert junit_errors("release.xml") == ["RuntimeError: no such image"]


@pytest.mark.parametrize(
    "words",
    [
        ["--junit", "/proc/release.xml"],
        ["--summary", "/dev/full"],
        ["--summary", "/proc/summary.md"],
        ["--out", "/proc/release"],
        ["--out", "old.csv/release"],
    ],
)
def test_what_cannot_be_written_ends_with_4(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text(HEADER + "\n".join(rows(OLD)))
    assert main(["release", "old.csv", "old.csv", *words]) == 4
    out, err = capsys.readouterr()
    assert "ACCEPTED" not in out
    assert f"error: `{words[0].removeprefix('--')}`: " in err


@pytest.mark.parametrize(
    "words",
    [
        ["--junit", "/proc/release.xml"],
        ["--summary", "/dev/full"],
        ["--repair.dirpath", "/proc/release"],
    ],
)
def test_what_a_comparison_cannot_write_ends_with_4(words, models, capsys):
    assert compared("--old", "old.ckpt", *words) == 4
    assert "ACCEPTED" not in capsys.readouterr().out


def test_a_report_that_is_lost_is_an_error(models, monkeypatch):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReleaseReport, "to_json", full)
    with pytest.raises(UnwritableFolderError, match=r"`dirpath`: .*report.json.*No space left"):
        judged()


@pytest.mark.parametrize("command", ["release", "compare"])
def test_both_spellings_of_options_are_understood(command, models):
    def decided(*words: str) -> int:
        if command == "compare":
            return compared("--old", "predictions.csv", *words)
        return main(["release", "predictions.csv", "predictions.csv", *words])

    for undecided in ("--on-undecided", "--on_undecided"):
        for rules in ("--rule", "--rules"):
            assert decided(rules, "nfr:0.1%", undecided, "accept") == 0
            assert decided(f"{rules}=[nfr:0.1%, instance]", f"{undecided}=refuse") == 1
    # All rules must be satisfied, however they are given.
    assert decided("--rules", "nfr:0.1%", "--rules", "[instance]") == 3
    assert decided("--rules", "[instance]", "--rule", "nfr:0.1%") == 3


@pytest.mark.parametrize("option", ["require", "on-undecided", "on_undecided"])
@pytest.mark.parametrize("command", ["release", "compare"])
def test_an_option_given_twice_is_an_error(command, option, models, capsys):
    values = {"require": ["better", "any"]}.get(option, ["refuse", "accept"])
    words = [f"--{option}={values[0]}", f"--{option.replace('-', '_')}", values[1]]
    if command == "compare":
        assert compared("--old", "old.ckpt", *words) == 2
    else:
        assert main(["release", "predictions.csv", "predictions.csv", *words]) == 2
    assert f"`--{option.replace('-', '_')}` is given twice" in capsys.readouterr().err


def test_a_shortened_option_does_not_win_silently(models):
    words = ["--require", "better", "--req", "any"]
    assert main(["release", "predictions.csv", "predictions.csv", *words]) == 2
    assert compared("--old", "old.ckpt", *words) == 2


def test_a_floor_names_the_wrong_samples(models):
    report = judged(rules="floor:99%", require="any")
    [wrong] = report.findings[0].ids.values()
    x, y = points(400, 2)
    assert list(wrong) == (x[:, :3].argmax(1) != y).nonzero().flatten().tolist()


def test_a_protected_confusion_says_what_is_missing(models, capsys):
    rule = "protected:confusion 1 -> 2"
    with pytest.raises(ConfigurationError, match="asks what a model predicts, which is not known"):
        judged(rules=rule)
    assert main(["release", "predictions.csv", "predictions.csv", "--rule", rule]) == 2
    assert "asks what a model predicts" in capsys.readouterr().err


NEW_RULES = {
    "non-inferior:1%": "accuracy 100.00 %, now 98.00 % (0 repaired, 2 broken of 100)",
    "equivalent:1%": "accuracy 100.00 %, now 98.00 % (0 repaired, 2 broken of 100)",
    "calibration:1%": "expected calibration error 2.00 %, now 4.00 %",
}


@pytest.mark.parametrize("text", NEW_RULES)
def test_a_new_rule_shows_in_report_summary_and_junit(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = HEADER.replace("key", "key,confidence")
    old, new = sure(OLD, "0.98"), sure("+" * 98 + "-" * 2, "0.94")
    for name, lines in {"old": old, "new": new, "a": old, "b": sure("-" * 4 + "+" * 96)}.items():
        Path(f"{name}.csv").write_text(header + "\n".join(lines))
    files = ["--out", "out", "--summary", "summary.md", "--junit", "release.xml"]
    assert main(["release", "old.csv", "new.csv", *rule(text, "--noise", "a.csv", "b.csv"), *files])
    junit = Path("release.xml").read_text()
    assert f'name="{text}"' in junit
    assert "<failure" in junit
    for page in (Path("summary.md").read_text(), Path("out/report.md").read_text(), junit):
        assert NEW_RULES[text] in page
    report = json.loads(Path("out/report.json").read_text())
    assert report["findings"][0]["passed"] is False
    assert report["rows"][0]["noise"]["broken"] == 4
    # Of 4 samples that flip between the trainings, 2 are to be expected in either direction.
    assert "2 of 100 samples break by chance" in Path("summary.md").read_text()
    assert "2.00 %" in Path("summary.md").read_text()
