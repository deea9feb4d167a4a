"""Random numbers for many swarms: each swarm's own, in whatever company."""

from __future__ import annotations

import pytest
import torch

from lightning_nrl.search import RandomStreams


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_swarm_draws_the_same_alone_among_others_and_under_padding(kind: str) -> None:
    like = torch.zeros(0)
    many, alone = RandomStreams.seeded([3, 8, 5], [4, 2, 6]), RandomStreams.seeded([8])
    for lead in ((2,), (), (3,)):
        together = getattr(many, kind)(like, *lead, 5, 6)
        own = getattr(alone, kind)(like, *lead, 5, 2)
        assert torch.equal(together[..., 1, :, :2], own[..., 0, :, :])
        assert not together[..., 1, :, 2:].any()
    assert torch.equal(getattr(many, kind)(like, 5, 1)[1], getattr(alone, kind)(like, 5, 1)[0])
    assert many.seeds()[1] == alone.seeds()[0] < 2**31
