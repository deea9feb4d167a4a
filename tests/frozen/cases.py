"""What is frozen: each case makes calls with fixed seeds and returns what came of them.

A case is called in an empty folder of its own, with the random states seeded. What it returns is
written by `plain.clean`. `calls.py` calls the package.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_nrl import RegressionFreeRepair, Settings, compare, diagnose
from lightning_nrl.analysis.baselines import FineTuning, Interpolation
from lightning_nrl.analysis.comparison import compare_module
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.callbacks import PositiveCongruentTraining, ReleaseGate, WeightInterpolation
from lightning_nrl.data import Target, TensorSource
from lightning_nrl.evaluation import Evaluator, Focal
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Polish
from lightning_nrl.release import ProtectedIntact, release
from lightning_nrl.report import RepairReport
from lightning_nrl.search import Fitness, ParticleSwarm
from lightning_nrl.study import TABLE_II, Grid, sweep_module
from lightning_nrl.tasks import Regression, Sequence
from lightning_nrl.updates import FocalDistillation, MarginHinge, OldModel

from . import calls, data
from .data import Classifier, Digits, blobs, quiet_trainer, trained
from .plain import clean, hash_of

Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}
"""By name, in the order in which they run."""

ROOT = Path(__file__).parents[2]
CHECKPOINTS: dict[str, Path] = {}
"""Of networks that have learned digits, by the name of the network."""


def prepare(folder: Path) -> None:
    """Trains what several cases start from, whichever of them are run."""
    folder.mkdir()
    for network in data.NETWORKS:
        CHECKPOINTS[network] = folder / f"{network}.ckpt"
        data.trained_checkpoint(CHECKPOINTS[network], network)


def case(name: str) -> Callable[[Case], Case]:
    def put(made: Case) -> Case:
        CASES[name] = made
        return made

    return put


def quick(**more: Any) -> dict[str, Any]:
    """A swarm that takes no time."""
    swarm = ParticleSwarm(particles=12, iterations=12)
    return {"method": swarm, "localizer": NeuRecoverLite(n_weights=12), **more}


def short_auto(**more: Any) -> dict[str, Any]:
    """The default method with a short swarm."""
    return {"method": Auto(ParticleSwarm(particles=16, iterations=20)), **more}


# What is kept of a repair.


def account(report: Any, pages: bool = False) -> dict[str, Any]:
    """A report as plain values; with the page that it is shown as if asked for."""
    again = RepairReport.from_json(report.to_json())
    found = {
        "report": calls.report_dict(report),
        "settings": dict(report.settings),
        "files": {kind: Path(path).name for kind, path in report.files.items()},
        "read again": clean(calls.report_dict(again)) == clean(calls.report_dict(report)),
    }
    return {**found, "page": calls.page(report)} if pages else found


def outcome(found: Any, model: nn.Module, pages: bool = False) -> dict[str, Any]:
    """What came of a repair of a module: report, weights, and that the model was left alone until
    they were written.
    """
    before = hash_of(model.state_dict())
    copied = copy.deepcopy(model)
    return {
        **account(found.report, pages),
        "parameters": None if found.parameters is None else hash_of(found.parameters),
        "names": None if found.parameters is None else sorted(found.parameters),
        "change": None if found.change is None else found.change,
        "written": found.write(copied),
        "before": before,
        "after": hash_of(copied.state_dict()),
    }


def source(x: Tensor, y: Tensor, split: str, *extras: Tensor, **more: Any) -> Any:
    return TensorSource(x, y, split=split, extras=extras, **{"batch_size": 32, **more})


def known(seed: int = 0, n: int = 120, shift: float = 1.5) -> list[Any]:
    old, new = blobs(n, seed=seed), blobs(n // 2, shift, seed + 1)
    return [
        source(*old, "train", torch.arange(len(old[1])), passed=True),
        source(*new, "new", torch.arange(len(new[1])), failed=True),
    ]


def unseen(seed: int = 0) -> list[Any]:
    x, y = blobs(80, 1.5, seed + 2)
    return [source(x, y, "later", torch.arange(len(y)))]


def calibration(seed: int = 0, n: int = 150) -> list[Any]:
    x, y = blobs(n, 0.8, seed + 3)
    return [source(x, y, "val", torch.arange(len(y)))]


def repaired(
    model: nn.Module | None = None,
    *,
    pages: bool = False,
    sources: list[Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A repair of a small network on points, with unseen data."""
    model = trained() if model is None else model
    given = {"unseen": unseen(), **more}
    return outcome(
        calls.repair_tensors(model, known() if sources is None else sources, **given), model, pages
    )


