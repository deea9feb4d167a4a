"""LSTM, GRU and RNN taken apart: the same outputs, impacts by hand, and candidates scored as the
whole model does.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, TensorSource, repair_module
from lightning_nrl._utils.state import temporary_weights
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.evaluation.recurrent import gates_of, unroll
from lightning_nrl.localization.impact import measure
from lightning_nrl.published import DifferentialEvolution, bundle
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
    "how",
    [
        {},
        {"bias": False},
        {"batch_first": True, "bidirectional": True, "num_layers": 2, "dropout": 0.5},
    ],
)
def test_it_gives_what_the_layer_gives(kind: Any, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4, **how).eval(), torch.randn(5, 6, 3)
    states = 2 if how.get("num_layers") is None else 4
    n = 5 if how.get("batch_first") else 6
    h = torch.randn(states // 2 if states == 2 else states, n, 4)
    start = (h, h + 1) if kind is nn.LSTM else h
    for given in ((x,), (x, start), (x[0],)):
        expected = torch.utils._pytree.tree_leaves(layer(*given))
        with unroll([gates_of("layer", layer)]):
            found = torch.utils._pytree.tree_leaves(layer(*given))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert "forward" not in vars(layer)


def test_impacts_of_two_steps_by_hand() -> None:
    model = Last(nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True), classes=2).eval()
    model.load_state_dict(
        {
            "rnn.weight_ih_l0": torch.tensor([[2.0]]),
            "rnn.weight_hh_l0": torch.tensor([[0.5]]),
            "head.weight": torch.tensor([[0.0], [1.0]]),
            "head.bias": torch.zeros(2),
        }
    )
    # Inputs 1 and 3: h1 = 2, h2 = 6 + 1 = 7, logits (0, 7), of class 0: the loss's gradient in h2
    # is sigmoid(7).
    source = TensorSource(torch.tensor([[[1.0], [3.0]]]), torch.tensor([0]), "one", failed=True)
    space, evaluator = find_layers(model, "rnn"), Evaluator(model)
    cache = record(
        evaluator,
        [(batch, batch.position) for batch in source],
        space,
        torch.ones(1, dtype=torch.bool),
    )
    impact = measure(cache, evaluator, torch.ones(1, dtype=torch.bool))
    g = float(torch.sigmoid(torch.tensor(7.0)))
    assert impact.backward.tolist() == pytest.approx(
        [g * (3 + 0.5 * 1), g * (2 + 0.5 * 0)], rel=1e-5
    )
    assert impact.forward.tolist() == pytest.approx(
        [(2 + 6) / 2, (0 + 1) / 2]
    )  # |o w| over both steps
    assert list(space.parameters) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


@pytest.mark.parametrize("layer", ["rnn", ["rnn", "head"], "first"])
def test_candidates_score_as_in_the_whole_model(layer: Any) -> None:
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
        with temporary_weights(model, space.changed(where, values[p])), torch.no_grad():
            right = model(x).argmax(1) == y
        assert int((right & ~results.passed).sum()) == int(scores.patched[p])
        assert int((right & results.passed).sum()) == int(scores.intact[p])


def test_what_cannot_be_taken_apart_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is an LSTM with projections"):
        find_layers(Last(nn.LSTM(3, 4, proj_size=2)), "rnn")
    layer = nn.GRU(3, 4)
    with (
        unroll([gates_of("rnn", layer)]),
        pytest.raises(ConfigurationError, match="packed sequences"),
    ):
        layer(pack_sequence([torch.randn(2, 3)]))
    with pytest.raises(ConfigurationError, match="names a layer twice"):
        find_layers(Last(nn.GRU(3, 4)), ["rnn", "rnn"])


@pytest.fixture(scope="module")
def rows_of_digits() -> tuple[Last, list[TensorSource]]:
    """An LSTM that has read 300 digits row by row, and 300 that came in later."""
    digits = load_digits()
    x, y = (
        torch.tensor(digits.images[:600], dtype=torch.float32) / 16,
        torch.tensor(digits.target[:600]),
    )
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


@pytest.mark.parametrize("name", ["arachne", "arachne-de"])
def test_arachne_repairs_an_lstm_that_reads_digits_row_by_row(
    name: str, rows_of_digits: Any
) -> None:
    model, known = rows_of_digits
    small: Any = ParticleSwarm(particles=16, iterations=8)
    small = DifferentialEvolution(population=16, iterations=8) if name == "arachne-de" else small
    method = bundle(name, searcher=small, fitness="lexicographic")
    report = repair_module(model, known, Settings(method=method, layer="rnn")).report
    counts = report.pooled("known").counts
    assert report.layers == ("rnn",)
    assert counts.repaired > 0
    assert counts.broken == 0
    assert report.localization is not None
    assert report.localization.sizes["total"] == 4 * 8 * (8 + 8)
