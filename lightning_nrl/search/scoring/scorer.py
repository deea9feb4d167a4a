"""`SwarmScorer`: counts passed samples and sums losses for all candidates of all searches (swarms)
in one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.search.scores import Scores
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.chunk_scorer import (
    GPU_BLOCK_BYTES,
    ChunkScorer,
    make_chunk_scorers,
)
from lightning_nrl.search.scoring.last_layer_scorer import HeadStack, Sums, SwarmHead, stack_heads
from lightning_nrl.search.scoring.memory import default_budget
from lightning_nrl.search.scoring.sparse_delta import make_layer_deltas

N_MOST_FRAGILE = (
    128  # number of samples of I_pos that are scored first, because they break most easily
)


@dataclass(frozen=True)
class SwarmGroup:
    """Swarms that search the same weights on the same samples, and that are scored one after
    another.
    """

    swarms: tuple[int, ...]  # numbers of the swarms, from 0 to S - 1
    columns: Tensor | slice  # positions of the searched weights among the K values of a candidate
    failed: list[ChunkScorer]  # scorers of the samples of I_neg
    passed: list[ChunkScorer]  # scorers of the samples of I_pos


@dataclass(frozen=True)
class SwarmScorer:
    """Scores the candidates of S swarms on recorded data. `make_scorer` builds it."""

    cache: ActivationCache  # the known data of this rank
    groups: tuple[SwarmGroup, ...]  # swarms that are not in `stacks`
    n_failed: int | Tensor  # |I_neg| over all ranks, a number or S x 1
    n_passed: int | Tensor  # |I_pos| over all ranks, a number or S x 1
    collective: Collective
    passed_loss: bool  # True if losses on I_pos are needed
    gives_up: bool = (
        False  # True if scoring stops early for candidates that break more than `most_broken`
    )
    weighted: bool = False  # True if samples have weights
    least: float = 1.0  # smallest weight of a sample of I_neg
    credit: bool = False  # True if credits (see `Scores`) are needed; requires `passed_loss`
    stacks: tuple[
        tuple[int, HeadStack], ...
    ] = ()  # pairs (0 for I_neg or 1 for I_pos, swarms scored together)

    @torch.no_grad()
    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        """Scores candidates `S x P x K` (swarms x candidates x weights) on the samples of all
        ranks.

        With `gives_up`, `most_broken`, `S x P`, limits the total sample weight of I_pos that a
        candidate may break. The losses of a candidate that breaks more are NaN, and its counts are
        meaningless.
        """
        device = self.cache.space.device
        values = values.to(device)
        rows = 4 + 2 * self.weighted + 2 * self.credit
        sums = torch.zeros(rows, *values.shape[:2], device=device, dtype=widest(device))
        for role, stack in self.stacks:
            several = isinstance(self.n_failed, Tensor)
            own = values[stack.swarms] if several else values.flatten(0, 1).unsqueeze(0)
            found = stack.sums(
                own, with_loss=role == 0 or self.passed_loss, with_credit=self.credit
            )
            _add_sums(
                sums if several else sums.view(rows, 1, -1),
                role,
                stack.swarms,
                found,
                stack.total_weight,
            )
        for group in self.groups:
            for swarm in group.swarms if isinstance(self.n_failed, Tensor) else range(len(values)):
                own = values[swarm][:, group.columns]
                limit = most_broken[swarm] if most_broken is not None and self.gives_up else None
                if limit is not None and bool((limit < 0).all()):
                    sums[2:, swarm] = torch.nan
                    continue
                self._add(group, own, limit, sums[:, swarm])
        patched, intact, loss_failed, loss_passed, *more = self.collective.sum(sums)
        weights, credit = more[: 2 * self.weighted], more[2 * self.weighted :]
        least = values.dtype if values.dtype == torch.float64 else torch.float32
        return Scores(
            patched.float(),
            intact.float(),
            (loss_failed / _at_least_one(self.n_failed)).to(least),
            (loss_passed / _at_least_one(self.n_passed)).to(least),
            self.n_failed,
            self.n_passed,
            weights[0] if weights else None,
            weights[1] if weights else None,
            self.least,
            *credit,
        )

    def _add(self, group: SwarmGroup, values: Tensor, limit: Tensor | None, sums: Tensor) -> None:
        alive = None if limit is None else torch.arange(len(values), device=values.device)
        n_scored = 0
        for role, scorer in [
            *((1, scorer) for scorer in group.passed),
            *((0, scorer) for scorer in group.failed),
        ]:
            chosen = values if alive is None else values[alive]
            with_loss = role == 0 or self.passed_loss
            for part, found in scorer.sums(chosen, with_loss=with_loss, with_credit=self.credit):
                _add_sums(
                    sums, role, part if alive is None else alive[part], found, scorer.total_weight
                )
            if role == 1 and alive is not None and limit is not None:
                n_scored += len(scorer.chunk)
                broken = sums[5, alive] if self.weighted else n_scored - sums[1, alive]
                alive = alive[broken <= limit[alive]]
        if alive is not None:
            given_up = torch.ones(len(values), dtype=torch.bool, device=values.device)
            given_up[alive] = False
            sums[2:, given_up] = torch.nan


def make_scorer(
    cache: ActivationCache,
    where: Tensor,  # flat positions of the localised weights: K int64, or S x K with padding -1 if swarms differ
    failed: Tensor,  # mask of I_neg: N bool, or S x N if swarms differ
    passed: Tensor,  # mask of I_pos: N bool, or S x N if swarms differ
    evaluator: Evaluator,
    *,
    budget: int
    | None = None,  # bytes for scoring, besides those of `cache`; None: a quarter of the free memory
    passed_loss: bool = True,  # True if losses on I_pos are needed
    fragility: Tensor
    | None = None,  # N, such as original losses; the most fragile are scored first; None: no order
    reserve: Tensor
    | None = None,  # N, minimum margin to pass, for tasks with margins; None: no minimum
    weight: Tensor
    | None = None,  # N float64, finite sample weights, mean 1 over I_neg; None: equal weights
    credit: bool = False,  # True if the credits of `Scores` are needed; requires `passed_loss`
) -> SwarmScorer:
    """Builds a scorer of candidates. Entry i of a tensor of length N belongs to row i of the
    model's
    results.

    Without `passed_loss`, `Scores.loss_passed` is 0, and samples of I_pos that no candidate breaks
    may be skipped. Raises a `ConfigurationError` if `where`, `failed` and `passed` have rows for
    different numbers of swarms.
    """
    task, collective = evaluator.task, evaluator.collective
    device = cache.space.device
    gives_up = not is_stacked_on(device)
    budget = default_budget(device) if budget is None else budget
    where, failed, passed = where.cpu(), failed.cpu(), passed.cpu()
    counted = {len(x) for x, ndim in ((where, 2), (failed, 2), (passed, 2)) if x.ndim == ndim}
    if len(counted) > 1:
        problem = f"`where`, `failed` and `passed` have rows for {sorted(counted)} swarms."
        raise ConfigurationError(
            problem, "give one row per swarm, or a tensor without this dimension for all swarms."
        )
    s = counted.pop() if counted else 1
    several = any(x.ndim == 2 for x in (where, failed, passed))
    tables = [x.expand(s, -1) if x.ndim == 1 else x for x in (where, failed, passed)]
    counts = torch.stack([mask[:, cache.rows].sum(1) for mask in tables[1:]])
    n_failed, n_passed = collective.sum(counts)
    equal = _equal_swarms(tables)
    room = budget // 4 // (2 * len(equal))
    groups = []
    for swarms in equal:
        own_where, own_failed, own_passed = (table[swarms[0]] for table in tables)
        is_own = own_where >= 0
        own_where = own_where[is_own]
        make = partial(
            make_chunk_scorers,
            cache,
            make_layer_deltas(cache.space, own_where),
            own_where,
            task=task,
            budget=budget - budget // 4,
            reserve=reserve,
            weight=weight,
        )
        first = _most_fragile(own_passed, fragility if gives_up else None)
        of_passed = make(first, room=room // 4) + make(own_passed & ~first, room=room - room // 4)
        columns = slice(None) if bool(is_own.all()) else is_own.nonzero().flatten().to(device)
        groups.append(SwarmGroup(swarms, columns, make(own_failed, room=room), of_passed))
    aimed = failed.view(-1, failed.shape[-1]).any(0)
    scorer = SwarmScorer(
        cache,
        tuple(groups),
        n_failed.view(s, 1).to(device) if several else int(n_failed),
        n_passed.view(s, 1).to(device) if several else int(n_passed),
        collective,
        passed_loss,
        gives_up=gives_up,
        weighted=weight is not None,
        least=1.0
        if weight is None or not bool(aimed.any())
        else min(1.0, float(weight[aimed].min())),
        credit=credit,
    )
    if gives_up:
        return scorer
    return stacked(
        scorer, where.shape[-1], max(1, min(GPU_BLOCK_BYTES, budget // 6)), room=budget // 4
    )


def is_stacked_on(device: torch.device) -> bool:
    """True if swarms are stacked and scored together (on a GPU), instead of one by one with early
    stops (on a CPU).
    """
    return device.type != "cpu"


def stacked(
    scorer: SwarmScorer, n_columns: int, block_bytes: int, room: float = math.inf
) -> SwarmScorer:
    """Returns a copy of a scorer in which swarms that search a last layer are scored together.

    A swarm is still scored alone if its samples of I_neg or I_pos are in several chunks, or if its
    padded inputs need more than its share of `room` bytes, which all swarms share equally.
    `stack_heads` explains the other arguments.
    """
    groups, roles = [], (list[SwarmHead](), list[SwarmHead]())
    each = room / max(1, sum(len(group.swarms) for group in scorer.groups))
    for group in scorer.groups:
        columns = None if isinstance(group.columns, slice) else group.columns
        parts = [
            (role, part)
            for role, scorers in ((0, group.failed), (1, group.passed))
            for part in scorers
        ]
        heads = [
            (role, SwarmHead(0, columns, part.head, part.weight))
            for role, part in parts
            if part.head is not None
        ]
        # A stack needs one chunk of samples per role, and the padded inputs must fit.
        fits = max(len(group.failed), len(group.passed)) <= 1 and all(
            one.padded_nbytes <= each for _, one in heads
        )
        if not fits or len(heads) < len(parts):
            groups.append(group)
            continue
        for role, one in heads:
            roles[role].extend(one._replace(swarm=swarm) for swarm in group.swarms)
    stacks = [
        (role, one)
        for role, own in enumerate(roles)
        for one in stack_heads(own, n_columns, block_bytes)
    ]
    return replace(scorer, groups=tuple(groups), stacks=tuple(stacks), gives_up=False)


def _add_sums(
    sums: Tensor, role: int, which: Tensor | slice, found: Sums, total_weight: Tensor | float
) -> None:
    # Role 0 is I_neg and 1 is I_pos. Weights are summed over repaired I_neg samples, or over broken
    # I_pos samples.
    weighed = total_weight - found.weight if role and found.weight is not None else found.weight
    for row, column in (
        (role, found.passed),
        (2 + role, found.loss),
        (role - 2, found.credit),
        (4 + role, weighed),
    ):
        if column is not None:
            sums[row, which] += column


def _most_fragile(passed: Tensor, fragility: Tensor | None) -> Tensor:
    first = torch.zeros_like(passed)
    if fragility is not None:
        rows = passed.nonzero().flatten()
        order = fragility.cpu()[rows].argsort(descending=True, stable=True)
        first[rows[order[:N_MOST_FRAGILE]]] = True
    return first


def _equal_swarms(tables: list[Tensor]) -> list[tuple[int, ...]]:
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for swarm in range(len(tables[0])):
        groups.setdefault(tuple(t[swarm].numpy().tobytes() for t in tables), []).append(swarm)
    return [tuple(swarms) for swarms in groups.values()]


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