# The README.


@case("quickstart")
def _quickstart(folder: Path) -> Any:
    before = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(
        command, cwd=folder, env=before, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    written = folder / "lightning_logs" / "version_0" / "repair"
    report = RepairReport.from_json((written / "report.json").read_text(encoding="utf-8"))
    saved = torch.load(written / "repaired.ckpt", map_location="cpu", weights_only=False)
    return {
        **account(report, pages=True),
        "weights": hash_of(saved["state_dict"]),
        "keys": sorted(json.loads((written / "report.json").read_text(encoding="utf-8"))),
        "said": [
            line for line in done.stdout.splitlines() if line.startswith(("known:", "repaired:"))
        ],
    }


# Methods, on points.

METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "auto": dict,
    "auto-one-layer": lambda: short_auto(layer="2"),
    "auto-deep-layer": lambda: short_auto(layer="0"),
    "finetune-polish": lambda: {"method": "finetune-polish"},
    "finetune-polish-layer": lambda: {"method": "finetune-polish", "layer": "0"},
    "convex": lambda: {"method": "convex", "layer": "2"},
    "swarm": lambda: {"method": "swarm"},
    "swarm-paper": lambda: quick(
        method=ParticleSwarm(particles=20, iterations=20, start="paper", patience=10)
    ),
    "swarm-half": lambda: quick(method=ParticleSwarm(particles=20, iterations=20, start="half")),
    "swarm-arachne": lambda: quick(
        method=ParticleSwarm(particles=20, iterations=20, constants="arachne")
    ),
    "polish": lambda: {"method": Polish(data.retrained().state_dict())},
    "polish-module": lambda: {"method": Polish(data.retrained())},
    "own": lambda: {"method": calls.Halfway(data.retrained().state_dict())},
}


def _method(name: str) -> Case:
    return lambda folder: repaired(
        pages=name in ("auto", "convex", "swarm", "own"), **METHODS[name]()
    )


for _name in METHODS:
    case(f"method-{_name}")(_method(_name))


@case("method-many-layers")
def _many_layers(folder: Path) -> Any:
    model = trained(data.deep)
    return {
        "several": repaired(model, **short_auto(layer=["0", "3"])),
        "block": repaired(model, **short_auto(layer="2")),
        "swarm over several": repaired(model, **quick(layer=["2.0", "2.2"])),
        "finetune-polish block": repaired(model, method="finetune-polish", layer="2"),
    }


@case("method-batch-norm")
def _batch_norm(folder: Path) -> Any:
    model = trained(data.normed)
    return {
        "finetune-polish": repaired(model, method="finetune-polish"),
        "polish": repaired(model, method=Polish(data.retrained(data.normed))),
        "swarm": repaired(model, **quick()),
    }


@case("method-convolution")
def _convolution(folder: Path) -> Any:
    model = data.fitted(data.conv_net, *(x[:300] for x in data.digits()), steps=25)
    x, y = data.digits()
    noise = 0.5 * torch.randn(x[300:700].shape, generator=torch.Generator().manual_seed(2))
    sources = [
        source(x[:300], y[:300], "train", passed=True),
        source(x[300:450] + noise[:150], y[300:450], "new", failed=True),
    ]
    later = [source(x[450:600] + noise[150:300], y[450:600], "later")]
    swarm = ParticleSwarm(particles=12, iterations=10)
    given = {"sources": sources, "unseen": later}
    return {
        "swarm": repaired(
            model, **given, layer="3", method=swarm, localizer=NeuRecoverLite(n_weights=20)
        ),
        "convex": repaired(model, **given, layer="7", method="convex"),
    }


