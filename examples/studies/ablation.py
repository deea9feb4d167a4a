"""Compares seven localisers with random weights on five problems.

    python examples/studies/ablation.py --problems weak-digit fashion --seeds 10
    python examples/studies/ablation.py --problems vehicles-A vehicles-B vehicles-C --seeds 5

All localisers get the same network, layer, number of weights, searcher, fitness and number of
candidates. Random weights are drawn ten times, in deeper layers five times. A seed sets data,
training and search. NeuRecover gets nine checkpoints of the training. In deeper layers, the search
scores 300 passed samples; broken samples are counted on all known data. There is no gate. A
localiser is compared with the mean over random draws in the same network and layer, with a 95 % t
interval and an exact sign-flip test over seeds. Earlier runs are read from `runs/ablation`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from problems import PROBLEMS, RUNS, State, half_interval, markdown, start, trained

from lightning_nrl import ParticleSwarm, Settings, TensorSource
from lightning_nrl.localization import (
    AllWeights,
    ByGradient,
    Localizer,
    NeuRecoverLite,
    RandomWeights,
)
from lightning_nrl.published import Arachne, ArachneV2, NeuRecover
from lightning_nrl.study import Run, SweepResult, sweep_module

FITNESSES = {"eq1": "the paper's equation (1), alpha 6", "lexicographic": "fewer broken first"}
N_WEIGHTS = 64
VEHICLE_EPOCHS = 12
"""A short training, since many networks are needed."""
LAST_LAYER = (ParticleSwarm(particles=50, iterations=40, patience=40), None, 10)
DEEPER = (ParticleSwarm(particles=30, iterations=20, patience=20), 300, 5)
"""Swarm, number of scored passed samples and number of random draws.

Scoring a candidate takes hundreds of times as long in deeper layers.
"""


def localizers(history: list[State], draws: int) -> Iterator[tuple[str, Localizer]]:
    """Returns the localisers, with about `N_WEIGHTS` weights except for `all`."""
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


def searched(name: str, layer: str, seed: int) -> tuple[Run, ...]:
    """Runs all searches in a layer of a seed's network, or reads earlier results."""
    path = RUNS / "ablation" / f"{name}_{layer}_{seed}.csv"
    if not path.exists():
        problem = PROBLEMS[name]
        checkpoint, states = trained(
            name, seed, VEHICLE_EPOCHS if name.startswith("vehicles") else None
        )
        model = problem.network.load_from_checkpoint(checkpoint)
        swarm, n_passed, draws = LAST_LAYER if layer == problem.layers[0] else DEEPER
        settings = [
            {
                "name": f"{fitness}/{of}",
                "fitness": fitness,
                "localizer": localizer,
                "n_passed": n_passed,
            }
            for fitness, (of, localizer) in itertools.product(FITNESSES, localizers(states, draws))
        ]
        data = problem.data(seed).data

        def source(split: str, **roles: bool) -> TensorSource:
            inputs, labels, *extras = data[split].tensors
            return TensorSource(
                inputs, labels, split=split, extras=tuple(extras), batch_size=500, **roles
            )

        known = [source("train", passed=True), source("repair", passed=True, failed=True)]
        base = Settings(target=problem.target, layer=layer, method=swarm)
        result = sweep_module(
            model, known, settings, seeds=[seed], base=base, unseen=[source("test")]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        result.to_csv(path)
    return SweepResult.from_csv(path).runs


def group_of(run: Run) -> str:
    """Returns the row of a run. All random draws share one row."""
    localizer = run.setting.partition("/")[2]
    return "random" if localizer.startswith("random") else localizer


def difference(pairs: Sequence[float]) -> str:
    """Formats the mean difference, its 95 % t interval and the exact sign-flip p-value."""
    if len(pairs) < 2:
        return "-"
    mean, half = fmean(pairs), half_interval(pairs)
    values = torch.tensor(pairs, dtype=torch.float64)
    signs = 1.0 - 2.0 * (torch.arange(2 ** len(pairs))[:, None] >> torch.arange(len(pairs)) & 1)
    p = float(((signs.double() @ values).abs() >= values.sum().abs() - 1e-9).double().mean())
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] p={p:.3f}"


def paired(runs: Sequence[Run], number: Callable[[Run], float]) -> Mapping[str, list[float]]:
    """Returns differences of each localiser to random weights per seed, as means over layers."""
    cells: dict[tuple[int, str, str], list[float]] = {}
    for run in runs:
        cells.setdefault((run.seed, run.layer, group_of(run)), []).append(number(run))
    found: dict[str, dict[int, list[float]]] = {}
    for (seed, layer, group), values in cells.items():
        if group != "random":
            found.setdefault(group, {}).setdefault(seed, []).append(
                fmean(values) - fmean(cells[seed, layer, "random"])
            )
    return {
        group: [fmean(values) for values in of_seeds.values()] for group, of_seeds in found.items()
    }


NUMBERS: dict[str, Callable[[Run], float]] = {
    "repaired": lambda run: run.known.repaired_in_target,
    "known net": lambda run: run.known.repaired_in_target - run.known.broken,
    "unseen net": lambda run: run.unseen.repaired - run.unseen.broken,
}

HEADS = ("runs", "weights", "repaired", "known broken", "unseen repaired : broken")


def table(runs: Sequence[Run]) -> str:
    """Tabulates means over runs, a row per localiser."""
    differences = [paired(runs, number) for number in NUMBERS.values()]
    rows = []
    for group in dict.fromkeys(map(group_of, runs)):
        own = [run for run in runs if group_of(run) == group]
        weights = fmean(run.n_localized for run in own)
        repaired, broken = (
            fmean(run.known.repaired_in_target for run in own),
            fmean(run.known.broken for run in own),
        )
        gained, lost = (
            fmean(getattr(run.unseen, name) for run in own) for name in ("repaired", "broken")
        )
        cells = (f"{weights:.0f}", f"{repaired:.1f}", f"{broken:.1f}", f"{gained:.1f} : {lost:.1f}")
        rows.append(
            [group, str(len(own)), *cells, *(difference(of.get(group, ())) for of in differences)]
        )
    return markdown((*HEADS, *(f"{name}, to random" for name in NUMBERS)), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = [name for name, problem in PROBLEMS.items() if problem.layers]
    parser.add_argument("--problems", nargs="+", choices=choices, default=["weak-digit"])
    parser.add_argument(
        "--seeds", type=int, default=10, help="number of seeds, starting at --first"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--layers", type=int, default=3, help="number of layers, from the last one back"
    )
    chosen = parser.parse_args()
    start()
    torch.set_num_threads(1)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    for name in chosen.problems:
        layers = PROBLEMS[name].layers[: chosen.layers]
        runs = [one for seed in seeds for layer in layers for one in searched(name, layer, seed)]
        targets = fmean(one.known.targeted for one in runs)
        for fitness, words in FITNESSES.items():
            for layer in (*layers, *([None] if len(layers) > 1 else [])):
                own = [
                    one
                    for one in runs
                    if one.setting.startswith(f"{fitness}/") and layer in (None, one.layer)
                ]
                where = "all layers" if layer is None else f"layer {layer}"
                print(f"\n{name}, {targets:.0f} targets, {where}, fitness: {words}\n\n{table(own)}")
