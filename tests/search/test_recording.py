"""Recordings and replaying: what is kept, or computed again, what is left alone, and what is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import GraphNet, graph_loader
from scoring_networks import (
    REPLAYED,
    WHOLE,
    Case,
    Net,
    Problem,
    attention,
    floats,
    linears,
    make_problem,
)
from torch import Tensor, nn
from toy_repairs import known, quick, trained

from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import InseparableBatchError, ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import LayerRef, find_layers
from lightning_nrl.pipeline import repair_module
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.recording import record


def unedited(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
    return y


def replayed(recording: ActivationCache, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows and logits, in the order of the rows."""
    parts = [(chunk.rows, recording.replay(chunk, unedited)) for chunk in recording.chunks(size)]
    rows, logits = torch.cat([r for r, _ in parts]), torch.cat([x for _, x in parts])
    return rows[rows.argsort()], logits[rows.argsort()]


def test_only_wanted_samples_are_kept():
    problem = make_problem(REPLAYED["residual, second"])
    keep = torch.arange(12) % 3 != 1
    rows, logits = replayed(problem.recording(5, 6, 1, keep=keep), size=3)
    assert rows.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    with torch.no_grad():
        torch.testing.assert_close(logits, problem.model(problem.data[0][rows]))


@pytest.mark.parametrize("name", ["residual, second", "branch run second", "before attention"])
def test_nothing_before_the_layer_is_run_again(name):
    problem = make_problem(REPLAYED[name])
    recording = problem.recording(12)
    plan = recording.groups[0].plan
    called = []
    for call in set(plan.calls):
        module = problem.model.get_submodule(call)
        for child in module.modules():
            child.register_forward_pre_hook(lambda m, a, call=call: called.append(call))
    replayed(recording)
    assert called == []


def test_the_model_is_left_as_it_was():
    problem = make_problem(REPLAYED["residual, both"])
    before = {name: dict(module.__dict__) for name, module in problem.model.named_modules()}
    state = torch.random.get_rng_state()
    replayed(problem.recording(5, 7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: module.__dict__ for name, module in problem.model.named_modules()} == before


def test_hooks_of_the_user_are_applied_once():
    problem = make_problem(REPLAYED["middle linear"])
    for module in problem.model:
        module.register_forward_hook(lambda m, a, y: y * 1.5)
        module.register_forward_pre_hook(lambda m, a: (a[0] + 0.25,))
    logits = replayed(problem.recording(12))[1]
    with torch.no_grad():
        torch.testing.assert_close(logits, problem.model(problem.data[0]))


def test_batches_of_other_shapes_get_a_group_of_their_own():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 5)
    ).eval()
    xs = [torch.randn(4, 2, 9), torch.randn(3, 2, 7), torch.randn(2, 2, 9)]
    rows = list(torch.arange(9).split([4, 3, 2]))
    batches = [
        (Batch((x,), torch.zeros(len(x), dtype=torch.int64), r), r)
        for x, r in zip(xs, rows, strict=True)
    ]
    recording = record(
        Evaluator(model), batches, find_layers(model, "0"), torch.ones(9, dtype=torch.bool)
    )
    assert [group.rows.tolist() for group in recording.groups] == [[0, 1, 2, 3, 7, 8], [4, 5, 6]]
    with torch.no_grad():
        torch.testing.assert_close(replayed(recording)[1], torch.cat([model(x) for x in xs]))


def test_a_layer_that_is_never_called_is_refused():
    problem = make_problem(Case(attention, floats(2, 6), "layer.out_proj"))
    with pytest.raises(ReplayError, match=r"never called .*\nHINT: name a layer that is called"):
        problem.recording(12)