# Fitness, localizers, gates.

FITNESS: dict[str, Callable[[], Any]] = {
    "lexicographic": lambda: "lexicographic",
    "eq1": lambda: "eq1",
    "eq2": lambda: "eq2",
    "eq1-alpha": lambda: Fitness("eq1", alpha=0.5, loss_term="inverse_ratio"),
    "eq2-printed": lambda: Fitness("eq2", alpha=8, beta=1.0, delta=0.01, loss_term="as_printed"),
    "eq2-intact": lambda: Fitness("eq2", alpha=8, perfect_intact=True),
    "eq1-intact-zero": lambda: Fitness("eq1", alpha=6, perfect_intact=True, infeasible="zero"),
}


@case("fitness")
def _fitness(folder: Path) -> Any:
    return {
        name: repaired(**quick(fitness=make(), gate="accuracy")) for name, make in FITNESS.items()
    }


@case("gate")
def _gate(folder: Path) -> Any:
    greedy = quick(fitness=FITNESS["eq1-alpha"]())
    gates = ("instance", "accuracy", "tolerance:3", "tolerance:1%", "tolerance:100%")
    return {gate: repaired(pages=True, strength=1.0, **{**greedy, "gate": gate}) for gate in gates}


# How far to go.


@case("strength")
def _strength(folder: Path) -> Any:
    more: dict[str, dict[str, Any]] = {
        "less": {"strength": 0.6},
        "beyond": {"strength": 1.4},
        "free": {"calibration": calibration()},
        "limit": {"calibration": calibration(), "limit": "tolerance:2%"},
        "limit of accuracy": {"calibration": calibration(), "limit": "accuracy"},
        "limit of none": {"calibration": calibration(), "limit": "instance"},
        "less, calibrated": {"calibration": calibration(), "strength": 0.7, "confidence": 0.9},
    }
    found = {
        name: repaired(pages=True, method="finetune-polish", **own) for name, own in more.items()
    }
    greedy = quick(fitness=FITNESS["eq1-alpha"](), gate="tolerance:100%", calibration=calibration())
    for limit in ("tolerance:2%", "tolerance:8%", "accuracy", "instance"):
        found[f"greedy, {limit}"] = repaired(pages=True, limit=limit, **greedy)
    found["greedy, free"] = repaired(**greedy)
    return found | {
        "convex": repaired(
            method="convex", layer="2", calibration=calibration(), limit="tolerance:2%"
        )
    }


@case("sparse")
def _sparse(folder: Path) -> Any:
    return {
        "none lost": repaired(method="finetune-polish", sparse=0.0),
        "a fifth lost": repaired(method="finetune-polish", sparse=0.2, pages=True),
        "convex": repaired(method="convex", layer="2", sparse=0.1),
    }


# What counts.


def camera(batch: Any) -> list[str]:
    return ["night" if at % 3 == 0 else "day" for at in batch[2].tolist()]


def worth(batch: Any) -> Tensor:
    return 1.0 + (batch[2] % 4).float()


def third(batch: Any) -> Tensor:
    return batch[2] % 3 == 0


@case("importance")
def _importance(folder: Path) -> Any:
    focal = Focal(gamma=5)
    ways: dict[str, Any] = {
        "function": worth,
        "focal": "focal",
        "focal, 5": focal,
        "ids": {"new": {1: 5.0, 4: 3.0}},
    }
    column = [source(*blobs(60, 1.5, 1), "new", torch.arange(60) + 1.0, failed=True, passed=True)]
    found = {
        name: repaired(method="convex", layer="2", importance=way) for name, way in ways.items()
    }
    found["column"] = repaired(method="convex", layer="2", importance=2, sources=column, unseen=[])
    found["swarm"] = repaired(**quick(importance=worth))
    found["finetune-polish"] = repaired(method="finetune-polish", importance=worth)
    return found


