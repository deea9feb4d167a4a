"""Repairs one problem over seeds; prints a row per seed, or means per method for several methods.

    python examples/studies/repairs.py slashed-zeros --seeds 10
    python examples/studies/repairs.py weak-digit --seeds 10 --methods convex   # the last layer
    python examples/studies/repairs.py vehicles-C --max-time 80   # seconds per repair
    python examples/studies/repairs.py toolkit --seeds 10 --methods default swarm arachne merged
    python examples/studies/repairs.py weak-digit --seeds 10 --methods all   # and published ones
    python examples/studies/repairs.py vehicles-C --seeds 1 --compare fine-tuning retraining

A seed sets data, training and repair. The problems are in `problems.py`. Published methods run
without a gate; all others may break no known sample. Arachne and `merged` score 200 passed samples.
NeuRecover may change all Linear layers, Arachne's second version also all convolutions, the others
the last layer. `from_paper` is EXP-B1. `--compare` compares methods and baselines, with a table and
a figure per seed. Earlier runs are read from `runs/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from problems import PROBLEMS, RUNS, State, interval, markdown, quiet_trainer, start, trained
from torch import nn

from lightning_nrl import BoundOptions, RepairReport, SearchOptions, compare, repair
from lightning_nrl.analysis.comparison import Comparison
from lightning_nrl.published import Apricot, NeuRecover, bundle
from lightning_nrl.study import paper_arguments

AS_FOUND: dict[str, Any] = {
    "layer": "classifier",
    "gate": "tolerance:100%",
    "bounds": BoundOptions(strength=1.0),
}
ARACHNE = {**AS_FOUND, "search": SearchOptions(n_passed=200)}  # passed samples, as published


def in_all(network: LightningModule, *kinds: type[nn.Module]) -> dict[str, Any]:
    """Returns arguments of a repair of all layers of these kinds without a gate."""
    return {
        **AS_FOUND,
        "layer": [name for name, part in network.named_modules() if isinstance(part, kinds)],
    }


def neurecover(
    history: list[State], network: LightningModule, n: int | None = None, last: int | None = None
) -> dict:
    method = bundle("neurecover", localizer=NeuRecover(history, n, last=last))
    return {**in_all(network, nn.Linear), "method": method}


METHODS: dict[str, Callable[[list[State], LightningModule], dict[str, Any]]] = {
    "default": lambda history, network: {},
    "convex": lambda history, network: {"method": "convex"},
    "swarm": lambda history, network: {"layer": "classifier", "method": "swarm"},
    "from_paper": lambda history, network: {**paper_arguments("EXP-B1"), **AS_FOUND},
    "neurecover-lite": lambda history, network: {**AS_FOUND, "method": "neurecover-lite"},
    "neurecover": neurecover,
    "neurecover, last two": partial(neurecover, last=1),
    "neurecover, last two, 4 weights": partial(neurecover, n=4, last=1),
    "arachne": lambda history, network: {**ARACHNE, "method": "arachne"},
    "arachne-de": lambda history, network: {
        **in_all(network, nn.Linear, nn.Conv2d),
        "method": "arachne-de",
    },
    "merged": lambda history, network: {**ARACHNE, "method": "merged"},
    "apricot, no polish": lambda history, network: {
        "method": Apricot(history[-5:], polish=False),
        "gate": "accuracy",
    },
    "apricot": lambda history, network: {"method": Apricot(history[-5:])},
}
"""Arguments of each repair, by the checkpoints of the training."""


def repaired(name: str, seed: int, method: str, max_time: float | None = None) -> RepairReport:
    """Repairs a trained network and returns the report, or reads an earlier one."""
    limit = "" if max_time is None else f"_{max_time:g}s"
    folder = (
        RUNS
        / f"{name}_{method}{limit}".replace(",", "").replace(" ", "-").replace("-", "_")
        / f"seed_{seed}"
    )
    if not (folder / "report.json").exists():
        problem, (checkpoint, history) = PROBLEMS[name], trained(name, seed)
        repair(
            quiet_trainer(),
            problem.network(),
            datamodule=problem.data(seed),
            ckpt_path=checkpoint,
            target=problem.target,
            unseen="test",
            seed=seed,
            max_time=max_time,
            dirpath=folder,
            verbose=False,
            **METHODS[method](history, problem.network()),
        )
    return RepairReport.from_json((folder / "report.json").read_text())


def compared(name: str, seed: int, methods: Sequence[str], max_time: float | None) -> Comparison:
    """Compares methods and baselines, or reads an earlier comparison, whatever its arguments."""
    folder = RUNS / f"comparison_{name.replace('-', '_')}_{seed}"
    path = folder / "comparison.json"
    if path.exists():
        return Comparison.from_json(path.read_text())
    problem, (checkpoint, _) = PROBLEMS[name], trained(name, seed)
    given = {
        "datamodule": problem.data(seed),
        "ckpt_path": checkpoint,
        "target": problem.target,
        "seed": seed,
    }
    comparison = compare(
        quiet_trainer(), problem.network(), **given, methods=methods or None, max_time=max_time
    )
    comparison.save(folder)
    comparison.plot(folder / "comparison.png")
    return comparison


NUMBERS: dict[str, tuple[Callable[[RepairReport], float], str]] = {
    "known: targeted": (lambda report: report.pooled("known").targeted, ".1f"),
    "repaired": (lambda report: report.pooled("known").repaired_in_target, ".1f"),
    "broken": (lambda report: report.pooled("known").broken, ".1f"),
    "unseen: repaired": (lambda report: report.pooled("unseen").repaired, ".1f"),
    "broken, unseen": (lambda report: report.pooled("unseen").broken, ".1f"),
    "accuracy: untouched, %": (lambda report: 100 * report.pooled("unseen").accuracy_before, ".1f"),
    "points": (
        lambda report: 100 * (after(report) - report.pooled("unseen").accuracy_before),
        "+.2f",
    ),
    "seconds": (lambda report: sum(report.seconds.values()), ".0f"),
}
"""Columns of the table. The repair uses known data; unseen data are only counted."""


def after(report: RepairReport) -> float:
    return report.pooled("unseen").accuracy_after


def row(name: str, reports: Sequence[RepairReport]) -> list[str]:
    return [
        name,
        *(interval([number(one) for one in reports], form) for number, form in NUMBERS.values()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument(
        "--seeds", type=int, default=10, help="number of seeds, starting at --first"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"], default=["default"])
    parser.add_argument("--compare", nargs="*", help="methods and baselines; default: all")
    parser.add_argument(
        "--max-time", type=float, help="seconds per repair and per baseline except retraining"
    )
    chosen = parser.parse_args()
    start()
    if not chosen.problem.startswith(("vehicles", "fashion")):
        torch.set_num_threads(1)  # faster for networks this small
    if chosen.compare is not None:
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            print(compared(chosen.problem, seed, chosen.compare, chosen.max_time).render(120))
        return
    rows = []
    for method in list(METHODS) if "all" in chosen.methods else chosen.methods:
        reports = []
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            reports.append(repaired(chosen.problem, seed, method, chosen.max_time))
            rows += [row(f"{method}, seed {seed}", reports[-1:])] * (len(chosen.methods) == 1)
        rows.append(row(method, reports))
    print(f"{chosen.problem}, {chosen.seeds} seeds: means with 95 % t intervals\n")
    print(markdown(list(NUMBERS), rows))


if __name__ == "__main__":
    main()
