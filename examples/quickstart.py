"""Repairs a digit classifier on slashed zeros without breaking what it gets right.

    python examples/quickstart.py   # compares the fit, a swarm and the default

Takes less than a minute on two cores. The data and the network are in `digits.py`.
`train_and_repair` has all the code that a repair needs.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from rich import box, print
from rich.table import Table

from lightning_nrl import RegressionFreeRepair, RepairReport, Target, repair


def train_and_repair(seed: int) -> tuple[RepairReport, Trainer, float]:
    """Returns the report of the default method, the trainer, and the seconds of the fit."""
    seed_everything(seed, verbose=False)
    timer = Timer()
    callback = RegressionFreeRepair(
        target=Target.where(slashed_zero), unseen="test", seed=seed, verbose=False
    )
    trainer = Trainer(
        max_epochs=30,
        accelerator="cpu",
        callbacks=[timer, callback],
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros(seed))
    return callback.report, trainer, timer.time_elapsed("train")


def swarm_alone(seed: int, trained: Trainer) -> RepairReport:
    """Repairs the checkpoint with the paper's localisation and swarm and this package's ranking."""
    return repair(
        Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        ),
        DigitNet(),
        datamodule=SlashedZeros(seed),
        ckpt_path=trained.checkpoint_callback.best_model_path,
        method="swarm",
        target=Target.where(slashed_zero),
        unseen="test",
        seed=seed,
        dirpath=f"{trained.log_dir}/swarm",
        verbose=False,
    )


def one_repair(seed: int) -> None:
    default, trainer, seconds = train_and_repair(seed)
    known, unseen = default.pooled("known"), default.pooled("unseen")
    print(
        "\nThe fit: digits without a slashed zero. "
        f"Then {known.targeted + known.passed_in_target} slashed zeros come in, "
        f"{known.targeted} are misread: the target. "
        f"A repair looks at the {known.n:,} known digits; "
        f"{unseen.n:,} unseen ones are only counted.\n"
    )
    print(side_by_side(default, swarm_alone(seed, trainer), seconds))
    print(
        "\nrepaired: wrong before, right now. broken: right before, wrong now.\n"
        "swarm: the paper's localisation and swarm in the last layer; "
        "this package's ranking accepts no broken sample "
        '(method="swarm"). '
        "`RegressionFreeRepair.from_paper` weighs broken samples against repaired ones.\n"
        "default: a climb. `training` starts at the trained weights, each later rung from where "
        "the last one stands. "
        "`search` is the swarm again, but every known sample that was right keeps a margin. "
        "Each rung is judged on known samples that it has not used (held out). "
        "A rung is kept if it repairs more and does no harm there; unseen samples are counted "
        "with the result of the last one that is kept.\n"
    )
    print(f"The verdict         {default.verdict.headline}")
    print(f"The report          {default.files['html']}")
    checkpoint = default.files.get("checkpoint", "none, the weights are those of training")
    print(f"The repaired model  {checkpoint}")
    print(f"Curves and charts   tensorboard --logdir {trainer.log_dir}")
    print("For your own model  README.md, Three ways to use it")


def side_by_side(default: RepairReport, swarm: RepairReport, seconds: float) -> Table:
    """Tabulates the trained model, the swarm alone and the rungs of the default, a column each."""
    known, unseen, rungs = swarm.pooled("known"), swarm.pooled("unseen"), default.rungs
    result, held_out = default.pooled("unseen"), [rung.held_out for rung in rungs]
    last_kept = [rung for rung in rungs if rung.kept][-1]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    climb = [
        f"{'' if i else 'default:'}\n{rung.name}\n{'(kept)' * rung.kept}"
        for i, rung in enumerate(rungs)
    ]
    table.add_column("")
    for head in ("\nfit\n", "\nswarm\n", *climb):
        table.add_column(head, justify="right")

    def of_result(value: object) -> list[object]:
        return [value if rung is last_kept else "" for rung in rungs]

    fit, alone, now = (
        f"{x:.2%}" for x in (result.accuracy_before, unseen.accuracy_after, result.accuracy_after)
    )
    changed = 0 if swarm.change is None else swarm.change.changed
    targets, shown = known.repaired_in_target, unseen.repaired_in_target
    spent = f"{sum(swarm.seconds.values()):.1f}", [f"{rung.seconds:.1f}" for rung in rungs]
    sections: list[list[tuple[str, str, object, list[object]]]] = [
        [
            (
                f"known targets repaired, of {known.targeted}",
                "",
                targets,
                [r.repaired_in_target for r in rungs],
            ),
            ("known failures repaired", "", known.repaired, [r.repaired for r in rungs]),
            ("known samples broken", "", known.broken, [r.broken for r in rungs]),
        ],
        [
            (
                "held-out failures repaired",
                "",
                "",
                [c and f"{c.repaired} of {c.repaired + c.failing}" for c in held_out],
            ),
            (
                "held-out samples broken",
                "",
                "",
                [c and f"{c.broken} of {c.passed}" for c in held_out],
            ),
        ],
        [
            (
                f"unseen targets repaired, of {unseen.targeted}",
                "",
                shown,
                of_result(result.repaired_in_target),
            ),
            ("unseen failures repaired", "", unseen.repaired, of_result(result.repaired)),
            ("unseen samples broken", "", unseen.broken, of_result(result.broken)),
            ("unseen accuracy", fit, alone, of_result(now)),
        ],
        [
            ("weights changed", "", changed, [f"{r.weights_changed:,}" for r in rungs]),
            ("seconds", f"{seconds:.1f}", *spent),
        ],
    ]
    for rows in sections:
        for name, of_fit, of_swarm, of_rungs in rows:
            table.add_row(name, of_fit, str(of_swarm), *map(str, of_rungs))
        table.add_section()
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of data, training and repair")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster for a network this small
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    one_repair(arguments.seed)
