from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from two_models import Given

from lightning_nrl import ConfigurationError
from lightning_nrl.serving import UNKNOWN, WeightedEnsemble, choose_weight

INF, NAN = float("inf"), float("nan")


def ensemble(weight: float, classes: Any = None) -> WeightedEnsemble:
    """An ensemble that is called with the logits of both models."""
    return WeightedEnsemble(Given(0), Given(1), weight, classes)


def logits(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


OLD, NEW = logits([0.6, 0.3, 0.1], [0.2, 0.2, 0.6]), logits([0.2, 0.7, 0.1], [0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0, [[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]]),
        (0.25, [[0.3, 0.6, 0.1], [0.425, 0.2375, 0.3375]]),
        (1, [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]),
    ],
)
def test_probabilities_are_averaged(weight: float, expected: list[list[float]]) -> None:
    served = ensemble(weight)(OLD, NEW)
    torch.testing.assert_close(served.exp(), torch.tensor(expected))


def test_inputs_are_passed_by_position_and_by_name() -> None:
    assert torch.equal(ensemble(0.3)(OLD, new=NEW), ensemble(0.3)(OLD, NEW))


def test_a_class_that_the_old_model_does_not_know_has_the_new_models_share() -> None:
    old, new = logits([0.5, 0.5]), logits([0.2, 0.2, 0.6])
    served = ensemble(0.5, {0: 2, 1: 0})(old, new)
    torch.testing.assert_close(served.exp(), torch.tensor([[0.35, 0.1, 0.55]]))
    assert bool((served > UNKNOWN).all())


def test_half_precision_is_averaged_in_float32() -> None:
    model = ensemble(0.3).half()
    served = model(OLD.half(), NEW.half())
    assert served.dtype == torch.float32
    assert bool(served.isfinite().all())


def test_it_stays_in_evaluation_mode_and_exports() -> None:
    torch.manual_seed(0)
    old, new = (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)) for _ in range(2))
    model, x = WeightedEnsemble(old, new, 0.4), torch.randn(6, 4)
    assert not model.train().training
    assert not old[1].training
    served = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), served)
    again = WeightedEnsemble(*(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)) for _ in range(2)), weight=0)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), served)
    assert "weight=0.4" in repr(again)


@pytest.mark.parametrize("weight", [-0.1, 1.1, NAN, True, "much"])
def test_a_weight_that_is_no_share_is_refused(weight: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`weight=.*` is no share of the old model"):
        ensemble(weight)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`new='new\.ckpt'` is no module"):
        WeightedEnsemble(nn.Linear(2, 2), "new.ckpt", 0.5)  # type: ignore[arg-type]


def test_classes_that_do_not_fit_are_refused_when_it_runs() -> None:
    with pytest.raises(ConfigurationError, match="the old model has 2 classes, the new one 3"):
        ensemble(0.5)(logits([0.5, 0.5]), NEW)


# Old right on the first two, new right on the last two; the second pair sees both ways.
CALIBRATION = (
    logits([0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.45, 0.55]),
    logits([0.4, 0.6], [0.3, 0.7], [0.6, 0.4], [0.9, 0.1]),
    torch.tensor([0, 0, 0, 0]),
)


def test_the_most_accurate_weight_is_chosen() -> None:
    choice = choose_weight(*CALIBRATION)
    # Right are: the first from weight 0.2 on, the second from 0.34, the third to 0.19, the fourth to 0.88.
    counts = {point.weight: (point.counts.repaired, point.counts.broken) for point in choice.curve}
    assert counts[0.0] == (2, 2)
    assert counts[0.15] == (2, 2)
    assert counts[0.3] == (1, 1)
    assert counts[0.65] == (1, 0)
    assert counts[1.0] == (0, 0)
    assert (choice.weight, choice.chosen.counts.right, choice.limit) == (0.85, 3, "")
    assert "The most accurate: 0.85." in choice.render(80)


def test_a_limit_is_kept() -> None:
    assert choose_weight(*CALIBRATION, limit="instance").weight == 0.85
    old, new, labels = CALIBRATION
    more = (torch.cat([old[1:2], old[2:]]), torch.cat([new[1:2], new[3:], new[3:]]), labels[:3])
    assert choose_weight(*more).chosen.counts.broken == 0
    choice = choose_weight(*more, limit=0)
    assert choice.chosen.counts.broken == 0
    assert choice.limit == "tolerance:0"
    assert "within 'tolerance:0'" in choice.render(80)


def test_a_model_that_returns_nan_is_left_out_at_the_end_where_the_other_answers() -> None:
    labels = torch.tensor([0])
    choice = choose_weight(logits([0.9, 0.1]), torch.tensor([[NAN, 0.0]]), labels)
    assert (choice.weight, choice.chosen.counts.right) == (1.0, 1)


@pytest.mark.parametrize(
    ("old", "said"),
    [(logits([0.5, 0.5]), "`old` is"), (torch.zeros(4, 3), "the old model has 3 classes, the new one 2")],
)
def test_what_does_not_fit_is_refused(old: Tensor, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        choose_weight(old, *CALIBRATION[1:])


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 5))
def test_counts_are_those_of_the_module_that_is_served(seed: int, n: int, n_classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, n, n_classes, generator=generator) * 3
    labels = torch.randint(n_classes, (n,), generator=generator)
    choice = choose_weight(old, new, labels)
    was = old.argmax(1) == labels
    for point in (choice.chosen, choice.curve[7]):
        now = ensemble(point.weight)(old, new).argmax(1) == labels
        assert point.counts.repaired == int((~was & now).sum())
        assert point.counts.broken == int((was & ~now).sum())
    assert choice.chosen.counts.right >= max(choice.curve[0].counts.right, choice.curve[-1].counts.right)
