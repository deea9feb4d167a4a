from __future__ import annotations

import contextlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_nrl import RegressionFreeRepair, Settings
from lightning_nrl.data import parse_target
from lightning_nrl.data.batch import Batch
from lightning_nrl.data.columns import Field, find_column
from lightning_nrl.data.targets import (
    AllFailures,
    And,
    Confusion,
    Label,
    Not,
    Or,
    Target,
    Where,
    target_in,
)
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.release import ProtectedIntact, parse_rules

LABEL = torch.tensor([3, 3, 5, 3, 0])
PREDICTION = torch.tensor([5, 3, 3, 0, 0])
OCCLUDED = torch.tensor([True, False, False, True, True])


def batch(n: int = 5) -> Batch:
    raw = (torch.zeros(n, 2), LABEL[:n], {"occluded": OCCLUDED[:n]})
    return Batch(args=(raw[0],), target=raw[1], position=torch.arange(n), raw=raw)


def chosen(target: Target) -> list[int]:
    return target.select(batch(), LABEL, PREDICTION).nonzero().flatten().tolist()


def occluded(raw: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
    return raw[2]["occluded"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target.all(), [0, 1, 2, 3, 4]),
        (Target.label(3), [0, 1, 3]),
        (Target.where(occluded), [0, 3, 4]),
        # The class of a confusion, whatever its samples are taken for.
        (Target.confusion(3, 5), [0, 1, 3]),
        (Target.confusion(3, 5) & Target.where(occluded), [0, 3]),
        # Of every class something may fail otherwise than by this confusion.
        (~Target.confusion(3, 5), [0, 1, 2, 3, 4]),
        (~~Target.confusion(3, 5), [0, 1, 3]),
        (~(Target.label(3) | Target.confusion(5, 3)), [2, 4]),
        (~(Target.label(3) & ~Target.where(occluded)), [0, 2, 3, 4]),
    ],
    ids=str,
)
def test_covers_are_the_samples_that_would_be_chosen_if_they_failed(target, expected):
    assert target.covers(batch(), LABEL, PREDICTION).nonzero().flatten().tolist() == expected


def test_targets_are_values():
    assert Target.label(3) | Target.confusion(3, 5) == Or(Label(3), Confusion(3, 5))
    assert ~Target.all() & Target.where(occluded) == And(Not(AllFailures()), Where(occluded))
    assert len({Target.label(3), Label(3), Label(4)}) == 2
    assert pickle.loads(pickle.dumps(Target.where(occluded) | Target.label(1))) == Where(
        occluded
    ) | Label(1)


@pytest.mark.parametrize(
    ("give", "found"),
    [
        (lambda raw: OCCLUDED[:3], r"torch.bool \[3\]"),
        (lambda raw: OCCLUDED.long(), r"torch.int64 \[5\]"),
        (lambda raw: OCCLUDED[:, None], r"torch.bool \[5, 1\]"),
        (lambda raw: OCCLUDED.numpy().astype(np.float32), r"float32 \[5\]"),
        (lambda raw: [1, 0, 0, 1, 1], "list of length 5"),
        (lambda raw: None, "NoneType"),
    ],
)
def test_a_predicate_that_returns_something_else_is_refused(give, found):
    message = f"(?s)where hidden.*returned ({found}) for a batch of 5.*HINT"
    with pytest.raises(ConfigurationError, match=message):
        chosen(Target.where(give, name="hidden"))


