"""The set operation of NeuRecoverLite, against the operation as the paper writes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import (
    AllWeights,
    Impact,
    NeuRecoverLite,
    default_n_weights,
    localize,
    measure,
)

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""


def impact(backward: list[float], forward: list[float]) -> Impact:
    return Impact(
        torch.tensor(backward, dtype=torch.float64), torch.tensor(forward, dtype=torch.float64)
    )


# Ranks: B_failed 0 1 2 3, F_failed 1 0 2 3, B_passed 3 2 1 0, F_passed 3 2 0 1.
FAILED = impact([4.0, 3.0, 2.0, 1.0], [3.0, 4.0, 2.0, 1.0])
PASSED = impact([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])


def naive(failed: Impact, passed: Impact, n_g: int) -> tuple[set[int], set[int]]:
    def top(values: torch.Tensor) -> set[int]:
        return set(sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:n_g])

    return top(failed.backward) & top(failed.forward), top(passed.backward) & top(passed.forward)


@st.composite
def two_impacts(draw):
    n = draw(st.integers(1, 14))
    column = st.lists(st.integers(0, 6).map(float), min_size=n, max_size=n)
    return impact(draw(column), draw(column)), impact(draw(column), draw(column))


@settings(max_examples=60, deadline=None)
@given(two_impacts())
def test_every_n_g_gives_the_paper_s_sets(impacts):
    total = len(impacts[0].backward)
    for n_g in range(1, total + 1):
        failed, passed = naive(*impacts, n_g)
        sizes = {"failed": len(failed), "passed": len(passed), "both": len(failed & passed)}
        sizes |= {"localized": len(failed - passed)}
        if failed - passed:
            localization = localize(*impacts, n_g=n_g)
            assert localization.weights.tolist() == sorted(failed - passed)
            assert localization.sizes == sizes | {"total": total}
        else:
            with pytest.raises(EmptyLocalizationError):
                localize(*impacts, n_g=n_g)


@settings(max_examples=60, deadline=None)
@given(two_impacts(), st.integers(1, 16))
def test_n_g_is_the_smallest_of_those_nearest_to_the_request(impacts, n_weights):
    sizes = {
        n_g: len(naive(*impacts, n_g)[0] - naive(*impacts, n_g)[1])
        for n_g in range(1, len(impacts[0].backward))
    }
    some = {n_g: size for n_g, size in sizes.items() if size}
    if not some:
        with pytest.raises(EmptyLocalizationError, match="no N_g leaves a weight"):
            localize(*impacts, n_weights=n_weights)
        return
    best = min(some, key=lambda n_g: (abs(some[n_g] - n_weights), n_g))
    localization = localize(*impacts, n_weights=n_weights)
    assert (localization.n_g, len(localization.weights), localization.requested) == (
        best,
        some[best],
        n_weights,
    )


def test_empty_names_the_set_sizes_and_the_nearest_n_g():
    with pytest.raises(EmptyLocalizationError) as caught:
        localize(FAILED, PASSED, n_g=4)
    assert str(caught.value) == (
        "`localizer` leaves no weight at N_g = 4 of 4: "
        "|B_failed & F_failed| = 4, |B_passed & F_passed| = 4, "
        "|intersection of the two| = 4, |W_localized| = 0.\n"
        "HINT: N_g = 3 is the nearest that leaves weights (1); or give `n_weights`."
    )


def test_default_is_within_the_paper_s_range():
    generator = torch.Generator().manual_seed(0)
    for total, reached in ((640, 64), (40_000, 309)):
        failed, passed = (Impact(*torch.rand(2, total, generator=generator)) for _ in range(2))
        localization = localize(failed, passed)
        assert localization.requested == default_n_weights(total) == reached
        assert abs(len(localization.weights) - reached) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_weights": 0}, "`n_weights=0`"),
        ({"n_g": "all"}, "`n_g='all'`"),
        ({"n_g": 3, "n_weights": 3}, "both given"),
        ({"aggregation": "sum"}, "`aggregation='sum'`"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=f"{message}.*\nHINT: "):
        NeuRecoverLite(**arguments)


def test_n_g_beyond_the_layer_is_refused():
    with pytest.raises(ConfigurationError, match="`n_g=5` is more than the 4 weights"):
        localize(FAILED, PASSED, n_g=5)


def test_localizer_measures_failed_and_passed(recorded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    recording = recorded(
        model, torch.randn(40, 6), torch.arange(40) % 4, ["0", "2"], include_bias=True
    )
    failed = torch.arange(40) < 9
    localizer = NeuRecoverLite(n_weights=20, aggregation="per_sample", include_bias=True)
    localization = localizer(recording, EVALUATOR, failed=failed, passed=~failed)
    of_failed, of_passed = (
        measure(recording, EVALUATOR, rows, aggregation="per_sample") for rows in (failed, ~failed)
    )
    expected = localize(of_failed, of_passed, n_weights=20)
    assert torch.equal(localization.weights, expected.weights)
    assert (localization.n_g, localization.sizes) == (expected.n_g, expected.sizes)
    everything = AllWeights(include_bias=True)(recording, EVALUATOR, failed=failed, passed=~failed)
    assert everything.weights.tolist() == list(range(6 * 16 + 16 + 16 * 4 + 4))
    assert everything.sizes["localized"] == everything.sizes["total"] == 180
