"""Random numbers for many swarms: each swarm's own, in whatever company."""

from __future__ import annotations

import pytest
import torch

from lightning_nrl.search import RandomStreams
from lightning_nrl.search.rng import CountedNumbers, _mixed

CPU = torch.device("cpu")


def counted(seeds: list[int], sizes: list[int] | None = None) -> RandomStreams:
    """As on a device."""
    return RandomStreams.counted(seeds, CPU, sizes)


def generated(seeds: list[int], sizes: list[int] | None = None) -> RandomStreams:
    return RandomStreams.seeded(seeds, CPU, sizes)


@pytest.mark.parametrize("streams", [counted, generated])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_swarm_draws_the_same_alone_among_others_and_under_padding(streams, kind: str) -> None:  # type: ignore[no-untyped-def]
    like = torch.zeros(0)
    many, alone = streams([3, 8, 5], [4, 2, 6]), streams([8])
    for lead in ((2,), (), (3,)):
        together = getattr(many, kind)(like, *lead, 5, 6)
        own = getattr(alone, kind)(like, *lead, 5, 2)
        assert torch.equal(together[..., 1, :, :2], own[..., 0, :, :])
        assert not together[..., 1, :, 2:].any()
    assert torch.equal(getattr(many, kind)(like, 5, 1)[1], getattr(alone, kind)(like, 5, 1)[0])
    assert many.seeds()[1] == alone.seeds()[0] < 2**31


def test_counted_numbers_are_those_of_splitmix64() -> None:
    """Key 1234567 and the published first five numbers of that seed (Vigna's reference code)."""
    numbers = CountedNumbers(torch.tensor([1234567]))
    step = -7046029254386353131
    places = torch.arange(1, 6) * step
    found = [int(n) % 2**64 for n in _mixed(numbers.keys + places)]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counted_numbers_have_the_moments_that_they_should(dtype: torch.dtype) -> None:
    numbers = CountedNumbers.seeded([0, 1], CPU)
    uniform, normal = (getattr(numbers, kind)(4, 100, 100, dtype=dtype).double() for kind in ("uniform", "normal"))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    for x, moments in ((uniform - 0.5, (0.0, 1 / 12, 0.0, 1 / 80)), (normal, (0.0, 1.0, 0.0, 3.0))):
        for order, moment in enumerate(moments, 1):
            assert abs(float((x**order).mean()) - moment) < 6 * float((x ** (2 * order)).mean() / x.numel()) ** 0.5
        flat = x.flatten(1)
        for a, b in ((x[:, 0], x[:, 1]), (x[0], x[1]), (x[..., 1:, :], x[..., :-1, :]), (flat[:, 1:], flat[:, :-1])):
            assert abs(float((a * b).mean())) < 6 * float(x.square().mean()) / a.numel() ** 0.5
    assert len(uniform.unique()) > 0.99 * uniform.numel()
