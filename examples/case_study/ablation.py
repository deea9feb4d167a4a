"""Does it matter which weights are localised? Seven localisers and random weights on five problems, in tables.

    python examples/case_study/ablation.py --problems weak-digit fashion --seeds 10
    python examples/case_study/ablation.py --problems vehicles-A vehicles-B vehicles-C --seeds 5

Each localiser gets the same network, layer, number of weights, searcher, fitness and budget of candidates; random
weights are drawn ten times, in deeper layers five times. Data, training and search have the seed. NeuRecover has nine
checkpoints of the training. In deeper layers the search scores 300 sampled passed samples; what is broken is counted on
all that are known. No gate judges. A difference to random weights is that of one seed and layer to the mean of its
draws, with a 95 % t interval and an exact sign-flip test over seeds. What was run before is read from `runs/ablation`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich import print
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

from ablation_problems import PROBLEMS, CheckpointRuns
from published import half_interval

from lightning_nrl import ParticleSwarm, Settings
from lightning_nrl.analysis.sweep import sweep_module
from lightning_nrl.localization import (
    AllWeights,
    Arachne,
    ArachneV2,
    ByGradient,
    Localizer,
    NeuRecover,
    NeuRecoverLite,
    RandomWeights,
)

FITNESSES = {"eq1": "the paper's equation (1), alpha 6", "lexicographic": "fewer broken first"}
N_WEIGHTS = 64


@dataclass(frozen=True)
class Search:
    """What each localiser gets in a layer, and how often random weights are drawn.

    Attributes:
        swarm: that searches.
        n_passed: passed samples that it scores; None: all.
        draws: of random weights.
    """

    swarm: ParticleSwarm
    n_passed: int | None
    draws: int


LAST_LAYER = Search(ParticleSwarm(particles=50, iterations=40, patience=40), None, 10)
DEEPER = Search(ParticleSwarm(particles=30, iterations=20, patience=20), 300, 5)
"""A candidate takes hundreds of times as long to score there."""


@dataclass(frozen=True)
class Run:
    """What the weights of one localiser became in one search."""

    problem: str
    layer: str
    fitness: str
    localizer: str
    seed: int
    weights: int
    targets: int
    repaired: int
    broken: int
    unseen_repaired: int
    unseen_broken: int

    @property
    def net(self) -> int:
        """Unseen samples repaired, less broken."""
        return self.unseen_repaired - self.unseen_broken

    @property
    def known_net(self) -> int:
        """Known targets repaired, less known samples broken."""
        return self.repaired - self.broken


def localizers(history: CheckpointRuns, draws: int) -> Iterator[tuple[str, Localizer]]:
    """All but `all` with `N_WEIGHTS` weights, or as near to that as they get."""
    n = N_WEIGHTS
    yield "neurecover-lite", NeuRecoverLite(n)
    yield "neurecover", NeuRecover(history, n)
    yield "neurecover, last two", NeuRecover(history, n, last=1)
    yield "arachne", Arachne(n)
    yield "arachne-v2", ArachneV2(n)
    yield "gradient", ByGradient(n)
    yield "all", AllWeights()
    for draw in range(draws):
        yield f"random {draw}", RandomWeights(n, seed=draw)


def run(name: str, layer: str, seed: int, folder: Path) -> list[Run]:
    """All searches in a layer of a seed's network; read from the folder if they are there."""
    file = folder / f"{name}_{layer}_{seed}.json"
    if file.exists():
        return [Run(**one) for one in json.loads(file.read_text())]
    problem = PROBLEMS[name]
    model, states = problem.trained(seed, folder / f"{name}_{seed}.pt")
    known, unseen = problem.sources(seed)
    search = LAST_LAYER if layer == problem.layers[0] else DEEPER
    settings = [
        {"name": f"{fitness}/{of}", "fitness": fitness, "localizer": localizer, "n_passed": search.n_passed}
        for fitness, (of, localizer) in itertools.product(FITNESSES, localizers(CheckpointRuns(states), search.draws))
    ]
    base = Settings(target=problem.target, layer=layer, method=search.swarm)
    result = sweep_module(model, known, settings, seeds=[seed], base=base, unseen=[unseen])
    runs = []
    for one in result.runs:
        fitness, of = one.setting.split("/")
        on_unseen = one.counts("unseen")
        counts = (one.known.targeted, one.known.repaired_in_target, one.known.broken)
        run = Run(name, layer, fitness, of, seed, one.n_localized, *counts, on_unseen.repaired, on_unseen.broken)
        runs.append(run)
    file.write_text(json.dumps([asdict(one) for one in runs]))
    return runs


