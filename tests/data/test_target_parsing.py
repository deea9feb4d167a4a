from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nrl import ConfigurationError, RegressionFreeRepair, Settings, Target
from lightning_nrl.data import And, Confusion, Label, Not, Or, Where, parse_target
from lightning_nrl.data.columns import Field, find_column
from lightning_nrl.data.targets import target_in
from lightning_nrl.release import ProtectedIntact, parse_rules

CLASSES = st.integers(0, 10**18 - 1)
LEAVES = st.one_of(
    st.just(Target.all()),
    CLASSES.map(Label),
    st.tuples(CLASSES, CLASSES).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: Confusion(*pair)),
    st.sampled_from(["os.path:exists", "torch.isnan", "lightning_nrl.data.targets:Target.all"]).map(Where),
)
TREES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner))
)


@given(TREES)
def test_what_reports_print_is_read_back(target: Target) -> None:
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("all", Target.all()),
        ("label 3 and not where os.path:exists", And(Label(3), Not(Where("os.path:exists")))),
        ("confusion 3->5", Confusion(3, 5)),
        ("  confusion 3 -> 5\n", Confusion(3, 5)),
        ("label 1 or label 2 and label 3", Or(Label(1), And(Label(2), Label(3)))),
        ("not label 1 and label 2", And(Not(Label(1)), Label(2))),
        ("not(label 1 or (label 2))", Not(Or(Label(1), Label(2)))),
    ],
)
def test_text_may_be_written_as_people_write_it(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a condition was expected, and the end found"),
        ("label", "a class, a whole number from 0 was expected behind `label`, and the end found"),
        ("label three", "a whole number from 0 was expected behind `label`, and `three` found"),
        ("label -1", "a whole number"),
        ("label " + "9" * 5000, "a whole number"),
        ("label 3 label 5", "`and`, `or` or the end was expected behind `3`, and `label` found"),
        ("label 3 and", "a condition was expected"),
        ("(label 3", r"`\)` was expected"),
        ("label 3)", r"and `\)` found"),
        ("confusion 3 5", "`->` was expected"),
        ("confusion 3 -> 3", "is no failure"),
        ("where occluded", "the address of a function"),
        ("where no.such.module:f", "was not found"),
        ("where os.path:exists extra", "`extra` found"),
        ("Label 3", "a condition was expected, and `Label` found"),
        ("not " * 100_000 + "all", "nested too deeply"),
        ("(" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){problem}.*HINT: "):
        parse_target(text)


@given(st.text("labelnotwhrcfusidk ()->.:0123456789", max_size=40))
def test_any_text_is_a_target_or_one_error(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        assert isinstance(parse_target(text), Target)


@pytest.mark.parametrize("given_target", [3, None, Label, ["label 3"]])
def test_what_is_neither_text_nor_target_is_refused(given_target: object) -> None:
    with pytest.raises(ConfigurationError, match=r"`target=.*is no Target"):
        parse_target(given_target)  # type: ignore[arg-type]


def test_text_is_taken_wherever_a_target_is() -> None:
    assert Settings(target="label 3").target == Label(3)  # type: ignore[arg-type]
    assert RegressionFreeRepair(target="confusion 3 -> 5").settings.target == Confusion(3, 5)
    assert find_column("slices", "not label 3") == Not(Label(3))
    assert ProtectedIntact(where="label 3 or label 5").where == Or(Label(3), Label(5))
    (rule,) = parse_rules("protected:confusion 3 -> 5")
    assert str(rule) == "protected:confusion 3 -> 5"
    assert find_column("slices", "camera id") == Field("camera id")
    assert target_in("all") is None
