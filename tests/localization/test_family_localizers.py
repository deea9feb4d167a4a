"""The localisers beside NeuRecoverLite: numbers worked out by hand, and sets as the papers write
them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_impact import toy_linear
from torch import nn
from toy_problems import on_a_line, threshold

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.localization import (
    ByGradient,
    Impact,
    KnownData,
    RandomWeights,
    measure,
)
from lightning_nrl.methods.search_samples import record_known
from lightning_nrl.published import Arachne, ArachneV2, HistoryPoint, NeuRecover
from lightning_nrl.published.arachne import contribution, first_fronts, pareto_front
from lightning_nrl.published.neurecover import TrainingFlips, localize_by_history

EVALUATOR = Evaluator(nn.Identity())
EVERY = torch.ones(2, dtype=torch.bool)
FIRST, SECOND = torch.tensor([True, False]), torch.tensor([False, True])


def test_whole_numbers_as_weights_are_samples_that_come_more_often(recorded, weighted):
    layer = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 5, generator=generator)
    y = torch.randn(layer(x).shape, generator=generator)
    often = torch.tensor([0, 0, 1, 2, 2, 2])
    every = torch.ones(6, dtype=torch.bool)
    more = measure(recorded(layer, x[often], y[often], ""), weighted, every)
    counted = measure(
        recorded(layer, x, y, ""), weighted, every[:3], weight=torch.tensor([2.0, 1.0, 3.0])
    )
    torch.testing.assert_close(counted.backward.float(), more.backward.float())
    torch.testing.assert_close(counted.forward.float(), more.forward.float())


def test_contribution_is_that_of_autograd(recorded):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    )
    model = model.double()
    x = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    localization = contribution(
        recorded(model, x, torch.zeros(7), layer="0", include_bias=True),
        EVALUATOR,
        EVERY.repeat(4)[:7],
    )
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).view(
        7, 2, 9, 9
    )  # sample, group, place in kernel, position
    weight, bias = model[0].weight.detach().view(2, 2, 9), model[0].bias.detach().view(2, 2)
    terms = torch.cat(
        [
            patches.abs()[:, :, None] * weight.abs()[None, ..., None],
            bias.abs()[None, ..., None, None].expand(7, 2, 2, 1, 9),
        ],
        3,
    )
    share = (terms / terms.sum(3, keepdim=True)).mean((0, 4)).view(4, 10)
    out = model[0](x).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(model[1:].forward))(out[:, None])
    influence = jacobian.flatten(1, 2).view(7, 3, 4, 9).abs().sum(1).mean((0, 2))
    expected = share * influence[:, None]
    torch.testing.assert_close(localization, torch.cat([expected[:, :9].flatten(), expected[:, 9]]))


def test_fronts_by_hand():
    one, other = (
        torch.tensor([3.0, 1.0, 6.0, 2.0, 3.0, 0.0]),
        torch.tensor([3.0, 2.0, 1.5, 3.0, 3.0, 0.0]),
    )
    assert pareto_front(one, other).tolist() == [True, False, True, False, True, False]
    assert first_fronts(one, other, None).tolist() == [0, 2, 4]
    assert first_fronts(one, other, 4).tolist() == [0, 2, 3, 4]
    assert first_fronts(one, other, 2).tolist() == [0, 4]
    assert first_fronts(one, other, 99).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_is_what_nothing_dominates(points):
    one, other = torch.tensor(points, dtype=torch.float32).T
    undominated = [
        not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points) for a, b in points
    ]
    assert pareto_front(one, other).tolist() == undominated


def test_arachne_by_hand(recorded, weighted):
    recording = recorded(
        *toy_linear()
    )  # on the second sample: gradients 3 1 6 2, forward impacts 3 2 1.5 3

    def localization(**given: int) -> list[int]:
        return Arachne(**given)(recording, weighted, failed=SECOND, passed=FIRST).weights.tolist()

    assert localization() == [0, 2]
    assert localization(n_weights=3) == [0, 2, 3]
    assert localization(n_g=1) == [2]
    assert ByGradient(n_weights=2)(
        recording, weighted, failed=SECOND, passed=FIRST
    ).weights.tolist() == [0, 2]


def test_arachne_v2_by_hand(recorded, weighted):
    # Gradients 3/2 1/3 6/1 2/1; forward impacts 0.6/1.2 0.4/1.8 (1/3)/(14/13) (2/3)/(25/13).
    localization = ArachneV2()(recorded(*toy_linear()), weighted, failed=SECOND, passed=FIRST)
    assert (localization.weights.tolist(), localization.n_g, localization.requested) == (
        [0, 2, 3],
        4,
        None,
    )
    assert localization.sizes == {"localized": 3, "total": 4}


def test_random_draws_follow_their_seed_alone(recorded):
    recording = recorded(nn.Linear(30, 10), torch.zeros(2, 30), torch.tensor([0, 1]), "")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draws = [
        RandomWeights(8, seed)(recording, EVALUATOR, failed=FIRST, passed=SECOND).weights
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(set(draws[2].tolist())) == 8
    assert torch.equal(torch.get_rng_state(), state)


def impact(forward: list[float], backward: list[float]) -> Impact:
    return Impact(
        torch.tensor(backward, dtype=torch.float64), torch.tensor(forward, dtype=torch.float64)
    )


SPACE = find_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["0", "1"])
DEG = impact([4.0, 3.0, 2.0, 1.0, 1.0, 3.0], [1.0, 4.0, 3.0, 2.0, 2.0, 1.0])
IMP = impact([1.0, 2.0, 3.0, 4.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 1.0, 1.0])
CHANGE = torch.tensor([0.4, 0.3, 0.2, 0.1, 1.0, 0.0])


def test_neurecover_by_hand():
    # Suspiciousness: (0.5, 2/3) / (2/3) * (0.25, 0.5) / 0.5 = 0.375, 1; top weights: round(1.5) =
    # 2, round(2) = 2.
    localization = localize_by_history(SPACE, DEG, IMP, CHANGE, rate=1.0)
    assert (localization.weights.tolist(), localization.n_g, localization.requested) == (
        [1],
        4,
        None,
    )
    assert localization.sizes == {"failed": 3, "passed": 4, "both": 2, "localized": 1, "total": 6}
    assert localize_by_history(SPACE, DEG, None, CHANGE, rate=1.0).weights.tolist() == [1, 4, 5]
    assert localize_by_history(SPACE, DEG, None, CHANGE, n_weights=1).weights.tolist() == [1]
    with pytest.raises(EmptyLocalizationError, match=r"at the rate 0\.5"):
        localize_by_history(SPACE, DEG, IMP, CHANGE, rate=0.5)


COLUMN = st.lists(st.integers(0, 4).map(float), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.tuples(COLUMN, COLUMN, COLUMN, COLUMN, COLUMN), st.floats(0.05, 1.0))
def test_neurecover_takes_the_sets_of_the_paper(columns, rate):
    deg_forward, deg_backward, imp_forward, imp_backward, change = columns
    layers = [range(4), range(4, 6)]

    def share(of: list[float], total: list[list[float]], layer: range) -> float:
        mean = sum(sum(column[i] for i in layer) for column in total)
        return sum(of[i] for i in layer) / mean if mean else 0.0

    shares = [share(deg_forward, [deg_forward, imp_forward], layer) for layer in layers]
    moved = [sum(change[i] for i in layer) / len(layer) for layer in layers]
    expected = []
    for layer, of_layer, move in zip(layers, shares, moved, strict=True):
        suspicious = 0.0
        if max(shares) and max(moved):
            suspicious = of_layer / max(shares) * move / max(moved)
        top_n = int(len(layer) * suspicious * rate + 0.5)

        def top(values: list[float], layer: range = layer, top_n: int = top_n) -> set[int]:
            return set(sorted(layer, key=lambda i: (-values[i], i))[:top_n])

        matter = top(deg_forward) & top(deg_backward) & top(change)
        expected += sorted(matter - (top(imp_forward) & top(imp_backward)))
    arguments = (
        SPACE,
        impact(deg_forward, deg_backward),
        impact(imp_forward, imp_backward),
        torch.tensor(change),
    )
    if expected:
        assert localize_by_history(*arguments, rate=rate).weights.tolist() == expected
    else:
        with pytest.raises(EmptyLocalizationError):
            localize_by_history(*arguments, rate=rate)


def test_later_flips_count_more():
    weights = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 0.0]])
    passed = torch.tensor([[1, 1, 0, -1], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.int8)
    flips = TrainingFlips.between(
        [HistoryPoint(*point) for point in zip(passed, weights, strict=True)], decay=0.5
    )
    assert flips.regressed.tolist() == [0.5, 1.0, 0.0, 1.0]
    assert flips.improved.tolist() == [0.0, 0.0, 0.5, 0.0]
    assert flips.change.tolist() == pytest.approx([1 / 1.5, 1 / 1.5])


@pytest.fixture
def line():
    problem = on_a_line()
    return problem, KnownData(problem.evaluator, problem.known, problem.before, problem.space)


def test_checkpoints_say_which_samples_were_lost(line, tmp_path):
    problem, known = line  # the threshold is at 0.75; 0.7 and 0.5 are targets, 0.6 passes
    torch.save({"state_dict": threshold(0.65)}, tmp_path / "second.ckpt")
    history = [threshold(0.45), str(tmp_path / "second.ckpt"), threshold(0.75)]
    localizer = NeuRecover(history, n_weights=1).on(known)
    assert localizer.flips.regressed.tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 0.8])
    assert localizer.flips.improved.tolist() == pytest.approx([0, 0, 0, 0, 0.8, 0, 0])
    assert localizer.flips.change.tolist() == pytest.approx(
        [0, (0.1 + 0.8 * 0.2) / 1.8, 0, 0], rel=1e-5
    )
    only_last = NeuRecover(history, last=1).on(known).flips
    assert (only_last.regressed.tolist(), only_last.improved.any().item()) == (
        [0, 0, 0, 0, 0, 1, 0],
        False,
    )
    assert torch.equal(known.evaluator.model.weight, threshold(0.75)["weight"])
    recording = record_known(problem, problem.before.targeted | problem.before.passed)

    def localized(history):
        return NeuRecover(history, rate=1.0, last=1).on(known)(
            recording, problem.evaluator, failed=problem.before.targeted, passed=problem.passed
        )

    assert localized(history).weights.tolist() == [0, 1, 2, 3]
    with pytest.raises(EmptyLocalizationError, match="none of the 2 targets was right"):
        localized([threshold(0.8)])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (None, "has no history of the training"),
        ([threshold(0.75)], "no point before the current model"),
        (["missing.ckpt"], r"'missing\.ckpt' cannot be read"),
    ],
    ids=["none", "no earlier one", "no such file"],
)
def test_history_that_cannot_be_used_is_refused(line, history, message):
    with pytest.raises(ConfigurationError, match=message):
        NeuRecover(history).on(line[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuRecover([]), "empty list"),
        (lambda: NeuRecover(n_weights=3, rate=0.5), "both given"),
        (lambda: NeuRecover(decay=0.0), "decay"),
        (lambda: Arachne(n_weights=0), "n_weights"),
        (lambda: RandomWeights(seed=-1), "seed"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