@case("slices")
def _slices(folder: Path) -> Any:
    own = {"method": "convex", "layer": "2"}
    return {
        "function": repaired(slices=camera, pages=True, **own),
        "target": repaired(slices=Target.label(0), **own),
        "met": repaired(slices=camera, quotas={"night": 1, "day": "10%"}, pages=True, **own),
        "not met": repaired(
            **quick(slices=camera, quotas={"night": "100%", "day": "100%"}), pages=True
        ),
        "not there": repaired(slices=camera, quotas={"dusk": 1}, **own),
    }


@case("protected")
def _protected(folder: Path) -> Any:
    greedy = quick(fitness=Fitness("eq1", alpha=0.1), gate="tolerance:100%", strength=1.0)
    return {
        "target": repaired(protected=Target.label(1), **greedy),
        "bools": repaired(protected=third, **greedy),
        "ids": repaired(protected={"train": [1, 2, 3], "new": [5]}, **greedy),
        "costs": repaired(protected=costs, **greedy),
        "calibration": repaired(protected={"val": [3, 4]}, calibration=calibration(), **greedy),
    }


def costs(batch: Any) -> Tensor:
    return 1 + batch[2] % 5


# Other tasks.


def _on_task(task: Any, made: Any, **ways: dict[str, Any]) -> dict[str, Any]:
    parts, network, loss = made
    model = data.fitted(network, *parts[0], steps=40, loss=loss)
    sources = [source(*parts[0], "train", passed=True), source(*parts[1], "new", failed=True)]
    later = [source(*parts[2], "later")]
    return {
        name: repaired(
            model, sources=sources, unseen=later, task=task, pages=name == "swarm", **own
        )
        for name, own in ways.items()
    }


def _ways() -> dict[str, dict[str, Any]]:
    return {
        "auto": short_auto(),
        "finetune-polish": {"method": "finetune-polish"},
        "swarm": quick(),
    }


@case("task-regression")
def _regression(folder: Path) -> Any:
    ways, made = _ways(), data.regression()
    return {
        "plain": _on_task(Regression(tolerance=0.5), made, **ways),
        "relative": _on_task(Regression(tolerance=0.2, relative=0.1), made, swarm=ways["swarm"]),
    }


@case("task-sequence")
def _sequence(folder: Path) -> Any:
    ways = _ways()
    return {
        "by name": _on_task("sequence", data.sequence(), swarm=ways["swarm"]),
        "plain": _on_task(Sequence(), data.sequence(), **ways),
    }


# Updates.


def _other() -> nn.Module:
    return data.fitted(lambda: data.mlp(20), *blobs(150, 1.0, seed=11), seed=11, steps=80)


@case("update")
def _update(folder: Path) -> Any:
    new, old = trained(n=60, seed=3), _other()
    found = {
        "both": repaired(new, reference=OldModel(old), **short_auto(), pages=True),
        "reference": repaired(
            new, reference=OldModel(old), keep="reference", **short_auto(), pages=True
        ),
        "polish": repaired(new, reference=OldModel(old), method=Polish()),
        "swarm": repaired(new, reference=OldModel(old), **quick()),
        "in a target": repaired(
            new, reference=OldModel(old), target=Target.label(0), **short_auto()
        ),
        "calibrated": repaired(
            new, reference=OldModel(old), calibration=calibration(), **short_auto()
        ),
    }
    for _ in range(2):  # written, then read
        cached = OldModel(old, cache=folder / "old.csv")
        found["cached"] = repaired(new, reference=cached, method=Polish())
    return found


# With a Trainer.


def noisy(batch: Any) -> Tensor:
    return batch[2]


def digit(batch: Any) -> Tensor:
    return batch[1]


def position(batch: Any) -> Tensor:
    return batch[2]


def loaded(network: str = "flat") -> Classifier:
    return Classifier.load_from_checkpoint(CHECKPOINTS[network], map_location="cpu")


def listed(folder: Path) -> list[str]:
    """The files below a folder, those of TensorBoard without what differs from run to run."""
    files = (
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    )
    return sorted(path.partition(".tfevents.")[0] for path in files)


