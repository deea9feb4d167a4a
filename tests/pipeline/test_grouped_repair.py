"""A repair of samples in groups, from the column in a batch to the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from options import with_options
from toy_repairs import QUICK, blobs, known, mlp, quick, trained, unseen

from lightning_nrl import RepairReport, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.stats import limit_at_level, upper_limit
from lightning_nrl.methods import Auto
from lightning_nrl.updates import OldModel


def in_groups(source: TensorSource, size: int = 5, first: int = 0) -> TensorSource:
    """Gives `size` samples in a row one group."""
    return replace(source, extras=(first + torch.arange(len(source)) // size,))


def repaired(settings: Settings, **data: Any) -> RepairReport:
    return repair_module(
        trained(), [in_groups(source) for source in known()], settings, **data
    ).report


def test_calibration_and_unseen_data_are_counted_by_group():
    calibration = in_groups(TensorSource(*blobs(200, 0.0, 7), split="calibration"), first=100)
    later = [in_groups(source, first=200) for source in unseen()]
    settings = quick(groups=2, gate="tolerance:20%", method="convex")
    report = repaired(settings, calibration=[calibration], unseen=later)
    assert report.status == "repaired"
    split = {split.split: split for split in report.splits}["calibration"]
    units = split.counts.groups
    assert units is not None
    assert 0 < units.broken <= split.broken
    assert units.passed <= 40
    bounds = report.bounds
    assert bounds is not None
    assert bounds.by_group
    assert (bounds.broken, bounds.n) == (units.broken, units.passed)
    limit = limit_at_level(units.broken, units.passed, 0.05 / bounds.states)
    assert bounds.upper == pytest.approx(limit, abs=1e-12)
    assert f"broken {units.broken} of {units.passed} groups" in report.to_markdown()
    assert report.unseen_groups == report.splits[-1].counts.groups
    assert report.unseen_groups is not None
    assert report.unseen_limit == upper_limit(
        report.unseen_groups.broken, report.unseen_groups.passed
    )
    assert RepairReport.from_json(report.to_json()).unseen_groups == report.unseen_groups
    without_groups = repaired(replace(settings, samples=quick().samples), calibration=[calibration])
    assert without_groups.bounds is not None
    assert without_groups.bounds.n == split.passed
    assert "groups" not in without_groups.to_dict()["splits"][0]


def test_a_group_in_two_unseen_splits_counts_once():
    x, y = blobs(40, 1.5, 2)
    later = [
        TensorSource(x[rows], y[rows], split, extras=(torch.arange(20) // 2,))
        for split, rows in (("later", slice(0, 20)), ("night", slice(20, 40)))
    ]
    report = repaired(quick(groups=2), unseen=later)
    assert report.unseen is not None
    units = report.unseen.counts.groups
    assert units is not None
    assert max(split.counts.units.passed for split in report.unseen_splits) <= units.passed <= 10


def test_an_update_counts_groups_that_break_since_the_replaced_model():
    settings = quick(groups=2, method="swarm")
    later = [in_groups(source) for source in unseen()]
    report = repaired(settings, unseen=later, reference=OldModel(trained(seed=1)))
    assert report.unseen is not None
    final = report.update[-1].final
    assert final.split == "later"
    assert report.unseen.counts == final.counts
    assert final.counts.groups is not None
    assert report.unseen_groups == final.counts.groups


def test_the_default_reports_held_out_groups_and_no_near_copies():
    arguments = with_options({**QUICK, "method": Auto(QUICK["method"]), "groups": 2})
    report = repaired(Settings(**arguments))
    assert report.held_out is not None
    assert report.held_out.groups is not None
    assert not report.near_copies
    assert "groups with passed samples broken" in report.to_markdown()


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("is_video", [False, True])
def test_near_copies_are_found_where_no_groups_are_given(is_video, groups):
    """Frames of a video differ little from each other; independent samples differ."""
    train, new = known(n=240)
    if is_video:
        x = new.inputs[:20].repeat_interleave(6, 0)
        x += 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        new = replace(new, inputs=x, targets=new.targets[:20].repeat_interleave(6))
    sources = [in_groups(train), in_groups(new, 6, 1000)]
    arguments = with_options({**QUICK, "method": Auto(QUICK["method"]), "groups": groups})
    report = repair_module(trained(mlp), sources, Settings(**arguments)).report
    assert report.held_out is not None
    assert report.near_copies == (is_video and groups is None)
    assert ("samples=SampleOptions(groups=...)" in report.to_markdown()) == report.near_copies
