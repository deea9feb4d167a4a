"""Ranks that share the data find what one finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from ranks import on_ranks
from torch import Tensor
from toy_repairs import known, trained, unseen

from lightning_nrl import TensorSource
from lightning_nrl.analysis import baselines
from lightning_nrl.analysis.comparison import Comparison, compare_module
from lightning_nrl.analysis.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator


@dataclass(frozen=True, eq=False)
class Share(TensorSource):
    """Every second sample, beginning with that of the rank."""

    rank: int = 0

    @property
    def positions(self) -> Tensor:
        return self.index[self.rank :: 2]

    def __iter__(self) -> Iterator[Batch]:
        return self.draw(self.positions.split(self.batch_size))


def shared(sources: list[TensorSource], collective: Any) -> list[Any]:
    return sources if collective is None else [Share(**vars(source), rank=collective.rank) for source in sources]


def evaluator(collective: Any) -> Evaluator:
    return Evaluator(trained()) if collective is None else Evaluator(trained(), collective=collective)


def test_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "STEPS", 100)

    def run(collective: Any) -> Comparison:
        data = shared([*known(), *unseen()], collective)
        methods = ("fine-tuning", "distillation")
        found = compare_module(evaluator(collective), data[:2], unseen=data[2:], methods=methods)
        return replace(found, entries=tuple(replace(entry, seconds=0.0, scaling=0.0) for entry in found.entries))

    first, second = on_ranks(2, run)
    assert first == second == run(None)
    assert first["fine-tuning"].given.targeted > 0


def test_a_diagnosis() -> None:
    def run(collective: Any) -> Diagnosis:
        return diagnose_module(evaluator(collective), shared(known(), collective))

    (first, second), one = on_ranks(2, run), run(None)
    assert replace(first, seconds={}).to_json() == replace(second, seconds={}).to_json()
    for a, b in zip(first.targets, one.targets, strict=True):
        assert (a.split, a.id, a.fixable) == (b.split, b.id, b.fixable)
        assert a.change == pytest.approx(b.change, rel=1e-3, nan_ok=True)
    assert [(b.split, b.id, b.targets) for b in first.binding] == [(b.split, b.id, b.targets) for b in one.binding]
    assert [layer.change for layer in first.layers] == pytest.approx([layer.change for layer in one.layers], rel=1e-3)
    assert first.doubts == one.doubts