@pytest.mark.filterwarnings("ignore::lightning_nrl.errors.PerformanceWarning")
@pytest.mark.parametrize("when", ["copies", "gradients"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("no such kernel"),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_no_reason_to_run_the_whole_model(when, error):
    def short(net: Any, x: Tensor) -> Tensor:
        """Fails where what follows the layer is run alone."""
        y = net.first(x).tanh()
        if torch.is_grad_enabled() if when == "gradients" else len(y) > 10:
            raise error
        return y

    problem = make_problem(Case(linears(short, first=(3, 4)), floats(3), "first"), n=8)
    if "kernel" in str(error):
        assert (problem.recording(8).fallback_reason is not None) is (when == "copies")
        return
    with pytest.raises(type(error)) as raised:
        problem.recording(8)
    assert raised.value is error


def graph_recording(layer: str, keep: Tensor) -> tuple[GraphNet, ActivationCache, Tensor]:
    """A recording of 40 graphs in batches of 16, and the logits of all."""
    torch.manual_seed(0)
    model, raws = GraphNet().eval(), list(graph_loader(40, seed=1))
    rows = torch.arange(40).split(16)
    batches = [(Batch((raw,), raw.y, at), at) for raw, at in zip(raws, rows, strict=True)]
    with torch.no_grad():
        logits = torch.cat([model(raw) for raw in raws])
    return model, record(Evaluator(model), batches, find_layers(model, layer), keep), logits


def test_of_batches_that_cannot_be_cut_the_last_layer_is_replayed_sample_by_sample():
    keep = torch.arange(40) % 3 == 0
    model, recording, logits = graph_recording("head", keep)
    rows, found = replayed(recording, size=5)
    assert rows.tolist() == keep.nonzero().flatten().tolist()
    assert recording.fallback_reason is None
    assert len(recording.groups) == 1
    torch.testing.assert_close(found, logits[keep])
    (chunk,) = recording.chunks()
    with torch.no_grad():
        model.head.weight[0, 3] = 5.0
        changed = torch.cat([model(raw) for raw in graph_loader(40, seed=1)])
        edited = recording.replay(
            chunk, lambda site, x, y: nn.functional.linear(x, *site.module.parameters())
        )
    torch.testing.assert_close(edited, changed[chunk.rows])


@pytest.mark.parametrize("layer", ["node", "graph"])
def test_other_layers_of_such_batches_are_refused(layer):
    with pytest.raises(
        InseparableBatchError, match=rf"`layer='{layer}'`: samples cannot be taken out"
    ):
        graph_recording(layer, torch.ones(40, dtype=torch.bool))


def test_a_module_that_returns_a_packed_sequence_stands_in_no_way_of_the_last_layer():
    def packing(net: Any, x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        return net.head(net.rnn(packed)[1][-1])

    def make() -> nn.Module:
        return Net(packing, rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2))

    def data(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 5, 3, generator=g), 1 + torch.arange(n) % 5

    problem = make_problem(Case(make, data, "head"), n=10)
    recording = problem.recording(10)
    assert recording.fallback_reason is None
    with torch.no_grad():
        torch.testing.assert_close(replayed(recording, 3)[1], problem.model(*problem.data))


def recomputed(problem: Problem, n: int, budget: int = 0) -> ActivationCache:
    """A recording in batches of four of which `budget` bytes are kept."""

    def draw(rows: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        args, kwargs = problem._inputs(rows)
        yield Batch(args, problem.target[rows], rows, kwargs), rows

    return problem.recording(*[4] * (n // 4), budget=budget, draw=draw)


@pytest.mark.filterwarnings("ignore::lightning_nrl.errors.PerformanceWarning")
@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize(
    "name", ["head", "residual, second", "attention, batch second", "folded", "not linear"]
)
def test_what_is_computed_again_counts_the_same(name, share):
    problem = make_problem(WHOLE[name][0] if name in WHOLE else REPLAYED[name], n=24)
    where, values = problem.candidates(9, 6)
    failed = torch.arange(24) % 3 == 0
    whole = problem.recording(24)
    full = sum(group.nbytes for group in whole.groups)
    cache = recomputed(problem, 24, int(share * full))
    expected, scores = (
        problem.scorer(where, failed, ~failed, recording=x)(values) for x in (whole, cache)
    )
    assert torch.equal(scores.patched, expected.patched)
    assert torch.equal(scores.intact, expected.intact)
    torch.testing.assert_close(scores.loss_failed, expected.loss_failed, rtol=2e-3, atol=2e-3)
    # Of what is computed again, the last chunk is held.
    assert sum(group.nbytes for group in cache.groups) <= (share + 1 / 3) * full
    assert f"{12 if share else 24} samples computed again" in cache.storage
    assert not whole.storage


def test_a_repair_gives_the_same_weights_and_says_what_was_computed_again():
    def repaired(budget: int) -> tuple[dict[str, Tensor], str]:
        outcome = repair_module(trained(), known(), quick(layer="0", memory_limit=budget))
        return dict(outcome.parameters or {}), outcome.report.steps[0].note

    (expected, silent), (weights, note) = repaired(1 << 20), repaired(2_000)
    assert torch.equal(weights["0.weight"], expected["0.weight"])
    assert "again" in note
    assert "again" not in silent
