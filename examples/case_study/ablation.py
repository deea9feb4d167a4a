"""Does it matter which weights are localised? Localisers and published methods on the weak digit, in two tables.

    python examples/case_study/ablation.py --seeds 3     # what was run before is read from runs/ablation

Every localiser gets the same network, layer, number of weights, searcher, fitness and budget of candidates; random
weights are drawn ten times. The network is that of `examples/studies/weak_digit.py`; NeuRecover has ten checkpoints of
its training. Each difference to random weights is that of one seed and layer to the mean of its ten draws, with a t
interval and an exact sign-flip test over all pairs of seed and layer.
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
from published import State, cost_of, half_interval, train
from rich import print
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

from weak_digit import WEAK, DigitCNN, WeakDigit

from lightning_nrl import BoundOptions, Gate, ParticleSwarm, Settings, Target, TensorSource, repair_module
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
from lightning_nrl.methods import BUNDLES, AnyMethod, LocalSearch, bundle

LAYERS = ("classifier", "features.10")
FITNESSES = ("eq1", "lexicographic")
N_WEIGHTS = 64
BUDGET = ParticleSwarm(particles=50, iterations=40, patience=40)
DRAWS = 10
ANYTHING, AS_FOUND = Gate.tolerance(10**9), BoundOptions(strength=1.0)
"""What is found is counted as it is, whatever it breaks."""


@dataclass(frozen=True)
class Run:
    """What one method did in one run."""

    method: str
    layer: str
    fitness: str
    seed: int
    targets: int
    repaired: int = 0
    broken: int = 0
    unseen_repaired: int = 0
    unseen_broken: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def net(self) -> int:
        """Unseen samples repaired, less broken."""
        return self.unseen_repaired - self.unseen_broken


def trained(seed: int, folder: Path) -> tuple[DigitCNN, list[State]]:
    """The network of a seed and its checkpoints, from a file if it was trained before."""
    file = folder / f"weak_digit_{seed}.pt"
    if not file.exists():
        torch.save(train(seed, WeakDigit(seed))[1], file)
    states = torch.load(file, weights_only=True)
    model = DigitCNN()
    model.load_state_dict(states[-1])
    return model, states


def sources_of(seed: int) -> tuple[list[TensorSource], TensorSource]:
    """Known data, and unseen data."""
    tensors = {split: data.tensors for split, data in WeakDigit(seed).data.items()}
    known = [
        TensorSource(*tensors["train"], split="train", passed=True, batch_size=500),
        TensorSource(*tensors["repair"], split="repair", passed=True, failed=True, batch_size=500),
    ]
    return known, TensorSource(*tensors["test"], split="test", batch_size=500)


def localizers(history: Sequence[State]) -> dict[str, Localizer]:
    """By name; all but `all` with `N_WEIGHTS` weights, or as near to that as they get."""
    n = N_WEIGHTS
    found: dict[str, Localizer] = {
        "neurecover-lite": NeuRecoverLite(n),
        "neurecover": NeuRecover(history, n),
        "neurecover, last two": NeuRecover(history, n, last=1),
        "arachne": Arachne(n),
        "arachne-v2": ArachneV2(n),
        "gradient": ByGradient(n),
        "all": AllWeights(),
    }
    return found | {f"random {draw}": RandomWeights(n, seed=draw) for draw in range(DRAWS)}


def methods(history: Sequence[State]) -> dict[str, AnyMethod]:
    """The published methods as they are published, beside the package's own search."""
    published = {name: bundle(name) for name in BUNDLES}
    published["neurecover"] = bundle("neurecover", localizer=NeuRecover(history))
    return {**published, "swarm": LocalSearch()}


def jobs(history: Sequence[State], layers: Sequence[str]) -> Iterator[tuple[str, str, str, AnyMethod]]:
    """Layer, fitness, name and method of each run of a seed."""
    for name, method in methods(history).items():
        yield "classifier", "its own", name, method
    for layer, fitness in itertools.product(layers, FITNESSES):
        for name, localizer in localizers(history).items():
            yield layer, fitness, name, LocalSearch(BUDGET, localizer=localizer, fitness=fitness)


