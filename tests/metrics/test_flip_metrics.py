from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection
from two_processes import in_two_processes

from lightning_nrl.evaluation import metrics
from lightning_nrl.evaluation import metrics as F
from lightning_nrl.evaluation.metrics import FlipMetric

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
OLD, NEW, TARGET = torch.randint(3, (3, 101), generator=GENERATOR).unbind(0)
UNEVEN = (slice(0, 83), slice(83, 101))


def collection() -> MetricCollection:
    return MetricCollection([kind() for kind in CLASSES], compute_groups=True)


def test_plots_have_room_for_a_relative_rate_above_1() -> None:
    # One sample is broken, one repaired: NFR = 1/2, both error rates 1/2, so 1/2 / (1/2 * 1/2). Of ten, nine of them
    # repaired: 1/10 / (1/10 * 1/10).
    metric = metrics.RelativeNegativeFlipRate()
    old, target = torch.zeros(10, dtype=torch.int64), torch.ones(10, dtype=torch.int64)
    target[0] = 0
    assert metric(old[:2], 1 - old[:2], target[:2]) == 2
    torch.testing.assert_close(metric(old, 1 - old, target), torch.tensor(10.0))
    assert metric.plot_upper_bound is None
    assert {kind.plot_upper_bound for kind in CLASSES if kind is not metrics.RelativeNegativeFlipRate} == {1.0}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_batches_add_up_to_the_function_on_all_until_a_reset(kind: type[FlipMetric]) -> None:
    metric, function = kind(), CLASSES[kind]
    of_batch = [metric(OLD[rows], NEW[rows], TARGET[rows]) for rows in UNEVEN]
    torch.testing.assert_close(metric.compute(), function(OLD, NEW, TARGET))
    for value, rows in zip(of_batch, UNEVEN, strict=True):
        torch.testing.assert_close(value, function(OLD[rows], NEW[rows], TARGET[rows]))
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), function(OLD, NEW, TARGET))
    metric.reset()
    assert metric.flips.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_higher_is_better_agrees_with_a_repair_that_breaks_more(kind: type[FlipMetric]) -> None:
    worse, better = kind(), kind()
    worse.flips, better.flips = torch.tensor([6, 4, 2, 3]), torch.tensor([8, 2, 3, 2])
    worse._update_count = better._update_count = 1
    assert (better.compute() > worse.compute()).item() is kind.higher_is_better


def test_a_collection_updates_one_state_for_all() -> None:
    together = collection()
    for rows in UNEVEN:
        together.update(OLD[rows], NEW[rows], TARGET[rows])
    assert list(map(len, together.compute_groups.values())) == [len(CLASSES)]
    for kind, function in CLASSES.items():
        torch.testing.assert_close(together.compute()[kind.__name__], function(OLD, NEW, TARGET))


def test_more_samples_than_float32_can_count() -> None:
    metric = metrics.NegativeFlipRate()
    metric.update(OLD, NEW, TARGET)
    counted = metric.flips.clone()
    metric.flips += 2**25
    metric.update(OLD, NEW, TARGET)
    assert (metric.flips - 2**25).tolist() == (2 * counted).tolist()


def _on_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    together = collection()
    together.update(OLD[UNEVEN[rank]], NEW[UNEVEN[rank]], TARGET[UNEVEN[rank]])
    torch.save(together.compute(), f"{folder}/{rank}.pt")


def test_two_ranks_with_uneven_shards_give_the_single_process_values(tmp_path: os.PathLike[str]) -> None:
    in_two_processes(_on_rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        for kind, function in CLASSES.items():
            torch.testing.assert_close(found[kind.__name__], function(OLD, NEW, TARGET))