def measured(values: Any) -> dict[str, Any]:
    return {name: float(value) for name, value in values.items()}


@case("fit")
def _fit(folder: Path) -> Any:
    repair = calls.callback(target=Target.where(noisy), unseen="test", **quick(method="auto"))
    logger = CSVLogger(folder, name="csv")
    trainer = quiet_trainer(folder, repair, logger=logger, enable_checkpointing=True)
    model = Classifier()
    trainer.fit(model, datamodule=Digits())
    path = repair.repaired_model_path
    (tested,) = quiet_trainer(folder).test(
        model, ckpt_path=path, datamodule=Digits(), verbose=False
    )
    saved = torch.load(path, map_location="cpu", weights_only=False)
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as rows:
        table = list(csv.DictReader(rows))
    return {
        **account(repair.report, pages=True),
        "weights": hash_of(model.state_dict()),
        "saved": hash_of(saved["state_dict"]),
        "saved keys": sorted(saved),
        "epoch and step": [saved["epoch"], saved["global_step"]],
        "optimizer": hash_of(
            {str(i): v["exp_avg"] for i, v in saved["optimizer_states"][0]["state"].items()}
        ),
        "files": listed(folder),
        "logged": measured(trainer.callback_metrics),
        "table": [
            {k: v for k, v in row.items() if v} for row in table if row.get("repair/accepted")
        ],
        "columns": sorted(table[0]),
        "tested": tested,
        "random": hash_of({"": torch.get_rng_state()}),
    }


@case("fit-ways")
def _fit_ways(folder: Path) -> Any:
    def one(
        name: str,
        module: Any = None,
        loaders: Any = None,
        trainer: dict[str, Any] | None = None,
        **flat: Any,
    ):
        repair = calls.callback(dirpath=folder / name, verbose=False, **{**quick(), **flat})
        saves = ModelCheckpoint(folder / f"{name}-best", monitor="val_loss")
        more = {"max_epochs": 2, **(trainer or {})}
        made = quiet_trainer(folder, saves, repair, enable_checkpointing=True, **more)
        model = Classifier()
        made.fit(model, *(loaders or ()), datamodule=None if loaders else (module or Digits()))
        report = repair.report
        return {
            **account(report),
            "weights": hash_of(model.state_dict()),
            "files": listed(folder / name),
        }

    own = Digits()
    return {
        "best": one("best", start_from="best"),
        "from validation data": one("validation", Repairless(), failed="val", passed="train"),
        "passed from val": one("passed", passed="val", failed="repair"),
        "loaders": one(
            "loaders",
            loaders=(own.train_dataloader(), own.val_dataloader()),
            unseen=own.test_dataloader(),
        ),
        "adapter": one(
            "adapter", adapter=adapted, n_passed=50, calibration="val", limit="tolerance:5%"
        ),
        "half precision": one("half", trainer={"precision": "bf16-mixed"}, unseen="test"),
        "convolution": one("convolution", layer="network.1", seed=3),
    }


def adapted(batch: Any) -> Any:
    return (batch[0],), {}, batch[1]


Repairless = data.Repairless


@case("checkpoint")
def _checkpoint(folder: Path) -> Any:
    def one(name: str, network: str = "flat", **flat: Any) -> dict[str, Any]:
        model, trainer = Classifier(network), quiet_trainer(folder)
        given = {"unseen": "test", "verbose": False, "dirpath": folder / name, **flat}
        report = calls.repair_checkpoint(
            trainer, model, data=Digits(), path=CHECKPOINTS[network], **given
        )
        return {
            **account(report),
            "weights": hash_of(model.state_dict()),
            "files": listed(folder / name),
        }

    where, swarm = Target.where(noisy), ParticleSwarm(particles=16, iterations=15)
    slices = {
        "slices": digit,
        "quotas": {"3": 1},
        "protected": Target.label(1),
        "set_aside": [17, 40],
    }
    return {
        "auto": one("auto", target=where),
        "convex": one(
            "convex", method="convex", layer="network.3", calibration="val", limit="tolerance:2%"
        ),
        "finetune-polish": one(
            "finetune-polish",
            method="finetune-polish",
            calibration="val",
            slices=digit,
            confidence=0.9,
        ),
        "slices": one("slices", method="convex", layer="network.3", importance="focal", **slices),
        "convolution": one("convolution", "conv", method=swarm, layer="network.3", target=where),
        "two layers": one("layers", method=swarm, layer=["network.1", "network.3"]),
        "without checkpoint": _from_memory(folder),
    }