def group_of(run: Run) -> str:
    """The row of a run: the draws of random weights are one."""
    return "random" if run.localizer.startswith("random") else run.localizer


def difference(pairs: Sequence[float]) -> str:
    """Mean difference with its 95 % t interval, and the p of an exact sign-flip test."""
    if len(pairs) < 2:
        return "-"
    mean, half = fmean(pairs), half_interval(pairs)
    values = torch.tensor(pairs, dtype=torch.float64)
    signs = 1.0 - 2.0 * (torch.arange(2 ** len(pairs))[:, None] >> torch.arange(len(pairs)) & 1)
    p = float(((signs.double() @ values).abs() >= values.sum().abs() - 1e-9).double().mean())
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] p={p:.3f}"


def paired(runs: Sequence[Run], number: Callable[[Run], float]) -> Mapping[str, list[float]]:
    """Of each localiser its differences to random weights, one for each seed: the mean over layers."""
    cells: dict[tuple[int, str, str], list[float]] = {}
    for one in runs:
        cells.setdefault((one.seed, one.layer, group_of(one)), []).append(number(one))
    found: dict[str, dict[int, list[float]]] = {}
    for (seed, layer, group), values in cells.items():
        if group != "random":
            found.setdefault(group, {}).setdefault(seed, []).append(fmean(values) - fmean(cells[seed, layer, "random"]))
    return {group: [fmean(values) for values in of_seeds.values()] for group, of_seeds in found.items()}


def table(runs: Sequence[Run], title: str) -> Table:
    """A row for each localiser, with means over runs."""
    shown = Table(title=title)
    for column in ("", "runs", "weights", "repaired", "known broken", "unseen repaired : broken"):
        shown.add_column(column, justify="right" if column else "left")
    numbers: dict[str, Callable[[Run], float]] = {
        "repaired, to random": lambda one: one.repaired,
        "known net, to random": lambda one: one.known_net,
        "unseen net, to random": lambda one: one.net,
    }
    for column in numbers:
        shown.add_column(column, justify="right")
    differences = [paired(runs, number) for number in numbers.values()]
    for group in dict.fromkeys(map(group_of, runs)):
        own = [one for one in runs if group_of(one) == group]
        weights, repaired, broken, gained, lost = (
            fmean(getattr(one, name) for one in own)
            for name in ("weights", "repaired", "broken", "unseen_repaired", "unseen_broken")
        )
        cells = (f"{weights:.0f}", f"{repaired:.1f}", f"{broken:.1f}", f"{gained:.1f} : {lost:.1f}")
        shown.add_row(group, str(len(own)), *cells, *(difference(of.get(group, ())) for of in differences))
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["weak-digit"])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--layers", type=int, default=3, help="how many of each network, from the last one back")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of what was run")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen.out.mkdir(parents=True, exist_ok=True)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    for name in chosen.problems:
        layers = PROBLEMS[name].layers[: chosen.layers]
        runs = [one for seed in seeds for layer in layers for one in run(name, layer, seed, chosen.out)]
        targets = fmean(one.targets for one in runs)
        for fitness, words in FITNESSES.items():
            for layer in (*layers, *([None] if len(layers) > 1 else [])):
                own = [one for one in runs if one.fitness == fitness and layer in (None, one.layer)]
                where = "all layers" if layer is None else f"layer {layer}"
                print(table(own, f"{name}, {targets:.0f} targets, {where}, fitness: {words}"))
