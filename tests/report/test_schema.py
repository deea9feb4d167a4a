from __future__ import annotations

import json
import math

import pytest

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report import RepairReport, SliceReport, SplitReport
from lightning_nrl.report.schema import SCHEMA, UPGRADES


def report() -> RepairReport:
    split = SplitReport("val", "known", TargetCounts(5, 1, 2, 3, 4, 2))
    return RepairReport("repaired", "Done.", ("head",), "all", "instance", "Multiclass", (split,))


def test_there_is_a_step_from_each_version_to_the_next() -> None:
    assert len(UPGRADES) == SCHEMA == report().to_dict()["schema"]


def test_a_report_from_before_versions_is_read() -> None:
    data = report().to_dict()
    (split,) = data["splits"]
    for name in ("flipped", "confusion", "classes", "margins", "passed_in_target", "broken_in_target"):
        del split[name]
    split |= {"repaired_ids": [3, 4], "broken_ids": [9]}
    data["slices"] = [{"name": "day", "role": "known", "n": 11, "quota": None}]
    data["slices"][0] |= {"kept": 5, "broken": 1, "repaired": 2, "failing": 3, "targeted": 4, "repaired_in_target": 2}
    for name in ("schema", "class_names", "rungs", "choice", "price"):
        del data[name]
    found = RepairReport.from_json(json.dumps(data))
    assert found.splits[0].counts == TargetCounts(5, 1, 2, 3, 4, 2)
    assert (found.splits[0].repaired_ids, found.splits[0].broken_ids) == ((3, 4), (9,))
    assert math.isnan(found.splits[0].flipped[0].margin_before)
    assert found.slices == (SliceReport("day", "known", TargetCounts(5, 1, 2, 3, 4, 2)),)
    assert found.schema == SCHEMA
    assert RepairReport.from_json(found.to_json()).splits[0].broken_ids == (9,)


@pytest.mark.parametrize("schema", [SCHEMA + 1, -1, "1", None, True, 1.0])
def test_an_unknown_version_is_refused(schema: object) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)^schema: expected .*HINT: .* version of lightning_nrl"):
        RepairReport.from_dict({**report().to_dict(), "schema": schema})
