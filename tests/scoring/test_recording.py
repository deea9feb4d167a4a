"""ActivationCache and replaying: what is kept, what is left alone, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from graphs import GraphNet, graph_loader
from scoring_networks import REPLAYED, Problem, Residual, floats, make_problem
from torch import Tensor, nn

from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import InseparableBatchError, ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layer_gradients import margin_calls
from lightning_nrl.evaluation.layers import LayerRef, find_layers
from lightning_nrl.search._scoring.activation_cache import ActivationCache
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.sparse_delta import edit_layers, make_layer_deltas
from lightning_nrl.tasks import Multiclass


def unedited(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
    return y


def replayed(recording: ActivationCache, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows and logits, in the order of the rows."""
    parts = [(chunk.rows, recording.replay(chunk, unedited)) for chunk in recording.chunks(size)]
    rows, logits = torch.cat([r for r, _ in parts]), torch.cat([x for _, x in parts])
    return rows[rows.argsort()], logits[rows.argsort()]


def test_only_wanted_samples_are_kept() -> None:
    problem = make_problem(REPLAYED["residual, second"])
    keep = torch.arange(12) % 3 != 1
    rows, logits = replayed(problem.recording(5, 6, 1, keep=keep), size=3)
    assert rows.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    with torch.no_grad():
        torch.testing.assert_close(logits, problem.model(problem.data[0][rows]))


@pytest.mark.parametrize("name", REPLAYED)
def test_nothing_before_the_layer_is_run_again(name: str) -> None:
    problem = make_problem(REPLAYED[name])
    recording = problem.recording(12)
    plan = recording.groups[0].plan
    assert plan is not None
    called: list[str] = []
    for call in set(plan.calls):
        module = problem.model.get_submodule(call)
        for child in module.modules():
            child.register_forward_pre_hook(lambda m, a, call=call: called.append(call))
    replayed(recording)
    assert called == []


def test_the_model_is_left_as_it_was() -> None:
    problem = make_problem(REPLAYED["residual, both"])
    before = {name: dict(module.__dict__) for name, module in problem.model.named_modules()}
    state = torch.random.get_rng_state()
    replayed(problem.recording(5, 7))
    after = {name: dict(module.__dict__) for name, module in problem.model.named_modules()}
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, held in before.items():
        assert held.keys() == after[name].keys()
        assert all(held[key] is after[name][key] or held[key] == after[name][key] for key in held)


def test_an_error_in_the_model_leaves_it_as_it_was() -> None:
    problem = make_problem(REPLAYED["middle linear"])
    recording = problem.recording(12)

    def fails(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        raise KeyError("from the edit")

    with pytest.raises(KeyError, match="from the edit"):
        recording.replay(next(recording.chunks()), fails)
    assert all("forward" not in module.__dict__ for module in problem.model.modules())


def test_hooks_of_the_user_are_applied_once() -> None:
    problem = make_problem(REPLAYED["middle linear"])
    for module in problem.model:  # type: ignore[attr-defined]
        module.register_forward_hook(lambda m, a, y: y * 1.5)
        module.register_forward_pre_hook(lambda m, a: (a[0] + 0.25,))
    logits = replayed(problem.recording(12))[1]
    with torch.no_grad():
        torch.testing.assert_close(logits, problem.model(problem.data[0]))


def test_batches_of_other_shapes_get_a_group_of_their_own() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 5)).eval()
    xs = [torch.randn(4, 2, 9), torch.randn(3, 2, 7), torch.randn(2, 2, 9)]
    rows = list(torch.arange(9).split([4, 3, 2]))
    batches = [(Batch((x,), torch.zeros(len(x), dtype=torch.int64), r), r) for x, r in zip(xs, rows, strict=True)]
    recording = record(Evaluator(model), batches, find_layers(model, "0"), torch.ones(9, dtype=torch.bool))
    assert [group.rows[0].tolist() for group in recording.groups] == [[0, 1, 2, 3, 7, 8], [4, 5, 6]]
    with torch.no_grad():
        torch.testing.assert_close(replayed(recording)[1], torch.cat([model(x) for x in xs]))


