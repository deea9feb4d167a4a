"""Comparison of the expected calibration errors of two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.release.model_pair import ModelPair

BINS = 15  # as in torchmetrics
RESAMPLES = 1000


@dataclass(frozen=True)
class Calibration(FlipCounts):
    """Counts of flips, and expected calibration errors, in [0, 1].

    Attributes:
        before: error of the old model, in `BINS` bins of equal width.
        after: error of the new model.
        excess: by how much an upper confidence limit on the rise exceeds the rise of the samples.
    """

    before: float
    after: float
    excess: float

    @classmethod
    def of_pair(cls, pair: ModelPair, rows: Tensor, confidence: float) -> Calibration:
        """Compares the models on the samples in a mask, `N` bool, by a bootstrap.

        Raises:
            ConfigurationError: a model has no confidence for a sample.
        """
        confidences = torch.stack([pair.before.confidence, pair.after.confidence])[:, rows]
        n_missing = confidences.isnan().sum(1).tolist()
        if any(n_missing):
            raise ConfigurationError(
                "the rule `calibration` needs the column `confidence`, which is missing for "
                f"{n_missing[0]:,} samples of the old model and {n_missing[1]:,} of the new one.",
                "give the probability of the predicted class, as `predictions.csv` of a "
                "ReleaseGate has it; tasks that are not multiclass or binary have none.",
            )
        gaps = torch.stack([pair.before.right, pair.after.right])[:, rows].double() - confidences
        edges = torch.linspace(0, 1, BINS + 1)[1:-1]
        # The bins of the new model follow those of the old one.
        bins = torch.bucketize(confidences, edges, right=True) + torch.tensor([[0], [BINS]])
        n = gaps.shape[1]

        def gap_by_bin(drawn: Tensor) -> Tensor:
            sums = bins[:, drawn].flatten().bincount(gaps[:, drawn].flatten(), 2 * BINS)
            return sums.view(2, BINS) / n

        observed = gap_by_bin(torch.arange(n))
        generator = torch.Generator().manual_seed(0)
        resampled = torch.stack(
            [gap_by_bin(torch.randint(n, (n,), generator=generator)) for _ in range(RESAMPLES)]
        )
        old, new = resampled.unbind(1)
        rises = (new.abs() - old.abs()).sum(1)
        # Noise in a bin counts as an error of the old model, up to this amount, but is hidden in
        # the new one by a real error. Noise that both models share does not matter.
        noise = torch.minimum((old - observed[0]).abs().mean(0), (old - new).abs().mean(0))
        excess = noise.sum() + rises.quantile(confidence) - rises.mean()
        errors = observed.abs().sum(1).tolist()
        return cls(
            **vars(pair.flips.counts(rows)), before=errors[0], after=errors[1], excess=float(excess)
        )
