from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import ConfigurationError
from lightning_nrl.updates import Oversampler

PASSED = torch.tensor([True, True, True, False, True])
MARGIN = torch.tensor([8.0, 2.9, 10.0, -1.0, 8.0])


def test_failed_and_near_border_samples_come_more_often() -> None:
    # The median margin of the passed samples is 8, and 3/8 of it are 3.
    sampler = Oversampler(PASSED, MARGIN, oversample=3)
    assert sampler.times.tolist() == [1, 3, 1, 3, 1]
    assert len(sampler) == 9
    assert Counter(sampler) == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert Oversampler(PASSED, oversample=2).times.tolist() == [1, 1, 1, 2, 1]
    unknown = torch.full((5,), math.nan)
    assert Oversampler(PASSED, unknown, oversample=2).times.tolist() == [1, 1, 1, 2, 1]
    assert Oversampler(~torch.ones(2, dtype=torch.bool), torch.zeros(2)).times.tolist() == [3, 3]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-5, 20)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_epoch_has_each_sample_as_often_as_it_says(rows: Any, oversample: int, seed: int) -> None:
    passed, margin = torch.tensor([p for p, _ in rows]), torch.tensor([m for _, m in rows])
    first, again = (Oversampler(passed, margin, oversample, seed) for _ in range(2))
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(again) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(first)
        assert Counter(epoch) == {i: int(n) for i, n in enumerate(first.times)}
    again.set_epoch(1)
    assert list(again) == epochs[1]
    assert (first.times[~passed] == oversample).all()
    assert set(first.times.tolist()) <= {1, oversample}


class Tagged(TensorDataset):
    """Gives mappings, as text data sets do."""

    def __getitem__(self, at: int) -> Any:
        x, y = super().__getitem__(at)
        return {"x": x, "labels": y, "more": [x]}


@pytest.mark.parametrize("kind", [TensorDataset, Tagged])
def test_one_pass_of_a_model_over_the_data_tells_what_is_hard(kind: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2, bias=False))
    model[1].load_state_dict({"weight": torch.eye(2)})
    x = torch.tensor([[8.0, 0.0], [0.0, 8.0], [8.0, 0.0], [2.0, 0.0], [0.0, 1.0], [math.nan, 0.0]])
    data = kind(x, torch.tensor([0, 1, 0, 0, 0, 0]))
    state, draws = torch.get_rng_state(), model.training
    sampler = Oversampler.of(model, data, oversample=2, batch_size=4)
    assert sampler.times.tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == draws
    assert sum(len(batch["x"] if kind is Tagged else batch[0]) for batch in DataLoader(data, 2, sampler=sampler)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passed": torch.ones(3)}, "is no tensor of one bool a sample"),
        ({"margin": torch.ones(4)}, r"`margin` has the shape \[4\], `passed` \[5\]"),
        ({"oversample": 1.5}, "`oversample=1.5` is out of range"),
        ({"oversample": 0}, "`oversample=0` is out of range"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Oversampler(**{"passed": PASSED, "margin": MARGIN, **arguments})
