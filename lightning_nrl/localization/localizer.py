"""The base class of localizers, their result, the registry, and two baselines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.data import Source
from lightning_nrl.errors import EmptyLocalizationError, check_whole
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace

Chunk: TypeAlias = Any
"""Some samples of a recording: `rows`, their rows in the results, and `target`, their targets."""


@dataclass(frozen=True)
class Localization:
    """Weights to search (paper, section II.1, step ii).

    `sizes` maps names to numbers of weights: `localized` weights, and all weights of the layers
    (`total`). Localizers such as `NeuRecoverLite` remove the weights that matter for passed samples
    (`passed`) from the weights that matter for failed samples (`failed`). These localizers also
    give the sizes of both sets and of the intersection (`both`).
    """

    weights: Tensor  # K int64: ascending positions in the flat vector (`ParameterSpace`)
    # Number of weights with top impacts that were compared; for `NeuRecoverLite` the size N_g of
    # each set.
    n_g: int
    requested: int | None  # requested number of weights (#lw); None if no number was requested
    sizes: dict[str, int]


class Replay(Protocol):
    """Recording of the model on known data, to compute logits again with edited layer outputs."""

    @property
    def space(self) -> ParameterSpace:
        """The layers to repair."""

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterable[Chunk]:
        """Yields chunks of at most `size` samples; None means no maximum size.

        `keep`, `N` bool, marks the samples (rows of the results) to include; None means all.
        """

    def replay(
        self, chunk: Chunk, edit: Callable[[LayerRef, Tensor, Tensor], Tensor], copies: int = 1
    ) -> Tensor:
        """Computes the logits of a chunk of n samples.

        `edit(site, input, output)` replaces the output of each layer. At the first layer it gets
        tensors of n samples and must return an output for `copies * n` samples, copy by copy. At
        later layers it gets and returns tensors of `copies * n` samples. The logits have `copies *
        n` rows.
        """


@dataclass(frozen=True)
class KnownData:
    """The known data, and the model's results on them."""

    evaluator: Evaluator
    sources: Sequence[Source]  # this rank's share of the known data
    before: SampleResults  # results of the model before the repair
    space: ParameterSpace  # the layers whose weights are localised


class Localizer(ABC):
    """Base class of localizers, which choose the weights to search.

    Your own localizer is a frozen dataclass with a `__call__`.

    Attributes:
        include_bias: True if biases may be chosen too. `recording.space` then contains the biases.
    """

    include_bias: bool = False

    @abstractmethod
    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        """Chooses the weights to search, the same on every rank.

        Args:
            recording: recording of the model on the known data of this rank.
            evaluator: supplies the task and the communication between ranks.
            failed: mask of the samples to repair (I_neg), `N` bool, with one entry per row of the
                results.
            passed: mask of the samples to keep (I_pos), `N` bool, with one entry per row of the
                results.

        Raises:
            EmptyLocalizationError: no weight qualifies.
        """

    def on(self, known: KnownData) -> Localizer:
        """Returns the localizer to call for the known data. By default it is this localizer."""
        return self

    def in_trainer(self, trainer: Any, failing: Sequence[str] | None) -> Localizer:
        """Returns the localizer with what it takes from a Trainer, such as a record of training.

        It is called before the training, to check a repair, with the names of the splits that have
        failures (`failing`), and after the training with None.
        """
        return self


LOCALIZERS: Registry[Localizer] = Registry(
    "Localizer",
    "NeuRecoverLite()",
    lambda value: isinstance(value, Localizer),
    on_demand={
        "arachne": "lightning_nrl.published:Arachne",
        "arachne-v2": "lightning_nrl.published:ArachneV2",
        "neurecover": "lightning_nrl.published:NeuRecover",
    },
    group="localizers",
)
"""Registry of localizers by name."""


def make_localization(weights: Tensor, n_g: int, requested: int | None, total: int) -> Localization:
    """Builds a `Localization`; raises an `EmptyLocalizationError` if `weights` is empty."""
    if not len(weights):
        raise EmptyLocalizationError(
            "`localizer` leaves no weight: none has an impact on the failed data.",
            "choose another layer: this one does not affect the predictions of these samples.",
        )
    sizes = {"localized": len(weights), "total": total}
    return Localization(weights.to(torch.int64), n_g, requested, sizes)


def check_numbers(**numbers: int | None) -> None:
    """Raises a `ConfigurationError` unless each number is None or a whole number of at least 1."""
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number, 1)


def default_n_weights(total: int) -> int:
    """Returns the default number of weights to localise: a tenth of `total`, from 32 to 309.

    The limits are from Table II of the paper (32 in EXP-C1, 309 in EXP-A1). The result may exceed a
    small `total`.

    Example:
        >>> [default_n_weights(total) for total in (224, 640, 589_824)]
        [32, 64, 309]
    """
    return min(max(total // 10, 32), 309)


@LOCALIZERS.register("all")
@dataclass(frozen=True)
class AllWeights(Localizer):
    """Chooses every weight of the layers, and every bias if `include_bias` is True."""

    include_bias: bool = False

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        total = recording.space.size
        weights = torch.arange(total, device=recording.space.device)
        sizes = {"failed": total, "passed": 0, "both": 0, "localized": total, "total": total}
        return Localization(weights, total, None, sizes)


@LOCALIZERS.register("random")
@dataclass(frozen=True)
class RandomWeights(Localizer):
    """Draws weights uniformly at random, independently of the data.

    Attributes:
        n_weights: number of weights to draw; None: `default_n_weights`. If the layers have fewer,
            all are drawn.
        seed: seed of the draw, from 0 to 2^32 - 1. The repair's seed has no effect.
        include_bias: True to draw biases too.
    """

    n_weights: int | None = None
    seed: int = 0
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)
        check_whole("seed", self.seed, 0, 2**32 - 1)

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        space = recording.space
        wanted = self.n_weights or default_n_weights(space.size)
        # On the CPU, so that every device and every rank draws the same weights.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(space.size, generator=generator)[:wanted].sort().values
        return make_localization(drawn.to(space.device), len(drawn), wanted, space.size)
