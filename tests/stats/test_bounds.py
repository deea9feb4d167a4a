from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.bounds import Trial, trials
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.stats import (
    Bound,
    SliceBounds,
    binomial_cdf,
    check_mix,
    choose,
    lower_limit,
    slice_bounds,
    upper_limit,
    weighted_bound,
)

HOW_TO = ROOT / "docs" / "bounds.md"
CONFIDENCES = (0.001, 0.3, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9)
COUNTS = [(0, 1), (1, 2), (0, 20), (3, 20), (19, 20), (4, 908), (454, 908), (907, 908)]
LARGE = [(0, 10**6), (1, 10**6), (3_000, 10**6), (500_000, 10**6), (10**6 - 1, 10**6)]

quick = settings(max_examples=100, deadline=None)
confidences = st.floats(0.01, 0.999)
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(("broken", "n"), COUNTS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_limits_are_those_of_the_beta_distribution(broken: int, n: int, confidence: float) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    assert upper_limit(broken, n, confidence) == pytest.approx(beta.ppf(confidence, broken + 1, n - broken), abs=1e-9)
    lower = beta.ppf(1 - confidence, broken, n - broken + 1) if broken else 0.0
    assert lower_limit(broken, n, confidence) == pytest.approx(lower, abs=1e-9)


@pytest.mark.parametrize(("broken", "n"), LARGE)
def test_a_million_samples_are_no_problem(broken: int, n: int) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    assert upper_limit(broken, n) == pytest.approx(beta.ppf(0.95, broken + 1, n - broken), abs=1e-9)


def test_limits_where_there_is_nothing_to_say() -> None:
    assert (upper_limit(0, 0), lower_limit(0, 0)) == (1.0, 0.0)
    assert (upper_limit(7, 7), lower_limit(0, 7)) == (1.0, 0.0)
    assert upper_limit(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-15)
    assert lower_limit(100, 100) == pytest.approx(0.05 ** (1 / 100), abs=1e-15)


def test_p_values_are_those_of_the_binomial_distribution() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    for n in (1, 2, 17, 400, 100_000):
        for p in (1e-12, 0.003, 0.5, 0.97):
            for k in {0, 1, n // 100, n // 2, n - 1, n, min(n, int(n * p)), min(n, int(n * p) + 1)}:
                assert binomial_cdf(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-8, abs=1e-14)


@quick
@given(counts, confidences)
def test_the_rate_lies_between_the_limits(found: tuple[int, int], confidence: float) -> None:
    broken, n = found
    level = 1 - confidence
    upper = upper_limit(broken, n, confidence)
    assert 0 < upper <= 1
    assert lower_limit(broken, n, confidence) == 1 - upper_limit(n - broken, n, confidence)
    if confidence >= 0.5:
        assert lower_limit(broken, n, confidence) <= broken / n <= upper
    if broken < n:  # the largest rate at which so few are not too improbable
        assert binomial_cdf(broken, n, upper) <= level
        assert binomial_cdf(broken, n, upper * (1 - 1e-9)) >= level * (1 - 1e-9)


@quick
@given(counts, confidences, st.floats(0.01, 0.9))
def test_more_broken_fewer_samples_or_more_confidence_raise_the_limit(
    found: tuple[int, int], confidence: float, share: float
) -> None:
    broken, n = found
    upper = upper_limit(broken, n, confidence)
    if broken < n:
        assert upper < upper_limit(broken + 1, n, confidence)
        assert upper_limit(broken, n, confidence * share) < upper
        assert upper_limit(broken, n + 1, confidence) < upper


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(1e-4, 1 - 1e-4), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_limit_is_missed_no_more_often_than_it_says_whatever_the_rate(n: int, rate: float, level: float) -> None:
    misses = [k for k in range(n + 1) if upper_limit(k, n, level) < rate]
    assert misses == list(range(len(misses)))
    assert not misses or binomial_cdf(misses[-1], n, rate) <= (1 - level) * (1 + 1e-9)


def test_a_bound_reads_as_a_sentence() -> None:
    bound = Bound.of(4, 908)
    assert str(bound) == "broken 4 of 908 (0.44 %); with 95 % confidence at most 1.01 % of such samples"
    assert (bound.rate, bound.upper, bound.confidence) == (4 / 908, upper_limit(4, 908), 0.95)
    assert str(Bound.of(0, 0)) == "broken 0 of 0; nothing is known of such samples"
    assert math.isnan(Bound.of(0, 0).rate)


def test_a_limit_is_rounded_up_and_a_confidence_is_not_rounded_to_certainty() -> None:
    for count, n, end in ((0, 10**6, "0.00030 %"), (0, 4_000, "0.075 %"), (0, 2_500, "0.12 %"), (2, 2, "100.00 %")):
        assert str(Bound.of(count, n)).endswith(f"at most {end} of such samples")
    assert "broken 3 of 1,000 (0.30 %); with 99.995 % confidence" in str(Bound.of(3, 1_000, 0.99995))


@quick
@given(counts, confidences)
def test_what_is_printed_holds_too(found: tuple[int, int], confidence: float) -> None:
    bound = Bound.of(*found, confidence)
    (printed,) = re.findall(r"at most ([\d.]+) %", str(bound))
    assert bound.upper <= float(printed) / 100 * (1 + 1e-12)
    assert float(printed) / 100 < bound.upper + 0.00011


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 4), "`broken=5` is more than `n=4`"),
        ((-1, 4), "`broken=-1` is no count"),
        ((1, 4.0), r"`n=4\.0` is no count"),
        ((True, 4), "`broken=True` is no count"),
        ((1, "4"), "`n='4'` is no count"),
        ((1, 4, 0), "`confidence=0` is no share"),
        ((1, 4, 1.0), "`confidence=1.0` is no share"),
        ((1, 4, float("nan")), "`confidence=nan` is no share"),
        ((1, 4, "95%"), "`confidence='95%'` is no share"),
    ],
)
def test_what_is_no_count_or_confidence_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    for function in (upper_limit, lower_limit, Bound.of):
        with pytest.raises(ConfigurationError, match=rf"{message}.*\nHINT: "):
            function(*arguments)


