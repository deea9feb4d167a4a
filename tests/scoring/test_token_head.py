"""Sequences in front of a last layer: padding and decided tokens are left out, and the counts stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lightning_nrl._model.layers import find_layers
from lightning_nrl._scoring import make_scorer, record
from lightning_nrl._scoring.sparse_delta import make_layer_deltas
from lightning_nrl._scoring.token_head import TokenHead, is_plain_sequence, make_token_head
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Segmentation, Sequence

IGNORED = -100


def token_head(
    model: nn.Linear, x: Tensor, label: Tensor, where: list[int], task: Sequence, reserve: Tensor | None = None
) -> TokenHead:
    delta = make_layer_deltas(find_layers(model, ""), torch.tensor(where))[0]
    with torch.no_grad():
        return make_token_head(task, delta, x, model(x), label, reserve)


def test_by_hand() -> None:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    # Logits are 0 and value * x: the second class leads by value * x.
    x = torch.tensor([[[1.0], [2.0], [-1.0]], [[4.0], [-4.0], [1.0]]])
    label = torch.tensor([[1, 1, IGNORED], [1, 0, 1]])
    values = torch.tensor([[-1.0], [0.0], [0.5], [2.0]])
    head = token_head(model, x, label, [1], Sequence())
    assert head.sequence.tolist() == [0, 0, 1, 1, 1]
    assert head.passed(values).tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    # The least leads are 0.5 and 0.5 under the third candidate, 2 and 2 under the fourth.
    head = token_head(model, x, label, [1], Sequence(), torch.tensor([0.5, 0.625]))
    assert head.passed(values).tolist() == [[False] * 2, [False] * 2, [True, False], [True] * 2]
    # One of two tokens may be wrong, and of three.
    head = token_head(model, x, label, [1], Sequence(0.5), torch.tensor([1.0, 1.0]))
    assert head.passed(values).tolist() == [[False] * 2, [False] * 2, [True, True], [True] * 2]


def test_no_token_is_computed_whose_fate_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
    # The second class leads by x times a value from 0.5 to 1.5, plus nothing: only where x is 0 all is open.
    x = torch.tensor([[[1.0], [2.0]], [[0.0], [3.0]], [[-1.0], [0.0]], [[5.0], [6.0]], [[7.0], [8.0]]])
    head = token_head(model, x, torch.ones(5, 2, dtype=torch.int64), [1], Sequence())
    taken = []
    subset = TokenHead.subset

    def noted(self: TokenHead, tokens: Tensor) -> TokenHead:
        taken.append(tokens.tolist())
        return subset(self, tokens)

    monkeypatch.setattr(TokenHead, "subset", noted)
    assert head.passed(torch.tensor([[0.5], [1.5]])).tolist() == [[True, False, False, True, True]] * 2
    # The third sequence has a wrong token already, so that its open one need not be computed.
    assert taken == [[2]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.3, 0.5, 1.0]),
    spread=st.sampled_from([0, 1, 3]),
    with_reserve=st.booleans(),
    bias=st.booleans(),
)
def test_whole_numbers_are_exact_down_to_ties(
    seed: int, share: float, spread: int, with_reserve: bool, bias: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    n, t, inside, classes = 9, 5, 3, 4

    def draw(*shape: int, largest: int = 2) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=g).float()

    model, x, task = nn.Linear(inside, classes, bias=bias), draw(n, t, inside), Sequence(share)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    label = torch.randint(0, classes, (n, t), generator=g)
    label[:, 1:][torch.rand(n, t - 1, generator=g) < 0.3] = IGNORED
    space = find_layers(model, "")
    where = torch.randperm(space.size, generator=g)[: int(torch.randint(1, 8, (), generator=g))]
    values = space.flat()[where] + draw(6, len(where), largest=spread)
    reserve = draw(n, largest=3) if with_reserve else None
    rows = torch.arange(n)
    cache = record(Evaluator(model, task), [(Batch((x,), label, rows), rows)], space, torch.ones(n, dtype=torch.bool))
    everyone = torch.ones(n, dtype=torch.bool)
    evaluator = Evaluator(model, task)
    scorer = make_scorer(cache, where, ~everyone, everyone, evaluator, passed_loss=False, reserve=reserve)
    assert all(part.tokens is not None for part in scorer.groups[0].passed)
    with torch.no_grad():
        outputs = [functional_call(model, space.changed(where, v), (x,)) for v in values]
    expected = torch.stack([task.passed(y, label) for y in outputs])
    if reserve is not None:
        expected &= torch.stack([task.margin(y, label) >= reserve for y in outputs])
    assert scorer(values[None]).intact.tolist() == [expected.sum(1).tolist()]


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
    x, label = torch.ones(4, 1, 1), torch.zeros(4, 1, dtype=torch.int64)
    head = token_head(model, x, label, [0], Sequence())
    values = torch.tensor([[1.0], [torch.nan], [torch.inf], [-torch.inf]])
    assert head.passed(values)[:, 0].tolist() == [True, False, True, False]


def test_who_changes_what_is_right_is_asked() -> None:
    class Strict(Sequence):
        def margin(self, output: Any, target: Any) -> Tensor:
            return super().margin(output, target) - 1

    assert is_plain_sequence(Sequence())
    assert not is_plain_sequence(Strict())
    assert not is_plain_sequence(Sequence(class_dim=1))
    assert not is_plain_sequence(Segmentation())
