"""From logits to what counts: which samples pass and how large their losses are, in one pass over the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nrl._scoring.sparse_delta import LayerDelta, Taps
from lightning_nrl.tasks import Multiclass, Task

__all__ = ["HeadScorer", "counted", "is_plain_multiclass", "make_head"]

WORTHWHILE = 0.75
"""Samples are only left out if at most this share of them is left."""


def is_plain_multiclass(task: Task) -> bool:
    """Whether passed, margin and loss mean arg max, its lead and cross entropy, without anything of the user's."""
    own = ("passed", "loss", "prediction", "margin")
    return all(getattr(type(task), name) is getattr(Multiclass, name) for name in own)


@dataclass(frozen=True)
class HeadScorer:
    """Samples in front of a last layer whose output is the model's: `n` samples, `U` classes with changed weights.

    Only changed classes are computed for each candidate. Of the others, what matters is the largest logit, the sum of
    exponentials, and the largest logit before and after the true class, since arg max takes the first of equals.

    Attributes:
        change: the change of the layer.
        taps: what it needs to know of the samples.
        rivals: `U x 1 x n`, old logits of the changed classes, minus infinity for the true one.
        slot: `1 x 1 x n` int64, place of the true class among the changed ones, 0 if it does not change.
        own: `n`, the true class's old logit, less the reserve.
        moves: `n`, 1 if the true class changes, else 0.
        top: `n`, the largest logit of the classes that do not change, the true one left out.
        mass: `n`, their exponentials, relative to `top`, summed.
        top_before: `n`, the largest of them before the true class.
        before: `U x 1 x n` bool, which changed classes come before the true one.
        reserve: `n`, how far above all others the true class must be for a sample to pass; None: not at all. It has no
            part in the loss.
    """

    change: LayerDelta
    taps: Taps
    rivals: Tensor
    slot: Tensor
    own: Tensor
    moves: Tensor
    top: Tensor
    mass: Tensor
    top_before: Tensor
    before: Tensor
    reserve: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.taps.nbytes + self.rivals.nbytes + self.before.nbytes

    def judge(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Passes, `P x n` bool, and losses, `P x n`, or None if they are not asked for, of candidates `P x K`."""
        z = self.change.deltas(values, self.taps)  # U x P x n
        own = torch.addcmul(self.own, self.moves, z.gather(0, self.slot.expand(1, *z.shape[1:])).squeeze(0))
        z += self.rivals
        best = torch.maximum(z.amax(0), self.top)
        passed = own > best
        tied = own == best
        if z.device.type != "cpu" or bool(tied.any()):
            before = torch.where(self.before, z, -torch.inf).amax(0).maximum(self.top_before)
            passed |= tied & (own > before)
        if not with_loss:
            return passed, None
        if self.reserve is not None:
            own = own + self.reserve
        most = torch.maximum(best, own)
        z -= most
        mass = z.exp_().sum(0).add_((own - most).exp_()).addcmul_(self.mass, (self.top - most).exp_())
        return passed, mass.log_().add_(most).sub_(own)

    def certain(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Samples whose fate is the same under all candidates `P x K`: who surely passes, who surely fails, `n` bool.

        Each weight's change lies between its least and its largest over the candidates, so each logit lies between two
        bounds. A sample is certain if the bounds of its true class and of the best rival do not meet, with room for
        rounding between them: `eps * (m + 8)` times the sum of all magnitudes, for sums of `m` products.
        """
        change = self.change.change(values, self.own.dtype)
        least, most = change.aminmax(dim=0)
        ends = torch.stack([least, most, torch.maximum(most, -least)])  # 3 x (K + 1)
        low, high, size, terms = [], [], [], 0
        for bucket, x in zip(self.change.buckets, self.taps.x, strict=True):
            d, terms = ends[:, bucket.columns].transpose(0, 1), max(terms, bucket.columns.shape[1])
            up, down = d @ x[:, 0].clamp_min(0), d @ x[:, 0].clamp_max(0)  # u x 3 x n
            low.append(up[:, 0] + down[:, 1])
            high.append(up[:, 1] + down[:, 0])
            size.append(up[:, 2] - down[:, 2])
        below, above, magnitude = torch.cat(low), torch.cat(high), torch.cat(size)
        if self.change.site.include_bias:
            moved = ends[:, self.change.bias].unsqueeze(2)
            below, above, magnitude = below + moved[0], above + moved[1], magnitude + moved[2]
        rivals, slot = self.rivals[:, 0], self.slot[0]
        own_below = self.own + self.moves * below.gather(0, slot)[0]
        own_above = self.own + self.moves * above.gather(0, slot)[0]
        best_below, best_above = ((rivals + b).amax(0).maximum(self.top) for b in (below, above))
        scale = magnitude.amax(0) + self.own.abs() + best_below.abs() + best_above.abs()
        room = scale * (2 * (terms + 8) * torch.finfo(scale.dtype).eps)
        return own_below > best_above + room, own_above + room < best_below

    def only(self, samples: Tensor) -> HeadScorer:
        """Some of the samples, `int64`."""

        def some(x: Tensor) -> Tensor:
            return x.index_select(-1, samples)

        taps = Taps(tuple(map(some, self.taps.x)), self.taps.base[:, samples], self.taps.rounded[:, samples])
        tables = (self.rivals, self.slot, self.own, self.moves, self.top, self.mass, self.top_before, self.before)
        reserve = None if self.reserve is None else some(self.reserve)
        return replace(HeadScorer(self.change, taps, *map(some, tables)), reserve=reserve)

    def survivors(self, values: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """How many samples each candidate, `P x K`, passes, and what these weigh, `P` each.

        Samples whose fate is certain are not computed.

        Args:
            values: `P x K`.
            weight: `n`; None: no weights are asked for.
        """
        pass_all, fail_all = self.certain(values)
        open_ = (~(pass_all | fail_all)).nonzero().flatten()
        if len(open_) > WORTHWHILE * len(pass_all):
            return counted(self.judge(values, with_loss=False)[0], weight)
        sure = [None if x is None else x.expand(len(values)) for x in counted(pass_all[None], weight)]
        if len(open_):
            some = None if weight is None else weight[open_]
            found = counted(self.only(open_).judge(values, False)[0], some)
            sure = [None if x is None or y is None else x + y for x, y in zip(found, sure, strict=True)]
        assert sure[0] is not None
        return sure[0], sure[1]


def counted(passed: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """How many of `P x n` samples pass, `P`, and what these weigh; None without weights, `n`."""
    return passed.sum(1), None if weight is None else torch.where(passed, weight, 0.0).sum(1)


def make_head(change: LayerDelta, taps: Taps, y: Tensor, target: Tensor, reserve: Tensor | None = None) -> HeadScorer:
    """Prepares samples for `HeadScorer.judge`.

    Args:
        change: the change of the last layer, some units of it.
        taps: what it needs to know of the samples.
        y: `n x C`, logits under the weights as they are.
        target: `n` int64, true classes.
        reserve: `n`, the margin that a sample must keep to pass; None: any.
    """
    n, c = y.shape
    units = change.units
    place = torch.full((c,), -1, device=y.device).index_copy(0, units, torch.arange(len(units), device=y.device))
    slot = place[target]
    classes = torch.arange(c, device=y.device)
    rest = y.index_fill(1, units, -torch.inf).scatter(1, target.unsqueeze(1), -torch.inf)
    top = rest.amax(1)
    mass = torch.where(top.isneginf(), 0.0, (rest - top.unsqueeze(1)).exp().sum(1))
    rivals = y.scatter(1, target.unsqueeze(1), -torch.inf)[:, units].t().contiguous().unsqueeze(1)
    top_before = rest.masked_fill(classes >= target.unsqueeze(1), -torch.inf).amax(1)
    own = y.gather(1, target.unsqueeze(1)).squeeze(1)
    return HeadScorer(
        change,
        taps,
        rivals,
        slot.clamp_min(0).view(1, 1, n),
        own if reserve is None else own - reserve,
        (slot >= 0).to(y.dtype),
        top,
        mass,
        top_before,
        (units.unsqueeze(1) < target).unsqueeze(1),
        reserve,
    )
