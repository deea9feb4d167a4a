"""Rates of an update, as functions and as metrics."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection
from two_processes import in_two_processes

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import metrics
from lightning_nrl.evaluation import metrics as F
from lightning_nrl.evaluation.metrics import FlipMetric, NegativeFlipRate

# Five kept, two broken, three repaired, one failing.
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
OLD = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 2])
NEW = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 0, 0])
DENSE = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]])
NAN = torch.tensor([[float("nan"), 0.0], [2.0, float("nan")], [0.0, 1.0]])
Rate = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits(classes: Tensor, n_classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(classes, n_classes).float().movedim(-1, 1) - 0.5


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (F.negative_flip_rate, 2 / 11),
        (F.positive_flip_rate, 3 / 11),
        (F.negative_flip_impact, 2 / 3),
        (F.relative_negative_flip_rate, (2 / 11) / (7 / 11 * 3 / 11)),
        (F.backward_trust_compatibility, 5 / 7),
        (F.backward_error_compatibility, 1 / 3),
        (F.repair_rate, 3 / 4),
        (F.break_rate, 2 / 7),
    ],
)
def test_every_rate_follows_its_formula(rate: Rate, expected: float) -> None:
    assert rate(OLD, NEW, TARGET).item() == pytest.approx(expected)
    assert rate(logits(OLD), logits(NEW), TARGET).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("old", "new", "target", "counts"),
    [
        (OLD, NEW, TARGET, [5, 2, 3, 1]),
        (
            logits(OLD),
            logits(NEW, 7),
            TARGET,
            [5, 2, 3, 1],
        ),  # models that know different numbers of classes
        # One logit is that of class 1 over a 0.
        (
            torch.tensor([[2.0], [-1.0]]),
            torch.tensor([[2.0], [1.0]]),
            torch.tensor([1, 0]),
            [1, 1, 0, 0],
        ),
        (DENSE[0], DENSE[1], DENSE[2], [1, 1, 1, 1]),
        (logits(DENSE[0]), logits(DENSE[1]), DENSE[2], [1, 1, 1, 1]),
        # NaN logits are wrong even where argmax hits the target.
        (torch.tensor([0, 1, 0]), NAN, torch.tensor([0, 1, 1]), [0, 2, 1, 0]),
    ],
)
def test_kept_broken_repaired_and_failing_are_counted(
    old: Tensor, new: Tensor, target: Tensor, counts: list[int]
) -> None:
    metric = NegativeFlipRate()
    metric.update(old, new, target)
    assert metric.flips.tolist() == counts


@pytest.mark.parametrize(
    ("rate", "without_samples", "old_all_wrong", "new_all_right"),
    [
        (F.negative_flip_rate, math.nan, 0.0, 0.0),
        (F.positive_flip_rate, math.nan, 0.0, 0.5),
        (F.negative_flip_impact, math.nan, 0.0, math.nan),
        (F.relative_negative_flip_rate, math.nan, math.nan, math.nan),
        (F.backward_trust_compatibility, 1.0, 1.0, 1.0),
        (F.backward_error_compatibility, math.nan, 1.0, math.nan),
        (F.repair_rate, math.nan, 0.0, 1.0),
        (F.break_rate, math.nan, math.nan, 0.0),
    ],
)
def test_what_is_undefined_is_nan(
    rate: Rate, without_samples: float, old_all_wrong: float, new_all_right: float
) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert rate(empty, empty, empty).item() == pytest.approx(without_samples, nan_ok=True)
    right, wrong, half = torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([1, 0])
    assert rate(wrong, wrong, right).item() == pytest.approx(old_all_wrong, nan_ok=True)
    assert rate(half, right, right).item() == pytest.approx(new_all_right, nan_ok=True)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"`old_preds`: torch.int64 of shape \[3\]"),
        (
            torch.rand(11),
            r"`old_preds`: torch.float32 of shape \[11\] does not fit a `target` \[11\]",
        ),
        (torch.rand(10, 3), r"`old_preds`: torch.float32 of shape \[10, 3\]"),
        (
            torch.zeros(11, 3, dtype=torch.int64),
            r"HINT: give classes as integers in the shape of the target, or ",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(old: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        F.negative_flip_rate(old, NEW, TARGET)
    with pytest.raises(ConfigurationError, match=message.replace("old_preds", "new_preds")):
        F.negative_flip_rate(OLD, old, TARGET)


CLASSES = {
    metrics.NegativeFlipRate: F.negative_flip_rate,
    metrics.PositiveFlipRate: F.positive_flip_rate,
    metrics.NegativeFlipImpact: F.negative_flip_impact,
    metrics.RelativeNegativeFlipRate: F.relative_negative_flip_rate,
    metrics.BackwardTrustCompatibility: F.backward_trust_compatibility,
    metrics.BackwardErrorCompatibility: F.backward_error_compatibility,
    metrics.RepairRate: F.repair_rate,
    metrics.BreakRate: F.break_rate,
}
GENERATOR = torch.Generator().manual_seed(0)
MANY_OLD, MANY_NEW, MANY_TARGET = torch.randint(3, (3, 101), generator=GENERATOR).unbind(0)
UNEVEN = (slice(0, 83), slice(83, 101))


def collection() -> MetricCollection:
    return MetricCollection([kind() for kind in CLASSES], compute_groups=True)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_batches_add_up_to_the_function_on_all_until_a_reset(kind: type[FlipMetric]) -> None:
    metric, function = kind(), CLASSES[kind]
    of_batch = [metric(MANY_OLD[rows], MANY_NEW[rows], MANY_TARGET[rows]) for rows in UNEVEN]
    torch.testing.assert_close(metric.compute(), function(MANY_OLD, MANY_NEW, MANY_TARGET))
    for value, rows in zip(of_batch, UNEVEN, strict=True):
        torch.testing.assert_close(
            value, function(MANY_OLD[rows], MANY_NEW[rows], MANY_TARGET[rows])
        )
    torch.testing.assert_close(
        pickle.loads(pickle.dumps(metric)).compute(), function(MANY_OLD, MANY_NEW, MANY_TARGET)
    )
    metric.reset()
    assert metric.flips.tolist() == [0, 0, 0, 0]


def test_a_collection_updates_one_state_for_all() -> None:
    together = collection()
    for rows in UNEVEN:
        together.update(MANY_OLD[rows], MANY_NEW[rows], MANY_TARGET[rows])
    assert list(map(len, together.compute_groups.values())) == [len(CLASSES)]
    for kind, function in CLASSES.items():
        torch.testing.assert_close(
            together.compute()[kind.__name__], function(MANY_OLD, MANY_NEW, MANY_TARGET)
        )


def _on_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    together = collection()
    together.update(MANY_OLD[UNEVEN[rank]], MANY_NEW[UNEVEN[rank]], MANY_TARGET[UNEVEN[rank]])
    torch.save(together.compute(), f"{folder}/{rank}.pt")


def test_two_ranks_with_uneven_shards_give_the_single_process_values(
    tmp_path: os.PathLike[str],
) -> None:
    in_two_processes(_on_rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        for kind, function in CLASSES.items():
            torch.testing.assert_close(
                found[kind.__name__], function(MANY_OLD, MANY_NEW, MANY_TARGET)
            )