def test_numbers_of_numpy_and_torch_are_counts() -> None:
    assert upper_limit(np.int64(4), torch.tensor(908)) == upper_limit(4, 908)  # type: ignore[arg-type]


PASSED = torch.tensor([True] * 6 + [False] * 2)
BROKEN = torch.tensor([True, False, True, False, False, False, False, False])
SLICES = [3, 10, 3, 3, 10, 10, 10, 7]


@pytest.mark.parametrize("column", [SLICES, torch.tensor(SLICES), np.array(SLICES)])
def test_each_slice_is_counted_by_itself(column: Any) -> None:
    found = slice_bounds(BROKEN, PASSED, column, simultaneous=False)
    assert found.bounds == {3: Bound.of(2, 3), 7: Bound.of(0, 0), 10: Bound.of(0, 3)}
    assert str(found) == "\n".join(f"{name}: {found[name]}" for name in (3, 7, 10))


def test_to_hold_together_slices_share_the_level() -> None:
    found = slice_bounds(BROKEN, PASSED, SLICES, confidence=0.9)
    assert {name: bound.upper for name, bound in found.bounds.items()} == pytest.approx(
        {3: upper_limit(2, 3, 0.95), 7: 1.0, 10: upper_limit(0, 3, 0.95)}  # two parts: of slice 7 nothing is said
    )
    assert str(found).endswith("\nwith 90 % confidence all of this holds together")
    assert found[3].confidence == pytest.approx(0.95)


