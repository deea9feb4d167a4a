"""Recordings that do not fit in memory: they are computed again, and count the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scoring_networks import REPLAYED, WHOLE, Case, Problem, floats, make_problem
from torch import Tensor, nn

from lightning_nrl import SearchOptions, TensorSource
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights
from lightning_nrl.methods import LocalSearch
from lightning_nrl.pipeline import Settings, repair_module
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.search._scoring.activation_cache import ActivationCache, ReplayGroup
from lightning_nrl.search._scoring.sample_layout import SampleLayout
from lightning_nrl.search._scoring.scorer import make_scorer

CPU = torch.device("cpu")
CASES = {**REPLAYED, **{name: case for name, (case, _) in WHOLE.items()}}

pytestmark = pytest.mark.filterwarnings("ignore::lightning_nrl.errors.PerformanceWarning")


def recomputed(problem: Problem, n: int, budget: int = 0) -> ActivationCache:
    """A recording in batches of four of which `budget` bytes are kept."""

    def draw(rows: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        args, kwargs = problem._inputs(rows)
        yield Batch(args, problem.target[rows], rows, kwargs), rows

    return problem.recording(*[4] * (n // 4), budget=budget, draw=draw)


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("name", ["head", "residual, second", "attention, batch second", "folded", "not linear"])
def test_what_is_computed_again_counts_the_same(name: str, share: float) -> None:
    problem = make_problem(CASES[name], n=24)
    where, values = problem.candidates(9, 6)
    failed = torch.arange(24) % 3 == 0
    whole = problem.recording(24)
    full = sum(group.nbytes for group in whole.groups)
    cache = recomputed(problem, 24, int(share * full))
    expected, scores = (
        make_scorer(one, where, failed, ~failed, Evaluator(problem.model))(values[None]) for one in (whole, cache)
    )
    assert torch.equal(scores.patched, expected.patched)
    assert torch.equal(scores.intact, expected.intact)
    torch.testing.assert_close(scores.loss_failed, expected.loss_failed, rtol=2e-3, atol=2e-3)
    # Of what is computed again one batch of the six is held.
    assert sum(group.nbytes for group in cache.groups) <= (share + 1 / 6) * full
    assert f"{12 if share else 24} samples computed again" in cache.storage
    assert not whole.storage


def test_what_is_equal_is_kept_once() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.tanh(self.mix(x)) + x)

    # The stem's output, which the layer and the shortcut get, and the layer's.
    problem = make_problem(Case(Shortcut, floats(6), "mix"))
    assert sum(group.nbytes for group in problem.recording(12).groups) == 12 * 4 * (8 + 8)


@pytest.mark.parametrize("samples", [slice(2, 5), torch.tensor([0, 3, 5])])
@pytest.mark.parametrize("expected", [None, 0, 1, 3, 6, 7])
def test_a_group_gives_samples_back_in_their_layout(samples: slice | Tensor, expected: int | None) -> None:
    layouts = [SampleLayout(0), SampleLayout(1, 2)]
    whole = [torch.arange(18).view(6, 3), torch.arange(24).view(2, 12)]
    asked: list[list[int]] = []

    def again(rows: Tensor) -> list[Tensor]:
        asked.append(rows.tolist())
        return taken(rows)

    def taken(part: slice | Tensor) -> list[Tensor]:
        return [layout.take(x, part) for layout, x in zip(layouts, whole, strict=True)]

    group = ReplayGroup(None, layouts, CPU, recomputed=expected is None, expected=expected or 0)
    for part in (slice(0, 2), slice(2, 6)):
        group.add(taken(part), torch.arange(6)[part], torch.arange(6)[part], again)
    group.finish()
    for last in (0, 1):
        assert all(map(torch.equal, group.take(samples, CPU, last), taken(samples)[-last:]))
    # Samples that follow within a batch are made once for several requests.
    once = [[2, 3, 4, 5]] if isinstance(samples, slice) else [[0, 3, 5]] * 2
    assert asked == (once if expected is None else [])


def test_a_repair_gives_the_same_weights_and_says_what_was_computed_again() -> None:
    problem = make_problem(REPLAYED["middle linear"], n=60)
    (x,) = problem.data
    first, second = problem.model(x).detach().topk(2).indices.T
    margin = problem.model(x).detach().topk(2).values.diff(dim=1).flatten().abs()
    label = torch.where(margin <= margin.kthvalue(6).values, second, first)

    def repaired(budget: int) -> tuple[Tensor, str]:
        outcome = repair_module(
            problem.model,
            [TensorSource(x, label, split="train", passed=True, failed=True, batch_size=20)],
            Settings(
                layer="2",
                method=LocalSearch(ParticleSwarm(particles=20, iterations=10)),
                search=SearchOptions(localizer=AllWeights(), budget=budget),
            ),
        )
        new = outcome.parameters or {}
        return torch.cat([torch.zeros(0), *(value.flatten() for value in new.values())]), outcome.report.steps[0].note

    (expected, silent), (weights, note) = repaired(1 << 20), repaired(2_000)
    assert len(expected)
    assert torch.equal(weights, expected)
    assert "again" in note
    assert "again" not in silent
