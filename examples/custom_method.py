"""A method of your own: how new weights are found. Here: the bias of one class is raised, as far as nothing breaks.

    python examples/custom_method.py

A method gets a `Problem`, proposes weights, and has each proposal counted with the real model on all known data. The
gate judges what it gives like everything else. The network and its data are in `digits.py`; beside it is the paper's
swarm, which may change 64 weights of the same layer where this one changes a single number.
"""

from __future__ import annotations

from dataclasses import dataclass

from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print

from lightning_nrl import Target, repair
from lightning_nrl.problem import Problem, Solution, better


@dataclass(frozen=True)
class RaiseBias:
    """Raises the bias of a class in steps, and keeps the step that repairs most among those that break nothing."""

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


if __name__ == "__main__":
    fast = start(__doc__).fast
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=5 if fast else 30, accelerator="cpu", **quiet)
    model, data = DigitNet(), SlashedZeros()
    trainer.fit(model, datamodule=data)
    trained = {name: value.clone() for name, value in model.state_dict().items()}

    reports = {}
    for name, method in {"raised_bias": RaiseBias(label=0), "swarm": "swarm"}.items():
        model.load_state_dict(trained)
        reports[name] = repair(
            trainer,
            model,
            datamodule=data,
            target=Target.where(slashed_zero),
            method=method,
            unseen="test",
            dirpath=f"runs/custom_method/{name}",
            verbose=False,
        )
    print(summary(**reports))
    for name, report in reports.items():
        print(f"{name.replace('_', ' ')}: {report.reason}")
