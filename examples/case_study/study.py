"""Runs the paper's case study: experiments A, B and C, 66 settings with ten seeds each.

    python examples/case_study/study.py           # everything
    python examples/case_study/study.py --quick   # few images, short training, three seeds: minutes
    python examples/case_study/study.py --layer features.15.body.3   # last convolution instead
    python examples/case_study/study.py --data digits
    python examples/case_study/study.py --loss-term inverse_ratio --delta 1   # (L + 1)/(L' + 1)

Draws the scenes, trains a network per experiment and runs the settings on one of its layers, by
default the last; `--quick` runs those of Table II. Writes a table per experiment, the paper's
figures 2 to 6 and `answers.md` to `runs/study_<data>_<seed>/`. Existing files are reused. Without
the sprites of the vehicles, the data are scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from figures import draw_all, others_of, tables_of
from grid import studied
from lightning.pytorch import Trainer
from network import EPOCHS, TARGETS, Digits, Scenes, Vehicles, trained
from questions import answers, page
from rich import print
from rich.markdown import Markdown
from vehicles import PAK

from lightning_nrl import sweep
from lightning_nrl.search.fitness import LOSS_TERMS, Fitness
from lightning_nrl.study import TABLE_II, PaperRow

DATA: dict[str, type[Scenes]] = {"vehicles": Vehicles, "digits": Digits}
QUICK = {"total": 1_700, "epochs": 12, "seeds": 3}


def setting_of(
    row: PaperRow, loss_term: str = "bounded", delta: float = Fitness().delta
) -> dict[str, object]:
    """Returns the arguments and the name of a setting.

    Arguments that the row lacks are those of `from_paper`.
    """
    arguments = asdict(row)
    words = (
        f"{row.equation} alpha={row.alpha}",
        "pi" * row.perfect_intact,
        f"lw={row.n_weights} pos={row.n_passed} p={row.particles}",
    )
    own = {
        "fitness": arguments.pop("equation"),
        "loss_term": loss_term,
        "delta": delta,
        **arguments,
    }
    own |= {"infeasible": "zero", "start": "paper", "iterations": 100, "patience": 10}
    return {"name": " ".join(filter(None, words)), **own}


def study(
    name: str,
    experiments: str,
    settings: Sequence[dict],
    folder: Path,
    *,
    seed: int,
    seeds: int,
    epochs: int,
    total: int | None,
    layer: str = "auto",
) -> None:
    """Runs experiments and writes their results to a folder."""
    for experiment in experiments:
        data = DATA[name](experiment, seed, total)
        of = f"{name}_{experiment}_{seed}" + (f"_{total}" if total else "")
        checkpoint = trained(data, Path("runs") / f"{of}.ckpt", seed, epochs)
        trainer = Trainer(
            devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        given = {
            "datamodule": data,
            "ckpt_path": checkpoint,
            "target": TARGETS[experiment],
            "layer": layer,
        }
        where = {"settings": settings, "seeds": seeds, "dirpath": folder / experiment}
        print(sweep(trainer, data.network(), **given, **where))  # runs in the folder are reused
    tables = tables_of(folder)
    answered = page(answers(tables))
    (folder / "answers.md").write_text(answered)
    print(Markdown(answered))
    others = {e: others_of(e, seed) for e in tables} if name == "vehicles" and total is None else {}
    for path in (*draw_all(tables, folder, others), folder / "answers.md"):
        print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", default="ABC")
    parser.add_argument(
        "--data", choices=DATA, help="default: vehicles if the sprites are installed"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and training")
    parser.add_argument(
        "--seeds", type=int, help="number of searches per setting; default: ten, as in the paper"
    )
    parser.add_argument("--table-ii", action="store_true", help="only the twelve rows of Table II")
    parser.add_argument(
        "--loss-term",
        choices=LOSS_TERMS,
        default="bounded",
        help="reading of the paper's loss ratio",
    )
    parser.add_argument(
        "--delta", type=float, default=Fitness().delta, help="the small constant in that ratio"
    )
    parser.add_argument(
        "--layer", default="auto", help="layer to repair; auto: the last Linear layer"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few images, a short training, only Table II"
    )
    chosen = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    name = chosen.data or ("vehicles" if PAK.exists() else "digits")
    if chosen.data is None and name == "digits":
        print(
            f"{PAK} has no sprites of vehicles: this runs on digits.\n"
            "HINT: apt install simutrans-pak64"
        )
    rows = tuple(TABLE_II.values()) if chosen.quick or chosen.table_ii else studied()
    kind = "_quick" * chosen.quick + f"_{chosen.loss_term}" * (chosen.loss_term != "bounded")
    kind += f"_delta_{chosen.delta:g}" * (chosen.delta != Fitness().delta)
    kind += f"_{chosen.layer}" * (chosen.layer != "auto")
    study(
        name,
        chosen.experiments,
        [setting_of(row, chosen.loss_term, chosen.delta) for row in rows],
        Path("runs") / f"study_{name}_{chosen.seed}{kind}",
        seed=chosen.seed,
        seeds=chosen.seeds or (QUICK["seeds"] if chosen.quick else 10),
        epochs=QUICK["epochs"] if chosen.quick else EPOCHS,
        total=QUICK["total"] if chosen.quick else None,
        layer=chosen.layer,
    )


if __name__ == "__main__":
    main()