def run(seed: int, folder: Path, layers: Sequence[str]) -> list[Run]:
    """All runs of a seed; those in the folder are read."""
    model, states = trained(seed, folder)
    known, unseen = sources_of(seed)
    found = []
    for layer, fitness, name, method in jobs(states[:-1], layers):
        file = folder / f"{layer}_{fitness}_{name}_{seed}.json".replace(" ", "-")
        if not file.exists():
            settings = Settings(
                target=Target.label(WEAK), layer=layer, seed=seed, method=method, gate=ANYTHING, bounds=AS_FOUND
            )
            report = repair_module(model, known, settings, unseen=[unseen]).report
            on_known, on_unseen = report.pooled("known").counts, report.pooled("unseen").counts
            counts = (on_known.repaired_in_target, on_known.broken, on_unseen.repaired, on_unseen.broken)
            made = Run(name, layer, fitness, seed, on_known.targeted, *counts, *cost_of(report))
            file.write_text(json.dumps(asdict(made)))
        found.append(Run(**json.loads(file.read_text())))
    return found


def group_of(run: Run) -> str:
    """The row of a run: the draws of random weights are one."""
    return "random" if run.method.startswith("random") else run.method


def difference(pairs: Sequence[float]) -> str:
    """Mean difference with its 95 % t interval, and the p of an exact sign-flip test."""
    if len(pairs) < 2:
        return "-"
    mean, half = fmean(pairs), half_interval(pairs)
    flips = [
        abs(sum(s * x for s, x in zip(signs, pairs, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(pairs))
    ]
    p = sum(flip >= abs(sum(pairs)) - 1e-9 for flip in flips) / len(flips)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] p={p:.2f}"


def paired(runs: Sequence[Run], number: Callable[[Run], float]) -> Mapping[str, list[float]]:
    """Of each localiser its differences to random weights, one for each seed and layer."""
    cells: dict[tuple[str, int, str], list[float]] = {}
    for one in runs:
        cells.setdefault((one.layer, one.seed, group_of(one)), []).append(number(one))
    found: dict[str, list[float]] = {}
    for (layer, seed, group), values in cells.items():
        if group != "random":
            found.setdefault(group, []).append(fmean(values) - fmean(cells[layer, seed, "random"]))
    return found


def table(runs: Sequence[Run], title: str, *, against_random: bool) -> Table:
    """A row for each method, with means over runs."""
    shown = Table(title=title)
    columns = ["", "runs", "repaired", "known broken", "unseen repaired", "unseen broken", "net", "seconds"]
    more = ["repaired, to random", "unseen net, to random"] if against_random else []
    for column in (*columns, *more):
        shown.add_column(column, justify="right" if column else "left")
    repaired, net = (
        (paired(runs, number) for number in (lambda one: one.repaired, lambda one: one.net)) if more else ({}, {})
    )
    for group in dict.fromkeys(map(group_of, runs)):
        own = [one for one in runs if group_of(one) == group]
        means = [
            fmean(getattr(one, name) for one in own)
            for name in ("repaired", "broken", "unseen_repaired", "unseen_broken", "net", "seconds")
        ]
        cells = [group, str(len(own)), *(f"{mean:.1f}" for mean in means)]
        shown.add_row(
            *cells, *(difference(found[group]) if group in found else "" for found in (repaired, net) if more)
        )
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of what was run")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="of the network, by dotted name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    layers, seeds = arguments.layers, range(arguments.first, arguments.first + arguments.seeds)
    runs = [one for seed in seeds for one in run(seed, arguments.out, layers)]
    targets = fmean(one.targets for one in runs)
    print(
        table(
            [one for one in runs if one.fitness == "its own"],
            f"Methods, layer `classifier`, {targets:.0f} targets",
            against_random=False,
        )
    )
    shown = [*layers, None] if len(layers) > 1 else layers
    for fitness, layer in itertools.product(FITNESSES, shown):
        own = [one for one in runs if one.fitness == fitness and layer in (None, one.layer)]
        where = "all layers" if layer is None else f"layer `{layer}`"
        print(table(own, f"{N_WEIGHTS} weights, fitness {fitness}, {where}", against_random=True))
