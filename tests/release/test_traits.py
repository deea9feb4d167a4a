"""What broken samples have in common is named, and chance is not."""

from __future__ import annotations

import torch
from sample_tables import sample_table
from torch import Tensor

from lightning_nrl.release import Identity, ModelPair, parse_rules
from lightning_nrl.release.release_report import Criteria, make_report
from lightning_nrl.release.traits import MAX_TRAITS, common_traits


def pair_of(label: Tensor, prediction: Tensor, slices: str = "") -> ModelPair:
    """An old model that is always right, and a new one with these predictions."""
    names = tuple(sorted(set(slices)))
    before, after = (
        sample_table((guess == label).tolist(), {"test": len(label)}, label=label, prediction=guess)
        for guess in (label, prediction)
    )
    group = torch.tensor([names.index(name) for name in slices] or [-1] * len(label))
    return ModelPair(before, after, names, group)


def test_a_slice_and_a_confusion_are_named():
    label = torch.arange(200) % 4
    prediction = label.clone()
    at_night = torch.arange(200) < 40
    prediction[at_night & (label == 3)] = 2  # 10 samples
    traits = common_traits(pair_of(label, prediction, "n" * 40 + "d" * 160))
    # The shares C(40, 10) and C(50, 10) of C(200, 10), times 2 for two kinds and 6 for 2 slices and
    # 4 labels; 1/3^10, times 2 and 3 for the other classes.
    assert traits == (
        "test: slice 'n': 10 of 10 broken samples, 40 of 200 that were right (p = 5e-07)",
        "test: label 3: 10 of 10 broken samples, 50 of 200 that were right (p = 5e-06)",
        "test: 3 taken for 2: 10 of its 10 broken samples (p = 0.0001)",
    )


def test_a_label_whose_broken_samples_go_everywhere_has_no_confusion():
    label = torch.arange(400) % 10
    prediction = torch.where(label == 3, (label + 1 + torch.arange(400) // 10 % 9) % 10, label)
    [trait] = common_traits(pair_of(label, prediction, "".join(map(str, label.tolist()))))
    assert trait.startswith("test: slice '3': 40 of 40 broken samples")  # not label 3 once more


def test_chance_is_not_named():
    n_named = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(0, 5, (300,), generator=generator)
        shift = torch.randint(1, 5, (300,), generator=generator)
        is_broken = torch.rand(300, generator=generator) < 0.1
        prediction = torch.where(is_broken, (label + shift) % 5, label)
        slices = "".join("abc"[i] for i in torch.randint(0, 3, (300,), generator=generator))
        n_named += bool(common_traits(pair_of(label, prediction, slices)))
    assert n_named <= 5


def test_there_are_at_most_five_lines_and_none_without_broken_samples():
    label = torch.arange(1000) % 20
    prediction = torch.where(label < 8, label + 1, label)
    assert len(common_traits(pair_of(label, prediction))) == MAX_TRAITS
    assert common_traits(pair_of(label, label)) == ()


def test_a_task_without_classes_has_slices_alone():
    passed = [True] * 90 + [False] * 10
    none = torch.full((100,), -1)
    before, after = (
        sample_table(flags, {"test": 100}, label=none, prediction=none)
        for flags in ([True] * 100, passed)
    )
    group = (torch.arange(100) >= 88).long()
    [trait] = common_traits(ModelPair(before, after, ("day", "night"), group))
    assert trait.startswith("test: slice 'night': 10 of 10 broken samples, 12 of 100")


def test_the_report_of_a_refusal_shows_them():
    label = torch.arange(200) % 4
    pair = pair_of(label, torch.where(label == 3, 2, label))
    identity = Identity("model")
    reports = [
        make_report(pair, Criteria([rule]), old=identity, new=identity, task="", precision="")
        for rule in parse_rules(["instance", "tolerance:50"])
    ]
    refused, accepted = reports
    assert "3 taken for 2: 50 of its 50 broken samples" in refused.to_markdown()
    assert (accepted.status, accepted.traits) == ("accepted", ())