def _from_memory(folder: Path) -> dict[str, Any]:
    model = loaded()
    made = calls.callback(**quick(verbose=False))
    report = calls.repair_checkpoint(quiet_trainer(folder), model, data=Digits(), made=made)
    return {
        **account(report),
        "weights": hash_of(model.state_dict()),
        "files": listed(folder / "repair"),
    }


@case("update-fit")
def _update_fit(folder: Path) -> Any:
    def one(name: str, **flat: Any) -> dict[str, Any]:
        repair = calls.callback(
            unseen="test", verbose=False, dirpath=folder / name, **{**short_auto(), **flat}
        )
        model = Classifier(seed=1)
        trainer = quiet_trainer(folder, repair)
        trainer.fit(model, datamodule=Digits())
        return {
            **account(repair.report, pages=True),
            "weights": hash_of(model.state_dict()),
            "logged": measured(trainer.callback_metrics),
        }

    return {
        "path": one("path", reference=CHECKPOINTS["flat"]),
        "module": one("module", reference=loaded("conv"), keep="reference"),
        "polish": one(
            "polish", reference=str(CHECKPOINTS["flat"]), method=Polish(), calibration="val"
        ),
    }


@case("paper")
def _paper(folder: Path) -> Any:
    made = RegressionFreeRepair.from_paper("EXP-C1", unseen="test", verbose=False)
    model = loaded()
    report = calls.repair_checkpoint(quiet_trainer(folder), model, data=Digits(), made=made)
    other = loaded()
    ways = calls.grouped(
        {"gate": "tolerance:100%", "n_passed": 100, "verbose": False, "dirpath": folder / "second"}
    )
    made = RegressionFreeRepair.from_paper("EXP-A1", target=Target.where(noisy), **ways)
    second = calls.repair_checkpoint(quiet_trainer(folder), other, data=Digits(), made=made)
    return {
        "EXP-A1": {**account(second), "weights": hash_of(other.state_dict())},
        "rows": TABLE_II,
        "EXP-C1": {**account(report), "weights": hash_of(model.state_dict())},
    }


# While a new model trains.


@case("congruent-training")
def _congruent(folder: Path) -> Any:
    terms: dict[str, dict[str, Any]] = {
        "focal": {},
        "hinge": {"term": "margin_hinge"},
        "both": {"term": ["focal_distillation", "margin_hinge"], "prefix": "old"},
        "objects": {
            "term": [
                FocalDistillation(weight=2, base=1, focus=5, temperature=3),
                MarginHinge(weight=0.5, share=0.7, most=2.0),
            ]
        },
        "remembered": {"index": position},
        "wider": {"reference": OldModel(loaded("conv"))},
    }
    found = {}
    for name, given in terms.items():
        model = Classifier(seed=1)
        congruent = PositiveCongruentTraining(**{"reference": CHECKPOINTS["flat"], **given})
        trainer = quiet_trainer(folder, congruent, max_epochs=2)
        trainer.fit(model, datamodule=data.Numbered())
        found[name] = {
            "weights": hash_of(model.state_dict()),
            "logged": measured(trainer.callback_metrics),
        }
    return found


def in_shares(choice: Any) -> dict[str, Any]:
    """A choice by shares of the old weights, as older versions of the package give it."""

    def point(chosen: Any) -> dict[str, Any]:
        return {"share": 1 - chosen.strength, "counts": chosen.counts}

    return {
        "chosen": point(choice.chosen),
        "curve": [point(one) for one in choice.curve],
        "tolerance": choice.tolerance,
        "state": choice.state,
    }


