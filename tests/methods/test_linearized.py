"""Repairs by linearized margins: worked out by hand, exact whatever they meet, and the same on two ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from toy_problems import broken, left_alone, make_problem, right, same, together
from toy_repairs import blobs, known, quick, trained

from lightning_nrl import TensorSource, repair_module
from lightning_nrl._utils.state import snapshot
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layer_gradients import windows
from lightning_nrl.methods import METHODS, Linearized, Problem
from lightning_nrl.methods._solvers.whitening import fit_whitening, margin_gradients
from lightning_nrl.tasks import Multiclass


def make(model: nn.Module, sources: Sequence[Any], layer: str | list[str] = "0", **rest: Any) -> Problem:
    return make_problem(model, sources, layer, **rest)


def plane() -> nn.Sequential:
    """Logits 0 and x, for points (x, y): class 1 right of the y axis."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data, model[1].weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    return model


def source(points: Sequence[Sequence[float]], labels: Sequence[int], split: str, **marks: Any) -> TensorSource:
    return TensorSource(torch.tensor(points), torch.tensor(labels), split, **marks)


def on_the_axis() -> list[TensorSource]:
    """Passed points have margin 1; the target lies on the border, in a direction in which no passed point lies."""
    return [
        source([[1.0, 0.0], [-1.0, 0.0]], [1, 0], "train", passed=True),
        source([[0.0, 1.0]], [1], "new", failed=True),
    ]


def test_a_repair_in_the_first_of_two_layers_worked_out_by_hand() -> None:
    solution = Linearized()(make(plane(), on_the_axis()))
    assert solution.proposal is not None
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    # A fifth of the median margin 1, all of it where it moves no passed point.
    assert solution.proposal.state.keys() == {"0.weight"}
    torch.testing.assert_close(solution.proposal.state["0.weight"], torch.tensor([[1.0, 0.2]]))
    (step,) = solution.steps
    assert (step.name, step.repaired, step.broken, step.note) == ("linearized", 1, 0, "3 gradients, the whole step")


def test_a_target_that_a_passed_sample_contradicts_stays_and_nothing_breaks() -> None:
    twins = [
        source([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [1, 0, 0], "train", passed=True),
        source([[0.0, 1.0]], [1], "new", failed=True),
    ]
    problem = make(plane(), twins)
    solution = Linearized()(problem)
    assert solution.proposal is None
    assert solution.reason == "no step along the gradients repairs a target without a regression."
    assert all(step.broken == step.repaired for step in solution.steps)


def test_a_passed_sample_at_the_brink_gives_way_by_half_and_bars_nothing() -> None:
    train, new = on_the_axis()
    inputs = torch.cat([train.inputs, torch.tensor([[1e-3, -0.012]])])
    labels = torch.tensor([1, 0, 1])
    solution = Linearized()(make(plane(), [replace(train, inputs=inputs, targets=labels), new]))
    assert solution.proposal is not None
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    # At weights (1, 0.2) it would be wrong.
    torch.testing.assert_close(solution.proposal.after.margin[2], torch.tensor(5e-4), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_moves_only_if_it_is_included(bias: bool) -> None:
    problem = make(trained(), known(), bias=bias)
    solution = Linearized()(problem)
    assert solution.proposal is not None
    assert solution.proposal.repaired > 0
    assert ("0.bias" in solution.proposal.state) == bias
    if bias:
        assert not torch.equal(solution.proposal.state["0.bias"], problem.model[0].bias)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), layer=st.sampled_from(["0", "2", ("0", "2")]), shift=st.floats(0.5, 2.5))
def test_it_never_breaks_a_known_sample(seed: int, layer: Any, shift: float) -> None:
    sources = [
        TensorSource(*blobs(80, seed=seed), split="train", passed=True),
        TensorSource(*blobs(40, shift, seed + 1), split="new", failed=True),
    ]
    problem = make(trained(seed=seed % 7), sources, list(layer) if isinstance(layer, tuple) else layer)
    with left_alone(problem.model):
        solution = Linearized()(problem)
    if solution.proposal is None:
        assert solution.reason
    else:
        now = right(problem, solution.proposal.state)
        assert broken(problem, solution.proposal.state) == solution.proposal.broken == 0
        assert solution.proposal.repaired == int((now & problem.before.targeted).sum()) > 0
        assert [other.broken for other in solution.others] == [0] * len(solution.others)


def test_it_repairs_most_of_what_a_hidden_layer_can() -> None:
    problem = make(trained(), known())
    solution = Linearized()(problem)
    assert solution.proposal is not None
    targets = int(problem.before.targeted.sum())
    assert solution.proposal.repaired >= 0.6 * targets
    repairs = [proposal.repaired for proposal in (*solution.others, solution.proposal)]
    assert repairs == sorted(set(repairs))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
        nn.Conv3d(2, 3, 2),
    ],
)
def test_windows_are_what_a_convolution_sums(layer: Any) -> None:
    x = torch.randn(5, layer.in_channels, *[7, 6, 5][: layer.weight.ndim - 2])
    seen = windows(layer, x)
    weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    outputs = (seen @ weight.mT).unflatten(1, (5, -1)).permute(1, 0, 3, 2).flatten(1, 2) + layer.bias[:, None]
    torch.testing.assert_close(outputs, layer(x).flatten(2))
    few = windows(layer, x, 4)
    assert 5 <= few.shape[1] <= 5 * 8
    assert torch.equal((few[:, None, :2] == seen[:, :, None]).all(-1).any(1), torch.ones(layer.groups, 2).bool())


class Images(nn.Sequential):
    def __init__(self, groups: int = 1) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, groups=groups),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


