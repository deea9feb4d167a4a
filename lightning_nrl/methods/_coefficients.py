"""Several changes of a model's weights put together: a search over how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._scoring import make_scorer
from lightning_nrl._utils.precision import widest
from lightning_nrl._utils.state import State, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.deployed_precision import rounding_reserve
from lightning_nrl.methods._known_activations import half_budget, record_known
from lightning_nrl.methods._scored_samples import choose_samples
from lightning_nrl.problem import Problem
from lightning_nrl.search import Searcher, SearchHistory, SearchResult, WeightStats, search
from lightning_nrl.search.family_fitness import needs_credit
from lightning_nrl.search.fitness import FitnessFunction, needs_passed_loss
from lightning_nrl.search.scores import Scorer, Scores

__all__ = ["WholeModelScorer", "merged", "search_coefficients"]


def search_coefficients(
    problem: Problem, states: Sequence[State], searcher: Searcher[Any], fitness: FitnessFunction, deadline: Deadline
) -> tuple[Tensor, SearchResult]:
    """How much of each of K changes is best, `K` in [0, 1], and the course of the search.

    None of any of them, each alone, and an equal part of all are among the first candidates.
    """
    device, k = problem.space.device, len(states)
    original = torch.zeros(k, dtype=torch.float32, device=device)
    first = torch.cat([torch.eye(k, device=device), torch.ones(2, k, device=device)])
    first[-1] /= k
    scorer, n_passed = _scorer(problem, states, fitness)

    def tell(done: int, history: SearchHistory) -> None:
        problem.clock.tell(done, searcher.iterations, int(history.patched[-1]), n_passed - int(history.intact[-1]))

    result = search(
        scorer,
        original,
        WeightStats(0.5, 0.3, 0.0, 1.0),
        fitness=fitness,
        searcher=searcher,
        seed=problem.seed,
        elites=first[: searcher.n_candidates - 1],
        deadline=deadline,
        on_progress=tell,
    )
    return problem.collective.agreed(result.values.clamp(0, 1)), result


@torch.no_grad()
def merged(problem: Problem, states: Sequence[State], coefficients: Tensor) -> dict[str, Tensor]:
    """The original weights plus so much of what each state changes; those that none changes are left out."""
    own = current_state(problem.model)
    new: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        value = own[name]
        if not value.is_floating_point():
            continue
        base = value.to(widest(value.device))
        found = base.clone()
        for factor, state in zip(coefficients.tolist(), states, strict=True):
            if name in state:
                found += factor * (state[name].to(base) - base)
        if name.rpartition(".")[2] == "running_var":
            found.clamp_(min=0)
        new[name] = found.to(value.dtype)
    return new


def _scorer(problem: Problem, states: Sequence[State], fitness: FitnessFunction) -> tuple[Scorer, int]:
    """Scores coefficients, and says on how many passed samples.

    On recorded activations if all changes are in the searched layers, else by whole passes.
    """
    space, before = problem.space, problem.before
    parameters = space.parameters
    if any(name not in parameters for state in states for name in state):
        return WholeModelScorer(problem, states), int(before.passed.sum())
    own = space.flat().to(widest(space.device))
    flats = [torch.cat([{**parameters, **state}[name].detach().flatten() for name in parameters]) for state in states]
    change = torch.stack([flat.to(own) - own for flat in flats])
    where = (change != 0).any(0).nonzero().flatten()
    recorded = choose_samples(before, before.targeted, before.passed, problem.n_scored, problem.seed).recorded
    recording = record_known(problem, recorded)
    scorer = make_scorer(
        recording,
        where,
        before.targeted & recorded,
        before.passed & recorded,
        problem.evaluator,
        budget=half_budget(problem),
        passed_loss=needs_passed_loss(fitness),
        fragility=before.loss,
        reserve=rounding_reserve(problem.evaluator.precision, before),
        weight=before.finite_weight if before.weighted else None,
        credit=needs_credit(fitness),
    )
    return _OnRecording(scorer, own[where], change[:, where], space.dtype), int((before.passed & recorded).sum())


@dataclass(frozen=True)
class _OnRecording:
    """Candidates are coefficients, of which a scorer of weights gets the weights."""

    scorer: Scorer
    original: Tensor  # W float64, the weights that some change moves
    change: Tensor  # K x W, what each adds to them
    dtype: torch.dtype  # of the weights as deployed

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates, `S x P x K`."""
        factors = values.clamp(0, 1).to(self.change)
        return self.scorer((self.original + factors @ self.change).to(self.dtype))


@dataclass(frozen=True)
class WholeModelScorer:
    """Candidates are coefficients; each takes a pass of the whole model over all known data.

    Exact whatever the changes move, and slow: for the few candidates of a search over few coefficients. As on
    recorded activations, what rounding could flip in the deployed precision does not pass.
    """

    problem: Problem
    states: Sequence[State]

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates, `S x P x K`."""
        rows = [self._row(one) for one in values.clamp(0, 1).flatten(0, 1)]
        table = torch.tensor(rows, dtype=widest(values.device), device=values.device)
        columns = table.view(*values.shape[:2], -1).movedim(-1, 0)
        before = self.problem.before
        n_failed, n_passed = int(before.targeted.sum()), int(before.passed.sum())
        patched, intact, loss_failed, loss_passed, gain, harm, credit_failed, credit_passed = columns
        least = float(before.weight[before.targeted].min()) if before.weighted else 1.0
        return Scores(
            patched.float(),
            intact.float(),
            (loss_failed / max(1, n_failed)).float(),
            (loss_passed / max(1, n_passed)).float(),
            n_failed,
            n_passed,
            gain if before.weighted else None,
            harm if before.weighted else None,
            min(1.0, least),
            credit_failed,
            credit_passed,
        )

    def _row(self, coefficients: Tensor) -> tuple[float, ...]:
        before = self.problem.before
        after = self.problem.evaluate(merged(self.problem, self.states, coefficients))
        failed, passed, weight = before.targeted, before.passed, before.finite_weight
        reserve = rounding_reserve(self.problem.evaluator.precision, before)
        passes = after.passed if reserve is None else after.passed & (after.margin >= reserve)
        loss, credit = after.loss.double() * weight, torch.where(passes, 1.0, 1 / (after.loss.double() + 1))
        return (
            float((failed & passes).sum()),
            float((passed & passes).sum()),
            float(loss[failed].sum()),
            float(loss[passed].sum()),
            float(weight[failed & passes].sum()),
            float(weight[passed & ~passes].sum()),
            float(credit[failed].sum()),
            float(credit[passed].sum()),
        )
