"""A class for each token of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.tasks._elements import Elements, ElementsTask

__all__ = ["Sequence"]


@dataclass(frozen=True)
class Sequence(ElementsTask):
    """Token classification: a sequence is right if its tokens are, all of them or a share.

    A token is right if the logit of its class is above all others. The margin of a sequence is that of its least
    certain token, the allowed number of wrong ones left out.

    Attributes:
        share: of the tokens that are not ignored, how many must be right, above 0 to 1.
        class_dim: the dimension of the classes in the logits: -1 for `n x T x C`, 1 for `n x C x T`. Labels are
            `n x T`.
        ignore_index: the label of tokens that do not count, such as padding.

    Raises:
        ConfigurationError: on construction, for values out of range.

    Example:
        The second token is wrong, by half a logit.

        >>> logits = torch.tensor([[[0.0, 2.0], [0.5, 1.0], [3.0, 0.0]]])
        >>> labels = torch.tensor([[1, 0, -100]])
        >>> Sequence().margin(logits, labels), Sequence().passed(logits, labels)
        (tensor([-0.5000]), tensor([False]))
        >>> Sequence(share=0.5).passed(logits, labels)
        tensor([True])
    """

    share: float = 1.0
    class_dim: int = -1
    ignore_index: int = -100

    def __post_init__(self) -> None:
        check_real("Sequence.share", self.share, "share", "give a number above 0 and at most 1.", above=0, most=1)
        if self.class_dim not in (-1, 1):
            raise ConfigurationError(
                f"`Sequence.class_dim={self.class_dim!r}` is neither -1 nor 1.",
                "write -1 for logits [samples, tokens, classes], 1 for [samples, classes, tokens].",
            )

    def __str__(self) -> str:
        return f"Sequence: {'every token' if self.share == 1 else f'at least {self.share:.4g} of the tokens'} right"

    def elements_passed(self, elements: Elements, reserve: Tensor | None = None) -> Tensor:
        lead = elements.lead()
        right = lead > 0 if reserve is None else (lead > 0) & (lead >= reserve[:, None])
        # The margin is the lead in this place of the ranking, so at most so many tokens lie below.
        return (elements.counts & ~right).sum(1) <= self.allowed_wrong(elements)

    def elements_margin(self, elements: Elements) -> Tensor:
        """The least lead of a token's own class over the best other one, once the allowed wrong tokens are left out."""
        lead = torch.where(elements.counts, elements.lead(), torch.inf)
        return lead.sort(1).values.gather(1, self.allowed_wrong(elements)[:, None])[:, 0]

    def allowed_wrong(self, elements: Elements) -> Tensor:
        """How many tokens of each sample may be wrong, `n` int64: in whole numbers, so that 0.7 of 10 are 7 of them."""
        n, share = elements.counts.sum(1), Fraction(self.share).limit_denominator(10_000)
        return n - (n * share.numerator + share.denominator - 1) // share.denominator

    def classes_first(self, output: Tensor) -> Tensor:
        if output.ndim < 3 or output.shape[self.class_dim] < 2:
            shape = "[samples, tokens, classes]" if self.class_dim == -1 else "[samples, classes, tokens]"
            raise ConfigurationError(
                f"`task`: Sequence needs logits {shape}, the model returned {list(output.shape)}.",
                "return one logit for each token and each of two or more classes, or set `class_dim`.",
            )
        return output.movedim(self.class_dim, 1)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        other = -1 if self.class_dim == 1 else 1
        turned = output.movedim(other, 1)
        if (len(turned), *turned.shape[2:]) == label.shape:
            return f"write `Sequence(class_dim={other})`: the classes seem to be in that dimension."
        return super()._shapes_hint(output, label)