def test_names_may_be_words_of_any_make() -> None:
    words = ["b", "a", "b", "b", "a", "a", "a", "c"]
    found = slice_bounds(BROKEN, PASSED, words)
    assert list(found.bounds) == ["a", "b", "c"]
    assert slice_bounds(BROKEN, PASSED, np.array(words, dtype=object)) == found
    assert list(slice_bounds(BROKEN, PASSED, PASSED).bounds) == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BROKEN, PASSED, SLICES[:3]), r"`broken`: torch.bool \[8\] for 3 slices"),
        ((BROKEN.int(), PASSED, SLICES), r"`broken`: torch.int32 \[8\] for 8 slices"),
        ((BROKEN, [True] * 8, SLICES), "`passed`: list for 8 slices"),
        ((~PASSED, PASSED, SLICES), "`broken`: 2 of its samples are not in `passed`"),
        ((BROKEN, PASSED, torch.rand(8)), r"`slices`: float32 \[8\] is no column of slices"),
        ((BROKEN, PASSED, [None] * 8), r"`slices`: object \[8\] is no column"),
        ((BROKEN, PASSED, [SLICES]), r"`slices`: int64 \[1, 8\] is no column"),
        ((BROKEN, PASSED, SLICES, 1.5), r"`confidence=1\.5`"),
    ],
)
def test_columns_that_do_not_fit_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{message}.*\nHINT: "):
        slice_bounds(*arguments)


def test_counts_must_be_of_the_same_slices() -> None:
    with pytest.raises(ConfigurationError, match=r"`broken` has the slices \[1\] and `n` has \[1, 2\]"):
        SliceBounds.of({1: 0}, {1: 3, 2: 4})


@quick
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), max_size=40),
    st.sampled_from([0.5, 0.9, 0.95]),
    st.booleans(),
)
def test_slices_add_up_and_hold_together_only_at_a_price(
    rows: list[tuple[bool, bool, int]], confidence: float, simultaneous: bool
) -> None:
    passed = torch.tensor([row[0] for row in rows], dtype=torch.bool)
    broken = torch.tensor([row[0] and row[1] for row in rows], dtype=torch.bool)
    found = slice_bounds(broken, passed, [row[2] for row in rows], confidence, simultaneous)
    assert sum(bound.n for bound in found.bounds.values()) == int(passed.sum())
    assert sum(bound.broken for bound in found.bounds.values()) == int(broken.sum())
    for bound in found.bounds.values():
        alone = upper_limit(bound.broken, bound.n, confidence)
        assert bound.upper == pytest.approx(alone) if not simultaneous else bound.upper >= alone - 1e-12


def test_mixes_are_compared_by_a_chi_squared_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    table = np.array([[500, 300, 208], [40, 41, 30]])
    columns = [np.repeat(["a", "b", "c"], row) for row in table]
    found = check_mix(*columns)
    statistic, p_value, *_ = stats.chi2_contingency(table, correction=False)
    assert (found.statistic, found.p_value) == pytest.approx((statistic, p_value))
    assert found.calibration == pytest.approx({"a": 500 / 1008, "b": 300 / 1008, "c": 208 / 1008})
    assert not found.differs
    assert found.warning == ""


def test_a_different_mix_is_told_with_what_makes_it_different() -> None:
    usual, hidden = ["usual"], ["hidden"]
    found = check_mix(usual * 890 + hidden * 110, usual * 31 + hidden * 69)
    assert found.warning == (
        "the overall bound holds only for data like the calibration data; slice 'hidden' is 11 % of the calibration "
        "data and 69 % of the other; use the bounds per slice or weight them"
    )
    many = check_mix(np.repeat(np.arange(10), 100), np.repeat([2, 3, 4, 5], [10, 30, 30, 30]))
    assert "slices 3, 4 are 20 % of the calibration data and 60 % of the other" in many.warning
    most = check_mix(np.repeat(np.arange(20), 100), np.repeat(np.arange(10), 30))
    assert "slices 0, 1, 2 and 2 more are 25 % of the calibration data and 50 % of the other" in most.warning
    alone = check_mix([0] * 3000 + [1], [1] * 400 + [0])
    assert "slice 1 is 0.033 % of the calibration data and 99.75 % of the other" in alone.warning


def test_a_few_samples_of_a_slice_that_the_calibration_data_lack_are_noticed() -> None:
    found = check_mix([0] * 1000, [1] * 4)
    assert found.p_value == pytest.approx(1 / 2000)  # none of the random tables is as extreme
    assert "slice 1 is 0 % of the calibration data and 100 % of the other" in found.warning
    assert check_mix([0, 1, 1], [1, 0, 0, 1]).p_value > 0.2
    assert check_mix([5] * 10, [5] * 3).p_value == 1


