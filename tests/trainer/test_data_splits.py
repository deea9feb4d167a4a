"""Which data are known: samples that are held out and known too are found, however the data sets are put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_package import LightningModule, Trainer
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_nrl._trainer.data_splits import DataOptions, DataRequest, SplitLoaders
from lightning_nrl._trainer.loaders import make_source
from lightning_nrl.data.sample_identity import Identified, is_among
from lightning_nrl.errors import ConfigurationError

DATA = TensorDataset(torch.arange(20.0)[:, None], torch.zeros(20))
OTHER = TensorDataset(torch.arange(100.0, 110.0)[:, None], torch.zeros(10))
FAILED = TensorDataset(torch.zeros(3, 1), torch.zeros(3))
TRAINER, MODEL = Trainer(logger=False, enable_checkpointing=False), LightningModule()


def loader(dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
    return DataLoader(dataset, 4, **arguments)


WAYS = {
    "overlapping subsets": (Subset(DATA, range(10)), Subset(DATA, range(8, 14)), 2),
    "the whole and a part": (DATA, Subset(DATA, [3, 5]), 2),
    "a part and the whole": (Subset(DATA, [3, 5]), DATA, 2),
    "a union": (Subset(DATA, range(10)), ConcatDataset([OTHER, Subset(DATA, [2])]), 1),
    "a part of a union": (DATA, Subset(ConcatDataset([OTHER, DATA]), [9, 10, 11]), 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_calibration_data_that_are_known_too_are_refused(way: str) -> None:
    known, held_out, common = WAYS[way]
    request = DataRequest(DataOptions(loader(known), loader(FAILED)), calibration=loader(held_out))
    with pytest.raises(ConfigurationError, match=f"`calibration`: {common} of its {len(held_out)} samples are in"):
        request.find(SplitLoaders(TRAINER, MODEL))


def test_a_sampler_says_which_samples_are_meant() -> None:
    first, second = (loader(DATA, sampler=SubsetRandomSampler(range(*own))) for own in ((0, 10), (10, 20)))
    request = DataRequest(DataOptions(first, loader(FAILED)), calibration=second)
    assert request.find(SplitLoaders(TRAINER, MODEL)).calibration == (second, "calibration")


@pytest.mark.parametrize("way", WAYS)
def test_unseen_data_are_refused_only_if_all_of_them_are_known(way: str) -> None:
    known, held_out, common = WAYS[way]
    request = DataRequest(DataOptions(loader(known), loader(FAILED)), unseen=loader(held_out))
    if common == len(held_out):
        with pytest.raises(ConfigurationError, match="`unseen`: 2 of its 2 samples are in `passed` too"):
            request.find(SplitLoaders(TRAINER, MODEL))
        return
    found = request.find(SplitLoaders(TRAINER, MODEL)).unseen
    assert found is not None
    sources = [make_source(own, "split", trainer=TRAINER, model=MODEL) for own in (loader(known), found[0])]
    assert all(isinstance(source, Identified) for source in sources)
    assert int(is_among(sources[1].identity, sources[0].identity).sum()) == common


def test_two_loaders_of_the_same_samples_are_one_split() -> None:
    first, second = (loader(Subset(DATA, [4, 6])) for _ in range(2))
    loaders = SplitLoaders(TRAINER, MODEL)
    known, *_ = DataRequest(DataOptions(first, second)).sources(loaders, seed=0, limit=None)
    assert [(source.passed, source.failed, len(source.index)) for source in known] == [(True, True, 2)]
