"""Rates of an update as metrics."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection
from two_processes import in_two_processes

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.metrics import (
    BackwardErrorCompatibility,
    BackwardTrustCompatibility,
    BreakRate,
    FlipMetric,
    NegativeFlipImpact,
    NegativeFlipRate,
    PositiveFlipRate,
    RelativeNegativeFlipRate,
    RepairRate,
)

# Five kept, two broken, three repaired, one failing.
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
OLD = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 2])
NEW = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 0, 0])
DENSE = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]])
NAN = torch.tensor([[float("nan"), 0.0], [2.0, float("nan")], [0.0, 1.0]])


def logits(classes: Tensor, n_classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(classes, n_classes).float().movedim(-1, 1) - 0.5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (NegativeFlipRate, 2 / 11),
        (PositiveFlipRate, 3 / 11),
        (NegativeFlipImpact, 2 / 3),
        (RelativeNegativeFlipRate, (2 / 11) / (7 / 11 * 3 / 11)),
        (BackwardTrustCompatibility, 5 / 7),
        (BackwardErrorCompatibility, 1 / 3),
        (RepairRate, 3 / 4),
        (BreakRate, 2 / 7),
    ],
)
def test_every_rate_follows_its_formula(kind, expected):
    assert kind()(OLD, NEW, TARGET).item() == pytest.approx(expected)
    assert kind()(logits(OLD), logits(NEW), TARGET).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("old", "new", "target", "counts"),
    [
        (OLD, NEW, TARGET, [5, 2, 3, 1]),
        # The models know different numbers of classes.
        (logits(OLD), logits(NEW, 7), TARGET, [5, 2, 3, 1]),
        (DENSE[0], DENSE[1], DENSE[2], [1, 1, 1, 1]),
        (logits(DENSE[0]), logits(DENSE[1]), DENSE[2], [1, 1, 1, 1]),
        # NaN logits are wrong even where argmax hits the target.
        (torch.tensor([0, 1, 0]), NAN, torch.tensor([0, 1, 1]), [0, 2, 1, 0]),
    ],
)
def test_kept_broken_repaired_and_failing_are_counted(old, new, target, counts):
    metric = NegativeFlipRate()
    metric.update(old, new, target)
    assert metric.flips.tolist() == counts


@pytest.mark.parametrize(
    ("kind", "without_samples", "old_all_wrong", "new_all_right"),
    [
        (NegativeFlipImpact, math.nan, 0.0, math.nan),
        (RelativeNegativeFlipRate, math.nan, math.nan, math.nan),
        (BackwardTrustCompatibility, 1.0, 1.0, 1.0),
        (BackwardErrorCompatibility, math.nan, 1.0, math.nan),
        (BreakRate, math.nan, math.nan, 0.0),
    ],
)
def test_what_is_undefined_is_nan(kind, without_samples, old_all_wrong, new_all_right):
    empty = torch.zeros(0, dtype=torch.int64)
    assert kind()(empty, empty, empty).item() == pytest.approx(without_samples, nan_ok=True)
    right, wrong, half = torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([1, 0])
    assert kind()(wrong, wrong, right).item() == pytest.approx(old_all_wrong, nan_ok=True)
    assert kind()(half, right, right).item() == pytest.approx(new_all_right, nan_ok=True)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"`old_preds`: torch.int64 of shape \[3\]"),
        (torch.rand(11), r"`old_preds`: .* \[11\] does not fit a `target` \[11\]"),
        (torch.rand(10, 3), r"`old_preds`: torch.float32 of shape \[10, 3\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(old, message):
    with pytest.raises(ConfigurationError, match=message):
        NegativeFlipRate().update(old, NEW, TARGET)
    with pytest.raises(ConfigurationError, match=message.replace("old_preds", "new_preds")):
        NegativeFlipRate().update(OLD, old, TARGET)


KINDS = (
    NegativeFlipRate,
    PositiveFlipRate,
    NegativeFlipImpact,
    RelativeNegativeFlipRate,
    BackwardTrustCompatibility,
    BackwardErrorCompatibility,
    RepairRate,
    BreakRate,
)
GENERATOR = torch.Generator().manual_seed(0)
MANY_OLD, MANY_NEW, MANY_TARGET = torch.randint(3, (3, 101), generator=GENERATOR).unbind(0)
UNEVEN = (slice(0, 83), slice(83, 101))


def at_once(kind: type[FlipMetric], rows: slice = slice(None)) -> Tensor:
    return kind()(MANY_OLD[rows], MANY_NEW[rows], MANY_TARGET[rows])


def test_batches_add_up_to_the_rate_of_all_until_a_reset():
    metric = RepairRate()
    for rows in UNEVEN:
        value = metric(MANY_OLD[rows], MANY_NEW[rows], MANY_TARGET[rows])
        torch.testing.assert_close(value, at_once(RepairRate, rows))
    copied = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(copied.compute(), at_once(RepairRate))
    metric.reset()
    assert metric.flips.tolist() == [0, 0, 0, 0]


def _on_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = MetricCollection([kind() for kind in KINDS], compute_groups=True)
    metrics.update(MANY_OLD[UNEVEN[rank]], MANY_NEW[UNEVEN[rank]], MANY_TARGET[UNEVEN[rank]])
    assert len(metrics.compute_groups) == 1  # all rates share one state
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")


def test_two_ranks_with_uneven_shards_give_the_single_process_values(tmp_path):
    in_two_processes(_on_rank, str(tmp_path))
    for rank in range(2):
        rates = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        for kind in KINDS:
            torch.testing.assert_close(rates[kind.__name__], at_once(kind))
