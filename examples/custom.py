"""Plugs in a task, a fitness and a method of your own.

    python examples/custom.py            # all three parts
    python examples/custom.py method     # one of them

- The task defines which predictions are right. Here, a prediction is right if the true digit is
  among the top two.
- The fitness ranks the candidates of a search. Here, it is the number of repaired minus broken
  samples. The gate `accuracy` accepts such a trade. By default, a search breaks no known sample.
- The method finds new weights. Here, it raises the bias of one class until a sample would break.
  For comparison, the paper's swarm changes up to 64 weights of the same layer.

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
from lightning_nrl.methods import Method, Problem, Solution, better
from lightning_nrl.search import FitnessFunction
from lightning_nrl.search.scores import Scores
from lightning_nrl.tasks import Custom


def margin(logits: Tensor, digits: Tensor) -> Tensor:
    """Returns the logit of the true digit minus the second largest other logit.

    The margin is above 0 if the true digit is in the top two.
    """
    truth = logits.gather(1, digits[:, None])
    others = logits.masked_fill(F.one_hot(digits, logits.shape[1]).bool(), -torch.inf)
    return truth[:, 0] - others.topk(2).values[:, 1]


def among_two(logits: Tensor, digits: Tensor) -> Tensor:
    """Returns True for samples with the true digit in the top two, `n`."""
    return margin(logits, digits) > 0


def loss(logits: Tensor, digits: Tensor) -> Tensor:
    """Returns the loss of each sample, `n`."""
    return F.cross_entropy(logits, digits, reduction="none")


class Balance(FitnessFunction):
    """Counts repaired minus broken samples."""

    def __call__(self, after: Scores, before: Scores) -> Tensor:
        """Returns the fitness of each candidate, `candidates`; larger is better.

        `after.patched` counts failed samples that pass with the candidate's weights, `after.intact`
        passed samples that still pass. `after.loss_failed` is a mean loss. `before` has the same
        numbers for the original weights.
        """
        broken = after.n_passed - after.intact
        # The loss decides between equal counts.
        return after.patched - broken - 0.1 * after.loss_failed


@dataclass(frozen=True)
class RaiseBias(Method):
    """Raises the bias of a class in steps; returns the step that repairs most and breaks nothing.

    A method gets a `Problem` and proposes weights. `problem.propose` counts a proposal with the
    real model on all known data. The gate judges the returned weights, as for any other method.
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
            proposals.append(
                problem.propose(f"bias +{self.largest * step / self.steps:.2f}", {name: bias})
            )
        best = better(proposals)
        helps = best is not None and best.repaired > 0
        return Solution(best if helps else None, reason="" if helps else "no bias repairs anything")


SWARM: dict[str, Any] = {"method": "swarm", "gate": "accuracy"}
SLASHED = Target.where(slashed_zero)
REPAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "task": {
        "own_task": {"task": Custom(passed=among_two, loss=loss, margin=margin), "max_time": 10}
    },
    "fitness": {"default": SWARM, "balance": {**SWARM, "search": SearchOptions(fitness=Balance())}},
    "method": {
        "bias": {"method": RaiseBias(label=0), "target": SLASHED},
        "swarm": {"method": "swarm", "target": SLASHED},
    },
}
"""Arguments of `repair` by part and by row of the table."""

if __name__ == "__main__":
    given = start(__doc__, part={"nargs": "?", "choices": tuple(REPAIRS), "help": "default: all"})
    for part in [given.part] if given.part else REPAIRS:
        seed_everything(0, verbose=False)
        model, data = DigitNet(), SlashedZeros()
        quiet_trainer(5 if given.fast else 10 if part == "fitness" else 30).fit(
            model, datamodule=data
        )
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
            print("Accuracy here is the share of images with the true digit in the top two.")
