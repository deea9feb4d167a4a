"""Measures the default repair: small problems beside fine-tuning, other fits before it, shorter times.

    python examples/case_study/defaults.py --seeds 5             # six problems, 25 minutes on one core
    python examples/case_study/defaults.py --seeds 10 --fits     # quickstart and weak digit, every fit
    python examples/case_study/defaults.py --seeds 10 --fits rate0 --problems quickstart
    python examples/case_study/defaults.py --max-times 0.1 0.25 0.5 1 2 --problems "digits, drift"

Each problem has its data, its network and its training from a seed. The trained network is repaired with the default
settings, fine-tuned on all known data, or trained on them from scratch, both with as many epochs as the training. With
`--fits` something else than the owner's whole training comes before the repair (`default_fits.py`). What was run before
is read from `--out`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from default_fits import FIT_NAMES, FITS
from default_problems import PROBLEMS, SensorNet, drifting_sensors
from default_records import Run, read_or_run
from default_runs import Work, file_name, methods_of, repaired_after, timed_methods
from default_tables import compared, fitted, timed
from lightning.pytorch import Trainer

MAX_TIMES = (0.1, 0.25, 0.5, 1.0, 2.0)


def compare_methods(out: Path, name: str, seed: int) -> dict[str, Run]:
    """Default, fine-tuning and retraining on one of the six problems, or on a network of the examples."""
    work = _work(out, name, seed)
    return _run(work, methods_of(work))


def shorten(out: Path, max_times: Sequence[float], name: str, seed: int) -> dict[str, Run]:
    """The default in shares of the fit's seconds."""
    work = _work(out, name, seed)
    return _run(work, timed_methods(work, max_times))


def vary_fits(out: Path, fits: Sequence[str], name: str, seed: int) -> dict[str, Run]:
    """The default after each of the fits, and fine-tuning of the weights of its training (`fine-tuning, <fit>`)."""
    owner = _work(out, name, seed)
    found = {}
    for fit_name, fit in FITS[name].items():
        if fit_name not in fits:
            continue
        own = fit.case != owner.case
        work = Work(name, fit.case, seed, owner.folder / file_name(fit_name)) if own else owner
        found |= _run(work, {fit_name: partial(repaired_after, fit_name, fit, work, owner)})
        tuned = _run(work, {"fine-tuning": work.fine_tuned})
        found[f"fine-tuning, {fit_name}"] = tuned["fine-tuning"]
    return found


def _work(out: Path, name: str, seed: int) -> Work:
    case = PROBLEMS[name] if name in PROBLEMS else FITS[name]["owner"].case
    return Work(name, case, seed, out / file_name(name) / f"seed_{seed}")


def _run(work: Work, methods: dict[str, Callable[[], Run]]) -> dict[str, Run]:
    found = {}
    for method, run in methods.items():
        one = found[method] = read_or_run(work.folder / f"{file_name(method)}.json", run)
        print(
            f"{work.name}, seed {work.seed}, {method}: {one.repaired} of {one.targeted}, "
            f"{one.known_broken} known broken, unseen {one.unseen_repaired} : {one.unseen_broken}, "
            f"{one.points:+.2f} points, {one.seconds.wall:.1f} s",
            flush=True,
        )
    return found


def in_parallel(
    run: Callable[[str, int], dict[str, Run]], names: Sequence[str], seeds: Sequence[int], workers: int
) -> dict[str, dict[str, list[Run]]]:
    """By problem and method the runs of all seeds; with several workers each problem and seed in a process."""
    jobs = [(name, seed) for name in names for seed in seeds]
    if workers == 1:
        prepare()
        results = [run(*job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, prepare) as pool:
            results = list(pool.map(run, *zip(*jobs, strict=True)))
    found: dict[str, dict[str, list[Run]]] = {name: {} for name in names}
    for (name, _), runs in zip(jobs, results, strict=True):
        for method, one in runs.items():
            found[name].setdefault(method, []).append(one)
    return found


def prepare() -> None:
    """One thread for each run, and no notes of Lightning; a first fit, so that none of the study loads modules."""
    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(SensorNet(), datamodule=drifting_sensors(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--problems", nargs="+", choices=[*PROBLEMS, *FITS], help="all that the study has if not given")
    parser.add_argument("--fits", nargs="*", choices=FIT_NAMES, help="before the repair; all if none is named")
    parser.add_argument("--max-times", nargs="*", type=float, help="shares of the fit's seconds for the repair")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, default=Path("runs") / "defaults", help="where runs are kept")
    chosen = parser.parse_args()
    if chosen.fits is not None and not set(chosen.problems or FITS) <= set(FITS):
        parser.error(f"`--fits` are of {', '.join(FITS)}\nHINT: leave the other problems out")
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    if chosen.fits is not None:
        run = partial(vary_fits, chosen.out, chosen.fits or FIT_NAMES)
        for name, runs in in_parallel(run, chosen.problems or list(FITS), seeds, chosen.workers).items():
            tuned = {fit: runs[f"fine-tuning, {fit}"] for fit in runs if f"fine-tuning, {fit}" in runs}
            print(f"\n{fitted(name, {fit: runs[fit] for fit in tuned}, tuned)}")
    elif chosen.max_times is not None:
        run = partial(shorten, chosen.out, chosen.max_times or MAX_TIMES)
        for name, runs in in_parallel(run, chosen.problems or list(PROBLEMS), seeds, chosen.workers).items():
            print(f"\n{timed(name, runs)}")
    else:
        run = partial(compare_methods, chosen.out)
        print(f"\n{compared(in_parallel(run, chosen.problems or list(PROBLEMS), seeds, chosen.workers))}")


if __name__ == "__main__":
    main()