def images(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize(("layer", "groups"), [("3", 1), ("3", 2), (["0", "6"], 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [8, 2048])
def test_slopes_are_gradients_in_whitened_coordinates(
    layer: Any, groups: int, bias: bool, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of a small change is what the margins do under the state that belongs to it."""
    monkeypatch.setattr("lightning_nrl.methods._solvers.whitening.MAX_FULL_MOMENT", wide)
    model = Images(groups).double().eval()
    x, y = images()
    problem = make(model, [TensorSource(x.double(), y, "all", passed=True, failed=True)], layer, bias=bias)
    whitening = fit_whitening(problem, 10**6)
    assert whitening.size == problem.space.size
    assert whitening.roots[0].ndim == (3 if wide == 2048 else 2)
    change = 1e-6 * torch.randn(whitening.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, gradients = margin_gradients(problem, torch.arange(60), whitening, {})

    def margins(state: Any) -> Tensor:
        weights = {**snapshot(model), **state}
        return Multiclass().margin(torch.func.functional_call(model, weights, (x.double(),)), y).detach()

    real = margins(whitening.state(change)) - margins({})
    torch.testing.assert_close(gradients @ change, real, rtol=1e-3, atol=1e-10)


def test_a_layer_that_is_too_large_moves_in_the_channels_that_help_most() -> None:
    problem = make(Images(), [TensorSource(*images(), "all", passed=True, failed=True)], "3")
    few = fit_whitening(problem, 80)
    assert few.size <= 80
    whole = fit_whitening(problem, 10**6)
    _, gradients = margin_gradients(problem, problem.before.targeted.nonzero().flatten(), whole, {})
    help_of = gradients.unflatten(1, (6, -1)).square().sum((0, 2))
    assert few.outputs[0].tolist() == sorted(help_of.argsort(descending=True)[:2].tolist())
    moved = few.state(torch.ones(few.size))["3.weight"] != problem.model[3].weight
    assert moved.flatten(1).any(1).nonzero().flatten().tolist() == few.outputs[0].tolist()


def test_whitened_steps_of_one_length_move_passed_outputs_alike() -> None:
    problem = make(plane(), on_the_axis())
    (root,) = fit_whitening(problem, 10).roots
    # Second moment diag(1, 0), scaled to diag(2, 0), plus a tenth.
    torch.testing.assert_close(root[0].float(), torch.diag(torch.tensor([2.1, 0.1]).rsqrt()))


@pytest.mark.parametrize("few", [False, True])
def test_two_ranks_end_with_the_same_weights_and_repair_what_one_does(few: bool) -> None:
    sources = known()
    if few:
        failed = (trained().eval()(sources[1].inputs).argmax(1) != sources[1].targets).nonzero()[:1, 0]
        sources[1] = TensorSource(sources[1].inputs[failed], sources[1].targets[failed], "new", failed=True)
    alone = Linearized()(make(trained(), sources)).proposal
    first, second = together(trained(), sources, lambda own: Linearized()(own).proposal, layer="0")
    assert alone is not None
    assert same(first.state, second.state)
    assert (first.repaired, first.broken) == (second.repaired, second.broken) == (alone.repaired, 0)
    torch.testing.assert_close(first.state["0.weight"], alone.state["0.weight"], rtol=1e-3, atol=1e-4)


def test_a_half_precision_model_is_repaired_in_its_own_numbers() -> None:
    sources = [replace(s, inputs=s.inputs.bfloat16()) for s in known()]
    problem = make(trained().bfloat16(), sources)
    solution = Linearized()(problem)
    assert solution.proposal is not None
    assert solution.proposal.state["0.weight"].dtype == torch.bfloat16
    assert (solution.proposal.broken, solution.proposal.repaired > 0) == (0, True)


def test_mixed_precision_is_repaired_as_deployed() -> None:
    def mixed() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    solution = Linearized()(problem := make(trained(), known(), context=mixed))
    assert solution.proposal is not None
    assert (solution.proposal.broken, solution.proposal.repaired > 0) == (0, True)
    assert problem.propose("again", solution.proposal.state).repaired == solution.proposal.repaired


def test_the_pipeline_repairs_by_name() -> None:
    model = trained()
    outcome = repair_module(model, known(), quick(method="linearized", layer="0"))
    assert METHODS.parse("method", "linearized") == Linearized()
    assert outcome.report.status == "repaired"
    assert outcome.report.pooled("known").broken == 0
    assert {"linearize", "solve", "judge"} <= outcome.report.seconds.keys()


class Functional(nn.Module):
    """Gives a layer's weights to a function, so that the layer itself is never called."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.inner, self.detached = plane(), detached

    def forward(self, x: Tensor) -> Tensor:
        if self.detached:
            with torch.no_grad():
                return self.inner(x)
        return self.inner[1](F.linear(x, self.inner[0].weight))


@pytest.mark.parametrize("detached", [False, True])
def test_a_layer_that_gradients_do_not_reach_is_refused(detached: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"`layer='inner.0'`.*\nHINT: .*`method='swarm'`"):
        Linearized()(make(Functional(detached), on_the_axis(), "inner.0"))


def test_a_layer_that_no_margin_depends_on_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
    model[0].weight.data, model[1].weight.data = torch.zeros(1, 2), torch.zeros(2, 1)
    model[1].bias.data = torch.tensor([0.0, 1.0])
    sources = [source([[1.0, 0.0]], [1], "train", passed=True), source([[0.0, 1.0]], [0], "new", failed=True)]
    solution = Linearized()(make(model, sources))
    assert solution.proposal is None
    assert solution.reason == "no margin of a target depends on the layer's weights."


def test_without_time_there_is_no_proposal() -> None:
    solution = Linearized()(make(plane(), on_the_axis(), clock=StageTimer(max_time=0.0)))
    assert solution.proposal is None
    assert "raise `max_time`" in solution.reason
