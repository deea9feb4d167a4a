"""Parts of your own: a task, a fitness, a method.

    python examples/custom.py            # all three
    python examples/custom.py method     # one of them

- task: what "right" means. Here the true digit is among the two best guesses, of which a clerk picks one.
- fitness: what a candidate is worth. Here repaired samples less broken ones, so that one broken sample may pay for two
  repaired ones; the gate `accuracy` lets that through. By default the search breaks no known sample.
- method: how new weights are found. Here the bias of one class is raised, as far as nothing breaks. The paper's swarm
  beside it may change 64 weights of the same layer.

The network and its data are in `digits.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import seed_everything
from output import quiet_trainer, start, summary
from rich import print
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl import SearchOptions, Target, repair
from lightning_nrl.methods import Problem, Solution, better
from lightning_nrl.tasks import Custom


def margin(logits: Tensor, digits: Tensor) -> Tensor:
    """By how much the true digit leads the second best of the others: above 0 where it is among the best two."""
    truth = logits.gather(1, digits[:, None])
    others = logits.masked_fill(F.one_hot(digits, logits.shape[1]).bool(), -torch.inf)
    return truth[:, 0] - others.topk(2).values[:, 1]


def among_two(logits: Tensor, digits: Tensor) -> Tensor:
    """Which samples are right, `n` bool."""
    return margin(logits, digits) > 0


def loss(logits: Tensor, digits: Tensor) -> Tensor:
    """What is to be made small, `n`."""
    return F.cross_entropy(logits, digits, reduction="none")


def balance(after: object, before: object) -> Tensor:
    """The worth of each candidate, larger is better; all tensors are `searches x candidates`.

    `after` counts the failed samples that pass (`patched`) and the passed samples that still do (`intact`), and has the
    mean loss of both kinds; `before` is the same of the original weights.
    """
    broken = after.n_passed - after.intact
    return after.patched - broken - 0.1 * after.loss_failed  # of equal ones, that which is nearer to the next repair


@dataclass(frozen=True)
class RaiseBias:
    """Raises the bias of a class in steps, and keeps the step that repairs most among those that break nothing.

    A method gets a `Problem`, proposes weights, and has each proposal counted with the real model on all known data.
    The gate judges what it gives like everything else.
    """

    label: int
    layer: str = "classifier"
    largest: float = 4.0
    steps: int = 16

    def __call__(self, problem: Problem) -> Solution:
        name = f"{self.layer}.bias"
        original = problem.model.state_dict()[name]
        proposals = []
        for step in range(1, self.steps + 1):
            bias = original.clone()
            bias[self.label] += self.largest * step / self.steps
            proposals.append(problem.propose(f"bias +{self.largest * step / self.steps:.2f}", {name: bias}))
        best = better(proposals)
        helps = best is not None and best.repaired > 0
        return Solution(best if helps else None, reason="" if helps else "no bias repairs anything")


SWARM: dict[str, Any] = {"method": "swarm", "gate": "accuracy"}
SLASHED = Target.where(slashed_zero)
REPAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "task": {"own_task": {"task": Custom(passed=among_two, loss=loss, margin=margin), "max_time": 10}},
    "fitness": {"default": SWARM, "balance": {**SWARM, "search": SearchOptions(fitness=balance)}},
    "method": {
        "bias": {"method": RaiseBias(label=0), "target": SLASHED},
        "swarm": {"method": "swarm", "target": SLASHED},
    },
}
"""Arguments of `repair` for each part, by the name of its row."""

if __name__ == "__main__":
    given = start(__doc__, part={"nargs": "?", "choices": tuple(REPAIRS), "help": "all if there is none"})
    for part in [given.part] if given.part else REPAIRS:
        seed_everything(0, verbose=False)
        model, data = DigitNet(), SlashedZeros()
        quiet_trainer(5 if given.fast else 10 if part == "fitness" else 30).fit(model, datamodule=data)
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        reports = {}
        for name, arguments in REPAIRS[part].items():
            model.load_state_dict(trained)
            folder = f"runs/custom/{part}/{name}"
            limit = {"max_time": 3} if given.fast and "max_time" in arguments else {}
            more = {**arguments, **limit, "dirpath": folder, "unseen": "test", "verbose": False}
            reports[name] = repair(quiet_trainer(), model, datamodule=data, **more)
        print(summary(**reports))
        if part == "method":
            for name, report in reports.items():
                print(f"{name.replace('_', ' ')}: {report.reason}")
        if part == "task":
            print("Accuracy here is the share of digits that are among the best two guesses.")