def test_an_exception_in_a_predicate_is_named_and_kept():
    with pytest.raises(
        ConfigurationError, match=r"(?s)where hidden.*KeyError: 'hidden'.*HINT"
    ) as caught:
        chosen(Target.where(lambda raw: raw[2]["hidden"], name="hidden"))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target.where("no.such.module:f"), "`predicate='no.such.module:f'` was not found"),
        (lambda: Target.where(OCCLUDED), "of type Tensor cannot be called"),
        (lambda: Target.label(-1), "`label=-1` is no class"),
        (lambda: Target.label("3"), "`label='3'` is no class"),
        (lambda: Target.label(np.True_), "`label=.*is no class"),
        (lambda: Target.confusion(1.5, 2), "`true=1.5` is no class"),
        (lambda: Target.confusion(2, -1), "`predicted=-1` is no class"),
        (lambda: Target.confusion(3, 3), "confusion 3 -> 3 is not a failure"),
        (lambda: Or(Target.label(3), 5), "Or was given 5"),
    ],
)
def test_what_is_no_target_is_refused_on_construction(make, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        make()
    assert "HINT:" in str(error.value)


@pytest.mark.parametrize("label", [np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_become_int(label):
    target = Target.label(label)
    assert target == Label(3)
    assert type(target.label) is int


@pytest.mark.parametrize(
    "target", [Target.label(3), Target.confusion(3, 5), Target.all() & Target.label(3)]
)
def test_classes_in_a_task_without_classes_are_refused(target):
    with pytest.raises(ConfigurationError, match=r"(?s)asks for classes.*Target.where"):
        target.select(batch(), None, None)


def test_and_or_as_keywords_are_refused():
    with pytest.raises(TypeError, match=r"(?s)neither true nor false.*HINT"):
        Target.label(3) or Target.label(5)


CLASSES = st.integers(0, 10**18 - 1)


def trees(classes: st.SearchStrategy[int], predicates: list[Any]) -> st.SearchStrategy[Target]:
    pairs = st.tuples(classes, classes).filter(lambda pair: pair[0] != pair[1])
    leaves = st.one_of(
        st.just(Target.all()),
        classes.map(Label),
        pairs.map(lambda pair: Confusion(*pair)),
        st.sampled_from(predicates).map(Where),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner)
        ),
    )


@given(trees(st.integers(0, 5), [occluded]), trees(st.integers(0, 5), [occluded]))
def test_combinations_obey_de_morgan(a, b):
    assert chosen(~(a & b)) == chosen(~a | ~b)
    assert chosen(~(a | b)) == chosen(~a & ~b)
    assert chosen(~~a) == chosen(a)


def test_a_cli_builds_a_target_from_yaml():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--target", type=Target | None)
    given_yaml = """{class_path: lightning_nrl.data.Or, init_args: {
        left: {class_path: lightning_nrl.data.Label, init_args: {label: 3}},
        right: {class_path: lightning_nrl.data.Where, init_args: {predicate: 'os.path:exists'}}}}"""
    config = parser.parse_args([f"--target={given_yaml}"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(config).target == Or(Label(3), Where("os.path:exists"))
    assert "predicate: os.path:exists" in parser.dump(config)


@given(trees(CLASSES, ["os.path:exists", "torch.isnan", "lightning_nrl.data.targets:Target.all"]))
def test_what_reports_print_is_read_back(target):
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("all", Target.all()),
        ("label 3 and not where os.path:exists", And(Label(3), Not(Where("os.path:exists")))),
        ("confusion 3->5", Confusion(3, 5)),
        ("label 1 or label 2 and label 3", Or(Label(1), And(Label(2), Label(3)))),
        ("not label 1 and label 2", And(Not(Label(1)), Label(2))),
        ("not(label 1 or (label 2))", Not(Or(Label(1), Label(2)))),
    ],
)
def test_text_may_be_written_as_people_write_it(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a condition, found the end"),
        ("label three", "a class number from 0 after `label`, found `three`"),
        ("label " + "9" * 5000, "a class number"),
        ("label 3 label 5", "expected `and`, `or` or the end after `3`, found `label`"),
        ("(label 3", r"expected `\)`"),
        ("confusion 3 5", "expected `->`"),
        ("where occluded", "the address of a function"),
        ("Label 3", "expected a condition, found `Label`"),
        ("(" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text, problem):
    with pytest.raises(ConfigurationError, match=rf"(?s){problem}.*HINT: "):
        parse_target(text)


@given(st.text("labelnotwhrcfusidk ()->.:0123456789", max_size=40))
def test_any_text_is_a_target_or_one_error(text):
    with contextlib.suppress(ConfigurationError):
        assert isinstance(parse_target(text), Target)


@pytest.mark.parametrize("value", [3, None, Label])
def test_what_is_neither_text_nor_target_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"`target=.*is no Target"):
        parse_target(value)


def test_text_is_taken_wherever_a_target_is():
    assert Settings(target="label 3").target == Label(3)
    assert RegressionFreeRepair(target="confusion 3 -> 5").settings.target == Confusion(3, 5)
    assert find_column("slices", "not label 3") == Not(Label(3))
    assert ProtectedIntact(where="label 3 or label 5").where == Or(Label(3), Label(5))
    (rule,) = parse_rules("protected:confusion 3 -> 5")
    assert str(rule) == "protected:confusion 3 -> 5"
    assert find_column("slices", "camera id") == Field("camera id")
    assert target_in("all") is None
