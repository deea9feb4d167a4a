from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from benchmarks.bounds import Trial, trials
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.stats import Bound, binomial_cdf, interval, lower_limit, upper_limit

HOW_TO = ROOT / "docs" / "gates.md"
CONFIDENCES = (0.5, 0.7, 0.9, 0.95, 0.999, 1 - 1e-9)
COUNTS = [(0, 1), (1, 2), (0, 20), (3, 20), (19, 20), (4, 908), (454, 908), (907, 908)]
LARGE = [(0, 10**6), (1, 10**6), (3_000, 10**6), (500_000, 10**6), (10**6 - 1, 10**6)]

quick = settings(max_examples=50, deadline=None)
confidences = st.floats(0.5, 0.999)
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(("broken", "n"), COUNTS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_limits_are_those_of_the_beta_distribution(broken, n, confidence):
    beta = pytest.importorskip("scipy.stats").beta
    assert upper_limit(broken, n, confidence) == pytest.approx(
        beta.ppf(confidence, broken + 1, n - broken), abs=1e-9
    )
    lower = beta.ppf(1 - confidence, broken, n - broken + 1) if broken else 0.0
    assert lower_limit(broken, n, confidence) == pytest.approx(lower, abs=1e-9)


@pytest.mark.parametrize(("broken", "n"), LARGE)
def test_a_million_samples_are_no_problem(broken, n):
    beta = pytest.importorskip("scipy.stats").beta
    assert upper_limit(broken, n) == pytest.approx(beta.ppf(0.95, broken + 1, n - broken), abs=1e-9)


def test_limits_where_there_is_nothing_to_say():
    assert (upper_limit(0, 0), lower_limit(0, 0)) == (1.0, 0.0)
    assert (upper_limit(7, 7), lower_limit(0, 7)) == (1.0, 0.0)
    assert upper_limit(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-15)
    assert lower_limit(100, 100) == pytest.approx(0.05 ** (1 / 100), abs=1e-15)
    # Half the level for each of two.
    assert interval(0, 100, 2)[1] == pytest.approx(1 - 0.025 ** (1 / 100), abs=1e-15)


def test_p_values_are_those_of_the_binomial_distribution():
    for n in (1, 2, 17, 400):
        for p in (Fraction(1, 10**12), Fraction(3, 1000), Fraction(1, 2), Fraction(97, 100)):
            for k in {0, 1, n // 100, n // 2, n - 1, n, int(n * p), min(n, int(n * p) + 1)}:
                terms = (math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
                assert binomial_cdf(k, n, float(p)) == pytest.approx(
                    float(sum(terms)), rel=1e-8, abs=1e-14
                )


@quick
@given(counts, confidences)
def test_the_rate_lies_between_the_limits(sample, confidence):
    broken, n = sample
    level = 1 - confidence
    upper = upper_limit(broken, n, confidence)
    assert 0 < upper <= 1
    assert lower_limit(broken, n, confidence) == 1 - upper_limit(n - broken, n, confidence)
    assert lower_limit(broken, n, confidence) <= broken / n <= upper
    if broken < n:  # the largest rate at which so few are not too improbable
        assert binomial_cdf(broken, n, upper) <= level * (1 + 1e-9)
        assert binomial_cdf(broken, n, upper * (1 - 1e-9)) >= level * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(1e-4, 1 - 1e-4), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_limit_is_missed_no_more_often_than_it_says_whatever_the_rate(n, rate, level):
    misses = [k for k in range(n + 1) if upper_limit(k, n, level) < rate]
    assert misses == list(range(len(misses)))
    assert not misses or binomial_cdf(misses[-1], n, rate) <= (1 - level) * (1 + 1e-9)


def test_a_bound_reads_as_a_sentence():
    bound = Bound.of(4, 908)
    text = "broken 4 of 908 (0.44 %); with 95 % confidence at most 1.01 % of such samples"
    assert str(bound) == text
    assert bound.upper == upper_limit(4, 908)
    groups = replace(Bound.of(3, 40), by_group=True)
    text = "broken 3 of 40 groups (7.50 %); with 95 % confidence at most 18.26 % of such groups"
    assert str(groups) == text
    assert str(Bound.of(0, 0)) == "broken 0 of 0; nothing is known of such samples"


def test_a_limit_is_rounded_up_and_a_confidence_is_not_rounded_to_certainty():
    for count, n, end in (
        (0, 10**6, "0.00030 %"),
        (0, 4_000, "0.075 %"),
        (0, 2_500, "0.12 %"),
        (2, 2, "100.00 %"),
    ):
        assert str(Bound.of(count, n)).endswith(f"at most {end} of such samples")
    assert "broken 3 of 1,000 (0.30 %); with 99.995 % confidence" in str(
        Bound.of(3, 1_000, 0.99995)
    )


@quick
@given(counts, confidences)
def test_a_printed_limit_holds_too(sample, confidence):
    bound = Bound.of(*sample, confidence)
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
        ((1, 4, 0.05), "`confidence=0.05` is no confidence of at least 50 %"),
        ((1, 4, 0), "`confidence=0` is no confidence of at least 50 %"),
        ((1, 4, 1.0), "`confidence=1.0` is no confidence of at least 50 %"),
        ((1, 4, float("nan")), "`confidence=nan` is no confidence of at least 50 %"),
        ((1, 4, "95%"), "`confidence='95%'` is no confidence of at least 50 %"),
    ],
)
def test_what_is_no_count_or_confidence_is_refused(arguments, message):
    for function in (upper_limit, lower_limit, Bound.of):
        with pytest.raises(ConfigurationError, match=rf"{message}.*\nHINT: "):
            function(*arguments)


def test_numbers_of_numpy_and_torch_are_counts():
    assert upper_limit(np.int64(4), torch.tensor(908)) == upper_limit(4, 908)


@pytest.fixture(scope="module")
def study() -> list[Trial]:
    return trials()


def test_no_bound_is_missed_more_often_than_it_says_and_what_is_not_promised_does_not_hold(study):
    assert len(study) == 8
    for trial in study:
        assert (trial.missed <= trial.allowed) is trial.promised, trial


def test_the_allowance_is_a_quantile_of_what_may_be_missed():
    binom = pytest.importorskip("scipy.stats").binom
    assert Trial("", "", True, 0, 1000).allowed == binom.ppf(0.999, 1000, 0.05)


def test_the_page_shows_what_the_study_counts(study):
    page = HOW_TO.read_text(encoding="utf-8")
    for trial in study:
        assert f"| {trial.bound} | {trial.data} | {trial.missed} |" in page
