"""`SwarmScorer`: counts passed samples and sums losses of all candidates in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.search.fitness import Fitness, FitnessFunction
from lightning_nrl.search.scores import Scores
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.chunk_scorer import ChunkScorer, ScoringData
from lightning_nrl.search.scoring.memory import free_memory
from lightning_nrl.search.scoring.sparse_delta import make_layer_deltas

# Number of samples of I_pos that are scored first, because they break most easily.
N_MOST_FRAGILE = 128

# Rows of a table of sums, as in `sum_over_samples`. For I_pos, WEIGHT is that of broken samples.
N_SUMS = 4
PASSED, LOSS, WEIGHT, CREDIT = range(N_SUMS)


@dataclass(frozen=True)
class SwarmScorer:
    """Scores candidates on recorded data. `make_scorer` builds it."""

    failed: list[ChunkScorer]  # scorers of the samples of I_neg
    passed: list[ChunkScorer]  # scorers of the samples of I_pos
    n_failed: int  # |I_neg| over all ranks
    n_passed: int  # |I_pos| over all ranks
    collective: Collective
    device: torch.device
    least: float  # smallest weight of a sample of I_neg

    @torch.no_grad()
    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        """Scores candidates `P x K` on the samples of all ranks.

        On a CPU, `most_broken`, `P`, limits the total sample weight of I_pos that a candidate may
        break. The losses of a candidate that breaks more are NaN, and its counts are meaningless.
        """
        values = values.to(self.device)
        shape = (2, N_SUMS, len(values))
        sums = torch.zeros(shape, dtype=widest(self.device), device=self.device)
        hopeful = torch.arange(len(values), device=self.device)
        for scorer in (*self.passed, *self.failed):
            if not len(hopeful):
                break
            table = sums[int(scorer.of_passed)]
            table[:, hopeful] += scorer.sums(values[hopeful])
            # Giving up asks the device, and a GPU would have to be waited for.
            if scorer.of_passed and most_broken is not None and self.device.type == "cpu":
                hopeful = hopeful[table[WEIGHT, hopeful] <= most_broken[hopeful]]
        is_hopeless = torch.ones_like(values[:, 0], dtype=torch.bool).index_fill(0, hopeful, 0)
        sums[:, LOSS:] = sums[:, LOSS:].masked_fill(is_hopeless, torch.nan)
        return scores_of_sums(
            self.collective.sum(sums), self.n_failed, self.n_passed, self.least, values.dtype
        )


def scores_of_sums(
    sums: Tensor, n_failed: int, n_passed: int, least: float, dtype: torch.dtype
) -> Scores:
    """Returns the scores of candidates in `dtype`, from sums over I_neg and I_pos, `2 x 4 x P`."""
    failed, passed = sums
    loss_dtype = torch.promote_types(dtype, torch.float32)
    return Scores(
        failed[PASSED].float(),
        passed[PASSED].float(),
        (failed[LOSS] / max(1, n_failed)).to(loss_dtype),
        (passed[LOSS] / max(1, n_passed)).to(loss_dtype),
        n_failed,
        n_passed,
        failed[WEIGHT],
        passed[WEIGHT],
        least,
        failed[CREDIT],
        passed[CREDIT],
    )


def make_scorer(
    cache: ActivationCache,
    where: Tensor,
    failed: Tensor,
    passed: Tensor,
    evaluator: Evaluator,
    *,
    fitness: FitnessFunction | None = None,
    budget: int | None = None,
    fragility: Tensor | None = None,
    reserve: Tensor | None = None,
    weight: Tensor | None = None,
) -> SwarmScorer:
    """Builds a scorer of candidates.

    Entry i of a tensor of length N belongs to row i of the model's results.

    Args:
        cache: the recorded data.
        where: `K` int64, flat positions of the localised weights.
        failed: `N` bool, mask of I_neg.
        passed: `N` bool, mask of I_pos.
        evaluator: the model's task and ranks.
        fitness: the fitness that reads the scores; None: `Fitness()`. Unless it uses losses on
            I_pos, `Scores.loss_passed` is 0.
        budget: bytes for scoring, besides those of `cache`; None: a quarter of the free memory.
        fragility: `N`, such as original losses; the most fragile samples are scored first. None: no
            order.
        reserve: `N`, minimum margin to pass, for tasks with margins; None: no minimum.
        weight: `N` float64, finite sample weights, mean 1 over I_neg; None: equal weights.
    """
    device, collective = cache.space.device, evaluator.collective
    budget = free_memory(device) // 4 if budget is None else budget
    where, failed, passed = where.cpu(), failed.cpu(), passed.cpu()
    counts = torch.stack([failed[cache.rows].sum(), passed[cache.rows].sum()])
    n_failed, n_passed = collective.sum(counts).tolist()
    # A quarter of the budget is for what the scorers keep, half of it for each of I_neg and I_pos.
    room = budget // 4 // 2
    data = ScoringData(
        cache,
        make_layer_deltas(cache.space, where),
        where,
        evaluator.task,
        fitness or Fitness(),
        budget - budget // 4,
        reserve,
        weight,
    )
    first = torch.zeros_like(passed)
    if device.type == "cpu" and fragility is not None:
        first = _most_fragile(passed, fragility)
    scorers_of_passed = data.scorers_of(first, room // 4, of_passed=True)
    scorers_of_passed += data.scorers_of(passed & ~first, room - room // 4, of_passed=True)
    least = 1.0
    if weight is not None and bool(failed.any()):
        least = min(1.0, float(weight[failed].min()))
    scorers_of_failed = data.scorers_of(failed, room, of_passed=False)
    return SwarmScorer(
        scorers_of_failed, scorers_of_passed, n_failed, n_passed, collective, device, least
    )


def _most_fragile(passed: Tensor, fragility: Tensor) -> Tensor:
    rows = passed.nonzero().flatten()
    order = fragility.cpu()[rows].argsort(descending=True, stable=True)
    first = torch.zeros_like(passed)
    first[rows[order[:N_MOST_FRAGILE]]] = True
    return first
