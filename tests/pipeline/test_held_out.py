"""Held-out data: only a target that cannot be asked there is a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import on_ranks
from toy_repairs import blobs, mlp, quick

from lightning_nrl import ConfigurationError, Target, TensorSource
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data import Batch
from lightning_nrl.errors import DataWarning, EvaluationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.pipeline.baseline import HeldOut, evaluate_held_out


@dataclass(frozen=True)
class Torn(TensorSource):
    """Cannot be read."""

    def __iter__(self) -> Iterator[Batch]:
        raise OSError("a file is torn")


def test_unseen_data_that_one_rank_cannot_read_stop_every_rank() -> None:
    def run(collective: Collective) -> str:
        later = [(Torn if collective.rank else TensorSource)(*blobs(8), split="later")]
        with pytest.raises((OSError, EvaluationError)) as error:
            evaluate_held_out(Evaluator(mlp(), collective=collective), later, quick())
        return str(error.value)

    first, second = on_ranks(2, run)
    assert first.startswith("`later` data could not be read on another rank")
    assert second == "a file is torn"


def missing(batch: Any) -> Any:
    raise KeyError("camera")


@pytest.mark.parametrize("where", [missing, lambda batch: None])
def test_a_target_that_cannot_be_asked_is_a_warning(where: Callable[[Any], Any]) -> None:
    with pytest.warns(DataWarning, match="the target's failures are not counted on unseen data: `target`: the pred"):
        results = evaluate_held_out(
            Evaluator(mlp()), [TensorSource(*blobs(8), split="later")], quick(target=Target.where(where))
        )
    assert len(results) == 8
    assert not results.targeted.any()


def test_a_target_that_one_rank_cannot_ask_is_left_out_on_all() -> None:
    def run(collective: Collective) -> int:
        target = Target.where(missing if collective.rank else lambda batch: torch.ones(len(batch[0]), dtype=torch.bool))
        later = Half(*blobs(8), split="later", extras=(torch.full((8,), collective.rank),))
        results = evaluate_held_out(Evaluator(mlp(), collective=collective), [later], quick(target=target))
        return int(results.targeted.sum())

    with pytest.warns(DataWarning):
        assert on_ranks(2, run) == [0, 0]


class Half(TensorSource):
    """One rank's half of the samples; `extras` says of which rank."""

    def __iter__(self) -> Iterator[Batch]:
        return self.draw([self.index[int(self.extras[0][0]) :: 2]])


def test_whatever_else_is_wrong_is_no_warning() -> None:
    x, y = blobs(8)
    negative = TensorSource(x, y - 3, split="later")
    with pytest.raises(EvaluationError, match="have labels below 0"):
        evaluate_held_out(Evaluator(mlp()), [negative], quick())
    lacking = TensorSource(x, y, split="later")
    with pytest.raises(ConfigurationError, match=r"`protected`.*no column 5"):
        evaluate_held_out(Evaluator(mlp()), [lacking], quick(protected=5))


def test_what_becomes_of_held_out_samples_under_other_weights() -> None:
    evaluator = Evaluator(torch.nn.Linear(1, 2, bias=False))
    evaluator.model.weight.data = torch.tensor([[0.0], [1.0]])
    sources = [TensorSource(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]), split="later")]
    flips = HeldOut(sources, evaluator.run(sources)).flips(evaluator, {"weight": torch.tensor([[0.0], [-1.0]])})
    assert (flips.broken.tolist(), flips.repaired.tolist()) == ([True, False], [False, True])
    assert evaluator.model.weight.tolist() == [[0.0], [1.0]]
