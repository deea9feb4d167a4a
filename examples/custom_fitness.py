"""A fitness of your own: what a candidate is worth. Here: repaired samples less broken ones, nothing else.

    python examples/custom_fitness.py

By default the search breaks no known sample, whatever that leaves unrepaired. Where only the balance counts, one broken
sample may pay for two repaired ones. The swarm of the paper searches the last layer once in the package's order (fewest
broken first) and once for the balance; the gate `accuracy` lets both through. Network and data are in `digits.py`.
"""

from __future__ import annotations

from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print
from torch import Tensor

from lightning_nrl import SearchOptions, repair


def balance(after: object, before: object) -> Tensor:
    """The worth of each candidate, larger is better; all tensors are `searches x candidates`.

    `after` counts the failed samples that pass (`patched`) and the passed samples that still do (`intact`), and has the
    mean loss of both kinds; `before` is the same of the original weights.
    """
    broken = after.n_passed - after.intact
    return after.patched - broken - 0.1 * after.loss_failed  # of equal ones, that which is nearer to the next repair


if __name__ == "__main__":
    fast = start(__doc__).fast
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=5 if fast else 10, accelerator="cpu", **quiet)
    model, data = DigitNet(), SlashedZeros()
    trainer.fit(model, datamodule=data)
    trained = {name: value.clone() for name, value in model.state_dict().items()}

    reports = {}
    for name, fitness in {"default": "lexicographic", "balance": balance}.items():
        model.load_state_dict(trained)
        reports[name] = repair(
            trainer,
            model,
            datamodule=data,
            method="swarm",
            gate="accuracy",
            search=SearchOptions(fitness=fitness),
            unseen="test",
            dirpath=f"runs/custom_fitness/{name}",
            verbose=False,
        )
    print(summary(**reports))
