"""Who heeds which option, by the docs and by what is refused."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from repository import ROOT

from lightning_nrl import (
    BoundOptions,
    ConfigurationError,
    DataOptions,
    SampleOptions,
    SearchOptions,
    Settings,
)
from lightning_nrl.entrypoints.arguments import (
    OPTION_CLASSES,
    USED_OPTIONS,
    callback_with,
    check_used,
)

OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_docs_say_which_call_uses_which_option():
    table = OPTIONS.partition("## Which call uses which option")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows}
    for entry_point, names in USED_OPTIONS.items():
        assert set(names) == documented[entry_point]
    settings = {field.name for field in fields(Settings)}
    assert documented["repair_module"] == settings | {
        "task",
        "reference",
        "unseen",
        "calibration",
    }


def test_the_docs_have_every_field():
    for name, kind in OPTION_CLASSES.items():
        section = OPTIONS.partition(f"## `{name}`: `{kind.__name__}`")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == [
            field.name for field in fields(kind)
        ]


@pytest.mark.parametrize(
    ("entry_point", "arguments", "message"),
    [
        ("compare", {"gate": "accuracy"}, "`gate='accuracy'`: a comparison counts"),
        (
            "compare",
            {"samples": SampleOptions(slices="camera")},
            "`slices='camera'`: a comparison counts",
        ),
        ("compare", {"bounds": BoundOptions(sparse=0.1)}, r"`sparse=0\.1`: a comparison counts"),
        (
            "compare",
            {"method": "convex"},
            r"`method='convex'`: a comparison runs several[\s\S]*methods=\['convex'",
        ),
        ("sweep", {"samples": SampleOptions(protected=[1])}, r"`protected=\[1\]`: a sweep runs"),
        ("sweep", {"seed": 3}, r"`seed=3`: a sweep has `seeds`[\s\S]*seeds=\[3\]"),
        (
            "diagnose",
            {"data": DataOptions(start_from="best")},
            "`start_from='best'`: it has no meaning",
        ),
    ],
)
def test_what_has_no_effect_is_refused_with_what_to_do(entry_point, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        check_used(entry_point, arguments)


def test_what_has_an_effect_or_says_nothing_is_taken():
    samples, search = SampleOptions(importance="focal"), SearchOptions("eq1", n_passed=3)
    check_used(
        "compare", {"samples": samples, "search": search, "max_time": 3.0, "bounds": BoundOptions()}
    )
    check_used(
        "sweep", {"samples": SampleOptions(set_aside=[3]), "calibration": "val", "dirpath": "runs"}
    )
    check_used(
        "diagnose", {"gate": "accuracy", "bounds": BoundOptions(strength=0.5), "layer": "head"}
    )
    check_used("repair", {"data": DataOptions(failed="val"), "bounds": BoundOptions(strength=0.5)})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("strength", r"did you mean `bounds=BoundOptions\(strength=\.\.\.\)`"),
        ("failed", r"did you mean `data=DataOptions\(failed=\.\.\.\)`"),
        ("targte", "did you mean `target`"),
        ("qwxyz", r"it is one of \['target'"),
    ],
)
def test_an_argument_that_is_not_there_is_answered_with_where_it_is(name, hint):
    with pytest.raises(
        ConfigurationError, match=rf"`{name}` is no argument of a repair\.\nHINT: {hint}"
    ):
        callback_with("repair", **{name: 1})
