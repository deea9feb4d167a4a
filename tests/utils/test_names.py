from __future__ import annotations

import pytest

from lightning_nrl._utils.registry import Registry, import_function
from lightning_nrl.errors import ConfigurationError


class Shape:
    def __init__(self, side: str = "1") -> None:
        self.side = int(side)


def shapes() -> Registry[Shape]:
    registry = Registry[Shape]("shape", "Shape('2')", lambda value: isinstance(value, Shape))
    registry.register("square", "square:2")(Shape)
    return registry


def test_a_name_stands_for_an_object_with_default_settings_and_an_object_for_itself() -> None:
    registry, shape = shapes(), Shape("3")
    assert registry.parse("shape", "square").side == 1
    assert registry.parse("shape", shape) is shape
    assert registry.factory("shape", "square")("2").side == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("squar", r"`form='squar'` is unknown\.\nHINT: did you mean 'square'"),
        ("x", r"`form='x'` is unknown\.\nHINT: use one of 'square'"),
        (3, r"`form=3` is no shape\.\nHINT: write Shape\('2'\)"),
        (Shape, "`form=<class .*>` is no shape"),
    ],
)
def test_what_is_neither_a_name_nor_an_object_is_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shapes().parse("form", value)


def test_text_that_cannot_be_read_is_refused_with_the_forms_and_the_nearest_name() -> None:
    error = shapes().unreadable("`form='squar:2'`", "squar")
    assert str(error).startswith(
        "`form='squar:2'` is no shape, did you mean 'square'?\nHINT: write one of ['square:2']"
    )
    assert "is no shape.\n" in str(shapes().unreadable("`form='square:x'`", "square"))


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("floor", "='floor'` was not found: No module named 'floor'"),
        (":floor", "=':floor'` was not found"),
        ("math:flour", "='math:flour'` was not found: module 'math' has no attribute 'flour'"),
        ("math:pi", "`: a value of type float cannot be called"),
    ],
)
def test_an_address_without_a_function_is_refused(address: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        import_function("adapter", address)
    assert str(refusal.value).startswith(f"`adapter{problem}")
    assert "\nHINT: " in str(refusal.value)