def test_a_layer_that_is_never_called_is_refused() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Unused().eval()
    batch = Batch((torch.randn(3, 2, 4),), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    space = find_layers(model, "attention.out_proj")
    with pytest.raises(ReplayError, match=r"never called .*\nHINT: name a layer that is called"):
        record(Evaluator(model), [(batch, torch.arange(3))], space, torch.ones(3, dtype=torch.bool))


def test_a_module_shared_by_both_sides_of_the_layer_is_remembered_only_before_it() -> None:
    class Shared(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            x = self.act(self.norm1(self.conv1(x)) + x)
            return self.head(self.act(self.norm2(self.conv2(x))).mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared().eval()
    data = floats(2, 5, 5)(12, torch.Generator().manual_seed(0))
    problem = Problem(model, find_layers(model, "conv1"), data, torch.zeros(12, dtype=torch.int64))
    recording = problem.recording(12)
    assert recording.fallback_reason is None
    with torch.no_grad():
        torch.testing.assert_close(replayed(recording)[1], model(data[0]))


def test_a_rank_without_samples_has_an_empty_recording() -> None:
    problem = make_problem(REPLAYED["head"])
    recording = problem.recording(12, keep=torch.zeros(12, dtype=torch.bool))
    assert (list(recording.chunks()), recording.rows.tolist()) == ([], [])


class ShortOfMemory(nn.Module):
    """Runs out of memory where what follows the layer is run alone: for copies of samples, or with gradients."""

    def __init__(self, when: str, error: Exception) -> None:
        super().__init__()
        self.first, self.when, self.error = nn.Linear(3, 4), when, error

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        if torch.is_grad_enabled() if self.when == "gradients" else len(y) > 10:
            raise self.error
        return y


@pytest.mark.parametrize("when", ["copies", "gradients"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_memory_that_runs_out_is_no_reason_to_run_the_whole_model(when: str, error: Exception) -> None:
    model = ShortOfMemory(when, error).eval()
    problem = Problem(model, find_layers(model, "first"), (torch.rand(8, 3),), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(type(error)) as raised:
        problem.recording(8)
    assert raised.value is error


@pytest.mark.filterwarnings("ignore::lightning_nrl.errors.PerformanceWarning")
@pytest.mark.parametrize(("when", "fallback"), [("copies", True), ("gradients", False)])
def test_other_errors_are(when: str, fallback: bool) -> None:
    model = ShortOfMemory(when, RuntimeError("no such kernel")).eval()
    problem = Problem(model, find_layers(model, "first"), (torch.rand(8, 3),), torch.zeros(8, dtype=torch.int64))
    assert (problem.recording(8).fallback_reason is not None) is fallback


def graph_recording(layer: str, keep: Tensor) -> tuple[GraphNet, ActivationCache, Tensor]:
    """A recording of 40 graphs in batches of 16, and the logits of all."""
    torch.manual_seed(0)
    model, raws = GraphNet().eval(), list(graph_loader(40, seed=1))
    rows = torch.arange(40).split(16)
    batches = [(Batch((raw,), raw.y, at), at) for raw, at in zip(raws, rows, strict=True)]
    with torch.no_grad():
        logits = torch.cat([model(raw) for raw in raws])
    return model, record(Evaluator(model), batches, find_layers(model, layer), keep), logits


def test_of_batches_that_cannot_be_cut_the_last_layer_is_replayed_sample_by_sample() -> None:
    keep = torch.arange(40) % 3 == 0
    model, recording, logits = graph_recording("head", keep)
    rows, found = replayed(recording, size=5)
    assert rows.tolist() == keep.nonzero().flatten().tolist()
    assert recording.fallback_reason is None
    assert len(recording.groups) == 1
    torch.testing.assert_close(found, logits[keep])
    where, values = torch.tensor([3]), torch.tensor([[5.0]])
    (chunk,) = recording.chunks()
    edited = recording.replay(chunk, edit_layers(make_layer_deltas(recording.space, where), values))
    with torch.no_grad():
        model.head.weight[0, 3] = 5.0
        changed = torch.cat([model(raw) for raw in graph_loader(40, seed=1)])
    torch.testing.assert_close(edited, changed[chunk.rows])


@pytest.mark.parametrize("layer", ["node", "graph"])
def test_other_layers_of_such_batches_are_refused(layer: str) -> None:
    with pytest.raises(InseparableBatchError, match=rf"`layer='{layer}'`: samples cannot be taken out"):
        graph_recording(layer, torch.ones(40, dtype=torch.bool))


def test_gradients_of_samples_come_where_a_layer_has_one_row_for_each() -> None:
    torch.manual_seed(0)
    model, raw = GraphNet().eval(), next(iter(graph_loader(16, seed=1)))
    # 64 nodes are a multiple of 16 graphs by chance.
    raw.x, raw.batch = raw.x.repeat(64, 1)[:64], torch.cat([torch.arange(16), torch.zeros(48).long()]).sort().values
    layers = {"node": model.node, "graph": model.graph}
    _, calls = margin_calls(model, layers, Batch((raw,), raw.y, torch.arange(16)), Multiclass(), nullcontext)
    assert calls["node"] == []
    assert len(calls["graph"][0].input) == 16


class Lengths(nn.Module):
    """Sequences that are packed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][-1])


def test_a_module_that_returns_a_packed_sequence_stands_in_no_way_of_the_last_layer() -> None:
    torch.manual_seed(0)
    model, x, n = Lengths().eval(), torch.randn(10, 5, 3), 1 + torch.arange(10) % 5
    at = torch.arange(10)
    recording = record(Evaluator(model), [(Batch((x, n), at % 2, at), at)], find_layers(model, "head"), at >= 0)
    assert recording.fallback_reason is None
    with torch.no_grad():
        torch.testing.assert_close(replayed(recording, 3)[1], model(x, n))
