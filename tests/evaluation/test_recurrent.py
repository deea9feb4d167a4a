"""LSTM, GRU and RNN taken apart: the same outputs, impacts by hand, and candidates scored as the
whole model does.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.evaluation.recurrent import gates_of, unroll
from lightning_nrl.published import bundle
from lightning_nrl.search.scoring.recording import record
from lightning_nrl.search.scoring.scorer import make_scorer


class Last(nn.Module):
    """The head of what a recurrent layer gives at the last step."""

    def __init__(self, rnn: Any, classes: int = 3) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"batch_first": True, "bidirectional": True, "num_layers": 2}],
)
def test_an_unrolled_layer_gives_the_same_outputs(kind, options):
    torch.manual_seed(0)
    layer, x = kind(3, 4, **options).eval(), torch.randn(5, 5, 3)
    h = torch.randn(layer.num_layers * (1 + layer.bidirectional), 5, 4)
    start = (h, h + 1) if kind is nn.LSTM else h
    for inputs in ((x,), (x, start)):
        expected = layer(*inputs)
        with unroll([gates_of("layer", layer)]):
            torch.testing.assert_close(layer(*inputs), expected, atol=1e-6, rtol=1e-5)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("layer", ["rnn", ["rnn", "head"], "first"])
def test_candidates_score_as_in_the_whole_model(layer):
    torch.manual_seed(0)
    model = Last(nn.GRU(3, 4, batch_first=True, num_layers=2)).eval()
    if layer == "first":  # recurrent layers behind a Linear, which is called first
        model.rnn, layer = nn.Sequential(nn.Linear(3, 3), model.rnn), ["rnn.0", "rnn.1"]
    x, y = torch.randn(24, 5, 3), torch.randint(0, 3, (24,))
    source, evaluator = TensorSource(x, y, "all", batch_size=16), Evaluator(model)
    space, results = find_layers(model, layer, include_bias=True), evaluator.run([source])
    batches = ((batch, results.rows("all", batch.position)) for batch in source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is run as a whole
        cache = record(evaluator, batches, space, torch.ones(24, dtype=torch.bool))
    where = torch.randperm(space.size)[:12].sort().values
    values = space.flat()[where] + torch.randn(5, 12)
    scores = make_scorer(cache, where, ~results.passed, results.passed, evaluator)(values)
    for p in range(5):
        edited = copy.deepcopy(model)
        edited.load_state_dict(space.changed(where, values[p]), strict=False)
        right = edited(x).argmax(1) == y
        assert int((right & ~results.passed).sum()) == int(scores.patched[p])
        assert int((right & results.passed).sum()) == int(scores.intact[p])


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(ConfigurationError, match="is an LSTM with projections"):
        find_layers(Last(nn.LSTM(3, 4, proj_size=2)), "rnn")
    layer = nn.GRU(3, 4)
    with (
        unroll([gates_of("rnn", layer)]),
        pytest.raises(ConfigurationError, match="packed sequences"),
    ):
        layer(pack_sequence([torch.randn(2, 3)]))
    with (
        unroll([gates_of("rnn", layer)]),
        pytest.raises(ConfigurationError, match="without a batch dimension"),
    ):
        layer(torch.randn(2, 3))
    with pytest.raises(ConfigurationError, match="names a layer twice"):
        find_layers(Last(nn.GRU(3, 4)), ["rnn", "rnn"])


def rows_of_digits() -> tuple[Last, list[TensorSource]]:
    """An LSTM that has read 300 digits row by row, and 300 that came in later."""
    digits = load_digits()
    x, y = torch.tensor(digits.images[:600]).float() / 16, torch.tensor(digits.target[:600])
    torch.manual_seed(0)
    model = Last(nn.LSTM(8, 8, batch_first=True), classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:300]), y[:300]).backward()
        optimizer.step()
    known = [
        TensorSource(x[:300], y[:300], "train", passed=True, batch_size=300),
        TensorSource(x[300:], y[300:], "new", passed=True, failed=True, batch_size=300),
    ]
    return model.eval(), known


def test_arachne_repairs_an_lstm_that_reads_digits_row_by_row():
    model, known = rows_of_digits()
    swarm = ParticleSwarm(particles=16, iterations=8)
    method = bundle("arachne", searcher=swarm, fitness="lexicographic")
    report = repair_module(model, known, Settings(method=method, layer="rnn")).report
    counts = report.pooled("known").counts
    assert report.layers == ("rnn",)
    assert counts.repaired > 0
    assert counts.broken == 0
    assert report.localization.sizes["total"] == 4 * 8 * (8 + 8)