def page_of_shares(choice: Any) -> list[str]:
    """A page with the words of today, in a table as wide as that of shares."""
    lines = choice.render(100).splitlines()
    return [line[3:] if line[:3] in ("   ", "---") else line for line in lines]


@case("interpolation")
def _interpolation(folder: Path) -> Any:
    found: dict[str, Any] = {}
    for name, network, given in (
        ("auto", "flat", {}),
        ("batch norm", "conv", {"tolerance": 0.02, "batches": 4}),
        ("share", "flat", {"strength": 0.75, "calibration": None}),
    ):
        model = loaded(network)
        interpolation = WeightInterpolation(CHECKPOINTS[network], verbose=False, **given)
        repair = calls.callback(
            reference=CHECKPOINTS[network], verbose=False, **quick(dirpath=folder / name)
        )
        trainer = quiet_trainer(folder, interpolation, repair, max_epochs=2)
        trainer.fit(model, datamodule=Digits())
        choice = interpolation.choice
        logged = measured(trainer.callback_metrics)
        logged["interpolation/share"] = 1 - logged.pop("interpolation/strength")
        found[name] = {
            "choice": None if choice is None else in_shares(choice),
            "page": [] if choice is None else page_of_shares(choice),
            "weights": hash_of(model.state_dict()),
            "logged": logged,
            "repair": account(repair.report),
        }
    return found


# Two models in service, and the release of a new one.


RULES = [
    "accuracy",
    "nfr:10%",
    "slice-nfr:50%",
    "slices",
    "slices:count",
    "tolerance:3",
    "tolerance:1%",
]


def _released(report: Any) -> dict[str, Any]:
    own = {
        key: value
        for key, value in json.loads(report.to_json()).items()
        if key not in ("versions", "files")
    }
    left = (
        "python",
        "lightning_nrl",
        "torch",
        "pytorch-lightning",
        "file:",
        "| python",
        "| torch",
        "| file",
    )
    lines = [line for line in report.render(120).splitlines() if not line.strip().startswith(left)]
    return {
        "report": own,
        "page": lines,
        "exit status": report.exit_status,
        "reasons": report.reasons,
    }


@case("release")
def _release(folder: Path) -> Any:
    old, new = trained(n=60, seed=3), data.retrained()
    sources = [source(*blobs(150, seed=31), "suite"), source(*blobs(200, 0.8, seed=32), "test")]
    (folder / "ids.csv").write_text("split,id\nsuite,1\nsuite,5\n", encoding="utf-8")
    file = f"protected:{folder / 'ids.csv'}"
    return {
        "default": _released(release(old, new, sources)),
        "text": _released(
            release(old, new, sources, [*RULES, "instance in suite", file], slices=digit)
        ),
        "itself": _released(release(new, new, sources[0], "instance")),
    }


@case("release-gate")
def _release_gate(folder: Path) -> Any:
    logger = CSVLogger(folder, name="csv")
    rules = ["accuracy", "nfr:30%", ProtectedIntact(where=noisy)]
    gate = ReleaseGate(loaded(), rules=rules, slices=digit, dirpath=folder / "release")
    trainer = quiet_trainer(folder, gate, logger=logger)
    (tested,) = trainer.test(loaded("conv"), datamodule=Digits(), verbose=False)
    second = ReleaseGate(
        folder / "release" / "predictions.csv", verbose=False, dirpath=folder / "second"
    )
    quiet_trainer(folder, second).test(loaded("conv"), datamodule=Digits(), verbose=False)
    return {
        "first": _released(gate.report),
        "tested": tested,
        "files": listed(folder),
        "second": _released(second.report),
    }


# Before a repair, beside it, and many at once.


def _diagnosed(diagnosis: Any) -> dict[str, Any]:
    """A diagnosis without what it says of time."""
    own = {
        key: value for key, value in diagnosis.to_dict().items() if key not in ("costs", "advice")
    }
    told = {
        "advice": _timeless(diagnosis.advice),
        "page": [_timeless(x) for x in calls.diagnosis_page(diagnosis)],
    }
    return {**own, **told, "methods": sorted(diagnosis.costs)}


