"""Recordings that do not fit in memory: where they are kept, that they count the same, and that no file is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scoring_networks import REPLAYED, WHOLE, Case, Problem, floats, make_problem
from torch import Tensor, nn

from lightning_nrl import SearchOptions, TensorSource
from lightning_nrl._scoring import ActivationCache, make_scorer
from lightning_nrl._scoring.recorded_tensors import InMemory, MappedFile, Recomputed, RecordedTensors, half_nbytes
from lightning_nrl._scoring.sample_layout import SampleLayout
from lightning_nrl._scoring.storage_choice import StorageChoice
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import AllWeights
from lightning_nrl.methods import LocalSearch
from lightning_nrl.pipeline import Settings, repair_module
from lightning_nrl.search import ParticleSwarm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = ["memory", "half", "mapped", "recomputed"]
CASES = {**REPLAYED, **{name: case for name, (case, _) in WHOLE.items()}}

pytestmark = pytest.mark.filterwarnings("ignore::lightning_nrl.errors.PerformanceWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def recorded(problem: Problem, kind: str, n: int = 12) -> ActivationCache:
    """A recording in batches of four that is kept in one way."""

    def draw(rows: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        args, kwargs = problem._inputs(rows)
        yield Batch(args, problem.target[rows], rows, kwargs), rows

    groups = problem.recording(n).groups
    half = sum(half_nbytes(x) for group in groups for x in group.take(slice(0, n), CPU))
    budget = {"memory": 1 << 20, "half": half, "mapped": 0, "recomputed": 0}[kind]
    disk = 0 if kind == "recomputed" else 1 << 30
    return problem.recording(*[4] * (n // 4), budget=budget, disk=disk, draw=draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["head", "residual, second", "attention, batch second", "folded", "not linear"])
def test_each_kind_counts_the_same(name: str, kind: str) -> None:
    problem = make_problem(CASES[name], n=24)
    where, values = problem.candidates(9, 6)
    failed = torch.arange(24) % 3 == 0
    whole, cache = problem.recording(24), recorded(problem, kind, 24)
    assert {group.kind for group in cache.groups} == {kind}
    expected, scores = (
        make_scorer(one, where, failed, ~failed, Evaluator(problem.model))(values[None]) for one in (whole, cache)
    )
    assert torch.equal(scores.patched, expected.patched)
    assert torch.equal(scores.intact, expected.intact)
    torch.testing.assert_close(scores.loss_failed, expected.loss_failed, rtol=2e-3, atol=2e-3)
    held, full = (sum(group.nbytes for group in one.groups) for one in (cache, whole))
    # Of what is computed again one batch of the six is held.
    assert held <= {"memory": full, "half": 0.7 * full, "mapped": 0, "recomputed": full / 6}[kind]


@pytest.mark.parametrize(("kind", "words"), [*zip(KINDS, ["", "half", "temporary file", "again"], strict=True)])
def test_words_say_where_samples_are(kind: str, words: str) -> None:
    storage = recorded(make_problem(REPLAYED["middle linear"]), kind).storage
    assert words in storage
    assert ("12 samples" in storage) == bool(words)


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


def test_files_have_no_name_and_are_closed_after_an_exception(folder: Path) -> None:
    problem = make_problem(REPLAYED["residual, second"])

    def fails() -> None:
        cache = recorded(problem, "mapped")
        assert len(open_files()) > before
        assert not list(folder.iterdir())
        next(cache.chunks(4))
        raise KeyError("from the work")

    def open_files() -> list[str]:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return [link for link in links if os.path.exists(link) or os.path.islink(link)]

    before = len(open_files())
    with contextlib.suppress(KeyError):
        fails()
    assert len(open_files()) == before
    assert not list(folder.iterdir())


def test_a_full_disk_is_a_replay_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ReplayError, match=r"No space left.*\nHINT: .*TMPDIR"):
        recorded(make_problem(REPLAYED["head"]), "mapped")


def kinds(choice: StorageChoice, *sizes: int, n: float = 4, alike: bool = True) -> list[str]:
    return [choice.next(size, size // 2, n, lambda: alike)[0] for size in sizes]


def test_what_fits_is_kept_as_it_is() -> None:
    assert kinds(StorageChoice({CPU: 40}, 100), 10, 10, 10, 10) == ["memory"] * 4


def test_what_fits_in_half_is_kept_in_half_but_where_other_samples_would_pass() -> None:
    assert kinds(StorageChoice({CPU: 20}, 100), 10, 10, 10, 10) == ["half"] * 4
    assert kinds(StorageChoice({CPU: 20}, 100), 10, 10, 10, 10, alike=False) == ["memory", "memory", "mapped", "mapped"]


def test_what_fits_in_neither_goes_to_the_disk_and_then_is_computed_again() -> None:
    choice = StorageChoice({CPU: 10}, 20, can_recompute=True)
    assert kinds(choice, 10, 10, 10, 10) == ["memory", "mapped", "mapped", "recomputed"]
    assert kinds(StorageChoice({CPU: 10}, 0), 10, 10) == ["memory", "memory"]


def test_main_memory_is_used_after_a_gpus() -> None:
    choice = StorageChoice({GPU: 20, CPU: 20}, 0)
    assert [choice.next(10, 5, 4, lambda: True)[1].type for _ in range(4)] == ["cuda", "cuda", "cpu", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("samples", [slice(2, 5), torch.tensor([0, 3, 5])])
def test_each_storage_gives_samples_back_in_their_layout_and_type(dtype: torch.dtype, samples: slice | Tensor) -> None:
    layouts = [SampleLayout(0), SampleLayout(1, 2)]
    # Small whole numbers, which no rounding changes.
    whole = [torch.arange(18).view(6, 3).to(dtype), torch.arange(24).view(2, 12).to(dtype)]
    again = InMemory(layouts, CPU)
    again.add(whole, torch.arange(6))

    def remade(rows: Tensor) -> list[Tensor]:
        return again.take(rows, CPU)

    storages: list[RecordedTensors] = [
        InMemory(layouts, CPU),
        InMemory(layouts, CPU, half=True),
        InMemory(layouts, CPU, expected=6),
        InMemory(layouts, CPU, expected=7),
        InMemory(layouts, CPU, expected=3),
        InMemory(layouts, CPU, expected=1),
        MappedFile(layouts),
        Recomputed(remade, layouts),
    ]
    for storage in storages:
        for part in (slice(0, 2), slice(2, 6)):
            storage.add([layout.take(x, part) for layout, x in zip(layouts, whole, strict=True)], torch.arange(6)[part])
        storage.finish()
        for first in (0, 1):
            expected = [layout.take(x, samples) for layout, x in zip(layouts, whole, strict=True)][first:]
            taken = storage.take(samples, CPU, first)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(taken, expected, strict=True))


def test_what_is_computed_again_serves_several_requests() -> None:
    asked: list[list[int]] = []

    def again(rows: Tensor) -> list[Tensor]:
        asked.append(rows.tolist())
        return [rows[:, None].float()]

    storage = Recomputed(again, [SampleLayout(0)])
    storage.add([], torch.arange(0, 4))
    storage.add([], torch.arange(4, 6))
    taken = [storage.take(samples, CPU)[0].flatten().tolist() for samples in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert taken == [[0, 1], [2, 3], [4, 5]]
    assert asked == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("budget", "disk", "words"), [(1 << 20, 1 << 30, ""), (2_000, 1 << 30, "file"), (2_000, 0, "again")]
)
def test_a_repair_gives_the_same_weights_and_says_where_activations_were(
    budget: int, disk: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(disk, 0, disk))  # type: ignore[attr-defined]
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

    expected, _ = repaired(1 << 20)
    weights, note = repaired(budget)
    assert len(expected)
    assert torch.equal(weights, expected)
    assert words in note