@pytest.mark.parametrize(("sizes", "classes", "skew"), [((300, 200), 6, 0), ((1000, 50), 8, 2)])
def test_equal_mixes_are_seldom_told_apart(sizes: tuple[int, int], classes: int, skew: int) -> None:
    generator = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, classes + 1) ** skew
    draws, alarms = 60, 0
    for _ in range(draws):
        columns = (generator.choice(classes, size, p=shares / shares.sum()) for size in sizes)
        alarms += check_mix(*columns).differs
    assert alarms <= next(k for k in range(draws) if binomial_cdf(k, draws, 0.01) >= 0.999)


def test_a_check_of_mixes_leaves_random_states_alone_and_is_the_same_every_time() -> None:
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    first, second = (check_mix([0] * 50 + [1], [1, 1, 0]) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == legacy).all()  # type: ignore[index]


def test_mixes_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`other` is empty"):
        check_mix([1, 2], [])
    with pytest.raises(ConfigurationError, match="`calibration` is a column of int64 and `other` of <U1"):
        check_mix([1, 2], ["a"])


TWO = SliceBounds.of({"usual": 2, "hidden": 3}, {"usual": 890, "hidden": 110})


def test_the_mix_that_is_expected_weighs_the_slices() -> None:
    found = weighted_bound(TWO, {"usual": 0.31, "hidden": 0.69})
    assert found.construction == "split"
    assert found.rate == pytest.approx(0.31 * 2 / 890 + 0.69 * 3 / 110)
    usual = (0.31 / 890) / (0.31 / 890 + 0.69 / 110)
    assert found.upper == pytest.approx(
        0.31 * upper_limit(2, 890, 1 - 0.05 * usual) + 0.69 * upper_limit(3, 110, 1 - 0.05 * (1 - usual))
    )
    assert str(found) == (
        "broken 1.95 % when weighted for the mix; with 95 % confidence at most 5.16 % of samples in that mix"
    )


def test_one_slice_alone_has_its_own_bound() -> None:
    found = weighted_bound(TWO, {"usual": 0, "hidden": 1})
    assert found.upper == pytest.approx(upper_limit(3, 110))
    everything = SliceBounds.of({0: 4}, {0: 4})
    assert weighted_bound(everything, {0: 1}).upper == 1


def test_many_slices_as_dense_as_the_mix_asks_for_are_pooled() -> None:
    slices = SliceBounds.of(dict.fromkeys(range(10), 0), dict.fromkeys(range(10), 100))
    found = weighted_bound(slices, dict.fromkeys(range(10), 0.1))
    assert found.construction == "pooled"
    assert found.upper == pytest.approx(upper_limit(0, 1000))  # exact where nothing is broken


@pytest.mark.parametrize(
    ("slices", "shares", "message"),
    [
        (TWO, {"usual": 1.0}, r"`shares` has the slices \['usual'\], the calibration data have \['usual', 'hidden'\]"),
        (TWO, {"usual": 0.5, "hidden": 0.4, "new": 0.1}, r"have \['usual', 'hidden'\].*nothing can be said"),
        (TWO, {"usual": 0.5, "hidden": 0.4}, "their sum is 0.9"),
        (TWO, {"usual": 1.5, "hidden": -0.5}, "are no shares"),
        (TWO, {"usual": 0.5, "hidden": float("nan")}, "are no shares"),
        (SliceBounds.of({1: 0, 2: 0}, {1: 5, 2: 0}), {1: 0.5, 2: 0.5}, r"no calibration sample of \[2\] was right"),
    ],
)
def test_shares_that_do_not_fit_are_refused(slices: SliceBounds, shares: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){message}"):
        weighted_bound(slices, shares)


