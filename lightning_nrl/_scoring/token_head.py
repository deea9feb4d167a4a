"""Tokens in front of a last Linear layer: which sequences pass, without padding and without tokens that are decided."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nrl._scoring.head_scorer import MAX_UNDECIDED_SHARE, HeadScorer, make_head_scorer
from lightning_nrl._scoring.sparse_delta import LayerDelta
from lightning_nrl.tasks import Sequence, Task

__all__ = ["TokenHead", "is_plain_sequence", "make_token_head"]


def is_plain_sequence(task: Task) -> bool:
    """Whether passed means what it does in `Sequence`, with classes last, without anything of the user's."""
    if not isinstance(task, Sequence) or task.class_dim != -1:
        return False
    own, plain = type(task), Sequence
    rules = ((t.passed, t.margin, t.elements_passed, t.elements_margin, t.elements, t.labels) for t in (own, plain))
    return next(rules) == next(rules)


@dataclass(frozen=True)
class TokenHead:
    """`n` sequences in front of a last layer whose output is the model's: their `M` tokens that are not ignored.

    Logits are computed as for whole sequences, so that the same tokens are right; the logits of `HeadScorer` may
    differ from these by rounding, and serve to tell which tokens no candidate of a call can change.
    """

    head: HeadScorer  # the tokens as samples
    base: Tensor  # U x M, old logits of the changed classes
    true_logit: Tensor  # M, the true class's old logit
    is_true: Tensor  # U x 1 x M bool, which of the changed classes is the true one
    lead: Tensor  # M, the lead that a right token must be above
    sequence: Tensor  # M int64, ascending, which sequence a token belongs to
    allowed: Tensor  # n int64, how many tokens of each sequence may be wrong

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        own = (self.base, self.true_logit, self.is_true, self.lead, self.sequence)
        return self.head.nbytes + sum(x.nbytes for x in own)

    def passed(self, values: Tensor) -> Tensor:
        """Which sequences pass, `P x n` bool, of candidates `P x K`."""
        if values.device.type != "cpu":  # To leave decided tokens out, the host has to learn which those are.
            return self._wrong(values) <= self.allowed
        right, wrong = self.head.decided(values)
        n_wrong = self._per_sequence(wrong[None])[0]
        n_open = self._per_sequence(~(right | wrong)[None])[0]
        # Sequences that have too many wrong tokens, or will not have them whatever comes, are decided too.
        undecided = (n_wrong <= self.allowed) & (n_wrong + n_open > self.allowed)
        tokens = (~(right | wrong) & undecided[self.sequence]).nonzero().flatten()
        if len(tokens) > MAX_UNDECIDED_SHARE * len(right):
            return self._wrong(values) <= self.allowed
        passed = (n_wrong <= self.allowed) & ~undecided
        if not len(tokens):
            return passed.expand(len(values), -1)
        return passed | (undecided & (self.subset(tokens)._wrong(values) + n_wrong <= self.allowed))

    def subset(self, tokens: Tensor) -> TokenHead:
        """Some of the tokens, `int64`, ascending, of the same sequences."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and name != "allowed"}
        some = {name: x.index_select(-1, tokens) for name, x in tensors.items()}
        return replace(self, head=self.head.subset(tokens), **some)

    def _wrong(self, values: Tensor) -> Tensor:
        """How many tokens of each sequence are wrong, `P x n` int64."""
        head = self.head
        z = head.delta.changed_units(values, head.gathered, self.base)  # U x P x M
        moved = z.gather(0, head.true_unit.expand(1, *z.shape[1:]))[0]
        own = torch.where(head.true_changes > 0, moved, self.true_logit)
        best = z.masked_fill_(self.is_true, -torch.inf).amax(0).maximum(head.fixed_max)
        return self._per_sequence(~(own - best > self.lead))

    def _per_sequence(self, tokens: Tensor) -> Tensor:
        """How many tokens of each sequence, `p x n` int64, a mask `p x M` chooses."""
        n, ends = len(self.allowed), self.ends
        if not tokens.shape[1]:
            return tokens.new_zeros(len(tokens), n, dtype=torch.int64)
        before = tokens.cumsum(1)[:, (ends - 1).clamp_min(0)] * (ends > 0)
        return before.diff(dim=1, prepend=before.new_zeros(len(before), 1))

    @property
    def ends(self) -> Tensor:
        """Where each sequence's tokens end, `n` int64."""
        numbers = torch.arange(len(self.allowed), device=self.sequence.device)
        return torch.searchsorted(self.sequence, numbers, right=True)


def make_token_head(
    task: Sequence, delta: LayerDelta, x: Tensor, y: Tensor, target: Tensor, reserve: Tensor | None = None
) -> TokenHead:
    """Prepares sequences of layer inputs `n x T x I`, old logits `n x T x C`, labels and margins to keep, `n`."""
    elements = task.elements(y, target)
    sequence, place = elements.counts.nonzero().unbind(1)
    x, y, label = x[sequence, place], y[sequence, place], elements.label[sequence, place]
    # A right token's lead is above 0 and at least the reserve: above the number just below that.
    lead = y.new_zeros(len(y))
    if reserve is not None:
        least = reserve[sequence]
        lead = torch.where(least <= 0, 0.0, least.nextafter(least.new_tensor(-torch.inf)))
    gathered = delta.gather(x, y)
    units = delta.units
    return TokenHead(
        make_head_scorer(delta, gathered, y, label, lead.to(y.dtype)),
        base=gathered.base[0].t().contiguous(),
        true_logit=y.gather(1, label[:, None])[:, 0],
        is_true=(units[:, None] == label)[:, None],
        lead=lead,
        sequence=sequence,
        allowed=task.allowed_wrong(elements),
    )
