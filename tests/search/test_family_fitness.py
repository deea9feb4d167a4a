"""The fitnesses of Arachne and NeuRecover, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_fitness import AFTER, BEFORE

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.search import FITNESSES, ArachneDEFitness, ArachneFitness, Fitness, NeuRecoverFitness

# AFTER: 1 of 4 repaired, 10 of 10 kept, losses 1 and 3/4; and 4, 9, losses 0 and 1.


def test_arachne() -> None:
    assert ArachneFitness()(AFTER, BEFORE)[0].tolist() == pytest.approx([2 / 2 + 11 / 1.75, 5 / 1 + 10 / 2])


def test_neurecover() -> None:
    expected = [1.25 / 2 + 3 * 2 / 1.75, 2 / 1 + 3 * 1.9 / 2]
    assert NeuRecoverFitness(alpha=3)(AFTER, BEFORE)[0].tolist() == pytest.approx(expected)


def test_arachne_de() -> None:
    scores = replace(AFTER, credit_failed=torch.tensor([[1.5, 4.0]]), credit_passed=torch.tensor([[10.0, 9.5]]))
    assert ArachneDEFitness()(scores, BEFORE).tolist() == [[25.0, 49.5]]
    assert ArachneDEFitness(aggressiveness=1)(scores, BEFORE).tolist() == [[11.5, 13.5]]
    with pytest.raises(ValueError, match="credit=True"):
        ArachneDEFitness()(AFTER, BEFORE)


def test_weights_of_samples_count_and_losses_that_are_no_numbers_do_not() -> None:
    weighed = replace(AFTER, gain=torch.tensor([[2.0, 4.0]]), harm=torch.tensor([[3.0, 1.0]]))
    assert ArachneFitness()(weighed, BEFORE)[0].tolist() == pytest.approx([3 / 2 + 8 / 1.75, 5 / 1 + 10 / 2])
    lost = replace(AFTER, loss_failed=torch.tensor([[math.nan, 0.0]]), loss_passed=torch.tensor([[1.0, math.inf]]))
    for fitness in (ArachneFitness(), NeuRecoverFitness()):
        assert fitness(lost, BEFORE).tolist() == [[-math.inf, -math.inf]]


def test_names() -> None:
    assert list(FITNESSES)[:6] == ["lexicographic", "eq1", "eq2", "arachne", "neurecover", "arachne-de"]
    assert FITNESSES.parse("fitness", "eq2") == Fitness("eq2")
    with pytest.raises(ConfigurationError, match="did you mean 'neurecover'"):
        FITNESSES.parse("fitness", "neurecovery")