def _timeless(text: str) -> str:
    return re.sub(r"\b(under|about) [\d.,]+ (s|min|h|seconds|minutes|hours)\b", "<time>", text)


@case("diagnosis")
def _diagnosis(folder: Path) -> Any:
    parts, network, loss = data.regression()
    numbers = data.fitted(network, *parts[0], steps=40, loss=loss)
    sources = [source(*parts[0], "train", passed=True), source(*parts[1], "new", failed=True)]
    model, trainer = Classifier(), quiet_trainer(folder)
    checkpoint = {"datamodule": Digits(), "ckpt_path": CHECKPOINTS["flat"]}
    looked = diagnose(trainer, model, **checkpoint, target=Target.where(noisy))
    return {
        "points": _diagnosed(diagnose_module(trained(), known())),
        "a target": _diagnosed(
            diagnose_module(trained(data.deep), known(), Settings(target=Target.label(0)))
        ),
        "numbers": _diagnosed(
            diagnose_module(Evaluator(numbers, Regression(tolerance=0.5)), sources)
        ),
        "digits": _diagnosed(looked),
    }


def _compared(comparison: Any) -> dict[str, Any]:
    return {**comparison.to_dict(), "page": calls.comparison_page(comparison)}


@case("comparison")
def _comparison(folder: Path) -> Any:
    tuned = FineTuning(learning_rate=1e-2, epochs=4)
    own = {"gentle": tuned, "a quarter of it": Interpolation(tuned, a=0.25)}
    methods = [
        "convex",
        "finetune-polish",
        "layer fine-tuning",
        "fine-tuning",
        "distillation",
        "interpolation",
    ]
    found = compare_module(trained(), known(), unseen=unseen(), methods=methods)
    model = Classifier()
    ways = ["convex", "further training", "retraining"]
    checkpoint = {
        "datamodule": Digits(),
        "ckpt_path": CHECKPOINTS["flat"],
        "target": Target.where(noisy),
    }
    return {
        "named": _compared(found),
        "objects": _compared(
            compare_module(trained(), known(), Settings(seed=3), unseen=unseen(), methods=own)
        ),
        "no last layer": _compared(
            compare_module(trained(), known(), Settings(layer="0"), methods=["convex"])
        ),
        "digits": _compared(compare(quiet_trainer(folder), model, methods=ways, **checkpoint)),
    }


def _swept(result: Any) -> dict[str, Any]:
    best = result.best("accuracy")
    names_of = [[run.setting, run.seed] for run in result.pareto("known")]
    return {
        "runs": result.to_dict()["runs"],
        "weights": {
            f"{run.setting}, {run.seed}": hash_of(result.state(run))
            for run in result.runs
            if run.changed
        },
        "best": None if best is None else [best.setting, best.seed],
        "front": names_of,
        "page": calls.sweep_page(result),
    }


@case("sweep")
def _sweep(folder: Path) -> Any:
    swarm = ParticleSwarm(particles=12, iterations=10)
    grid = Grid(
        fitness=["eq1", "lexicographic"], alpha=[0.5, 8], n_weights=[8, 16], n_passed=[None, 40]
    )
    given = {"unseen": unseen(), "calibration": calibration(), "base": Settings(method=swarm)}
    model = trained()
    result = sweep_module(model, known(), grid, seeds=2, dirpath=folder / "sweep", **given)
    again = sweep_module(model, known(), grid, seeds=[0, 1, 5], dirpath=folder / "sweep", **given)
    listed_ways = [
        {"alpha": 5, "n_passed": 30, "fitness": "eq1"},
        {"fitness": "eq2", "particles": 8, "name": "mine"},
    ]
    single = sweep_module(model, known(), listed_ways, seeds=2, **given)
    best = again.best("accuracy")
    copied = copy.deepcopy(model)
    if best is not None:
        again.write(copied, best)
    return {
        "first": _swept(result),
        "again": _swept(again),
        "one by one": _swept(single),
        "written": hash_of(copied.state_dict()),
    }


# Numbers.


# What is refused.