@pytest.mark.parametrize("sizes", [(12, 30), (25, 25), (2, 40)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_weighted_limit_is_missed_no_more_often_than_it_says_whatever_the_rates(
    sizes: tuple[int, int], share: float
) -> None:
    # Not drawn but summed over all counts, for a grid of rates of the two slices.
    mix, level = {0: share, 1: 1 - share}, 0.2
    ways = [np.array([math.comb(n, k) for k in range(n + 1)]) for n in sizes]
    limits = np.array(
        [
            [
                weighted_bound(SliceBounds.of({0: i, 1: j}, dict(enumerate(sizes))), mix, 1 - level).upper
                for j in range(sizes[1] + 1)
            ]
            for i in range(sizes[0] + 1)
        ]
    )
    assert (np.diff(limits, axis=0) >= 0).all()
    assert (np.diff(limits, axis=1) >= 0).all()
    grid = np.linspace(0, 1, 41)[:, None]
    first, second = (
        way * grid ** np.arange(n + 1) * (1 - grid) ** (n - np.arange(n + 1))
        for way, n in zip(ways, sizes, strict=True)
    )
    true = share * grid + (1 - share) * grid.T
    missed = np.array(
        [[first[a] @ (limits < true[a, b] - 1e-12) @ second[b] for b in range(len(grid))] for a in range(len(grid))]
    )
    assert missed.max() <= level + 1e-9


def test_candidates_are_walked_from_the_safest_until_one_fails() -> None:
    found = choose([0, 1, 9, 1, 2], n=900, limit=0.01)
    assert (found.accepted, found.index) == ((0, 1), 1)
    assert found.p_values == tuple(binomial_cdf(k, 900, 0.01) for k in (0, 1, 9, 1, 2))
    assert str(found) == "candidate 2 of 5; with 95 % confidence it breaks at most 1.00 % of such samples"
    none = choose([9, 0], n=900, limit=0.01)
    assert (none.accepted, none.index) == ((), None)
    assert str(none) == "none of 2 candidates can be said to break at most 1.00 %"


def test_candidates_in_no_order_share_the_level() -> None:
    found = choose([0, 1, 9, 3, 2], n=900, limit=0.01, ordered=False)
    assert found.p_values[1] <= 0.01 < found.p_values[3] <= 0.05
    assert (found.accepted, found.index) == ((0, 1, 4), 4)


def test_without_candidates_or_samples_nothing_is_chosen() -> None:
    for ordered in (True, False):
        assert choose([], n=900, limit=0.01, ordered=ordered).index is None
        assert choose([0, 0], n=0, limit=0.01, ordered=ordered).index is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 5], 4, 0.01), "`broken=5` is more than `n=4`"),
        (([0], 4, 0.0), r"`limit=0\.0` is no share"),
        (([0], 4, 0.01, 2), "`confidence=2` is no share"),
    ],
)
def test_a_choice_without_sense_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{message}.*\nHINT: "):
        choose(*arguments)


@quick
@given(st.lists(st.integers(0, 30), max_size=8), st.floats(0.01, 0.5), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_what_is_accepted_has_a_limit_of_its_own_within_the_limit(
    broken: list[int], limit: float, confidence: float
) -> None:
    ordered, alone = (choose(broken, 60, limit, confidence, ordered=way) for way in (True, False))
    passing = [upper_limit(k, 60, confidence) <= limit for k in broken]
    assert list(ordered.accepted) == list(range(([*passing, False]).index(False)))
    assert all(passing[i] for i in alone.accepted)
    assert ordered.index == (ordered.accepted[-1] if ordered.accepted else None)


@pytest.fixture(scope="module")
def study() -> list[Trial]:
    return trials()


def test_no_bound_is_missed_more_often_than_it_says_and_what_is_not_promised_does_not_hold(study: list[Trial]) -> None:
    assert len(study) == 7
    for trial in study:
        assert (trial.missed <= trial.allowed) is trial.promised, trial


def test_the_allowance_is_a_quantile_of_what_may_be_missed() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    assert Trial("", "", True, 0, 1000).allowed == binom.ppf(0.999, 1000, 0.05)


def test_the_page_shows_what_the_study_counts(study: list[Trial]) -> None:
    page = HOW_TO.read_text(encoding="utf-8")
    for trial in study:
        assert f"| {trial.bound} | {trial.data} | {trial.missed} |" in page
