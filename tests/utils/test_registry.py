import pytest

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError


class Shape:
    def __init__(self, side: str = "1") -> None:
        self.side = int(side)


class Circle(Shape):
    pass


def shapes() -> Registry[Shape]:
    found: Registry[Shape] = Registry("shape", "Shape('2')", lambda value: isinstance(value, Shape))
    found.register("square", "square:2")(Shape)
    return found


def test_a_name_stands_for_an_object_with_default_settings_and_an_object_for_itself() -> None:
    registry, own = shapes(), Shape("3")
    assert registry.parse("shape", "square").side == 1
    assert registry.parse("shape", own) is own
    assert registry.factory("shape", "square")("2").side == 2


def test_a_decorator_registers_and_gives_the_class_back() -> None:
    registry = shapes()
    assert registry.register("circle")(Circle) is Circle
    assert list(registry) == ["square", "circle"]
    assert registry.forms == ("square:2", "circle")
    assert "circle" in registry
    assert "oval" not in registry


def test_included_names_come_after_the_own_ones_also_when_they_are_added_later() -> None:
    inner = shapes()
    outer: Registry[Shape] = Registry("shape", "Shape()", lambda value: isinstance(value, Shape), include=(inner,))
    outer.register("circle")(Circle)
    inner.register("dot", "dot:0")(lambda: Shape("0"))
    assert list(outer) == ["circle", "square", "dot"]
    assert outer.forms == ("circle", "square:2", "dot:0")
    assert outer.parse("shape", "dot").side == 0
    assert "circle" not in inner


@pytest.mark.parametrize("name", ["square", "circle"])
def test_a_name_is_given_once(name: str) -> None:
    outer: Registry[Shape] = Registry("shape", "Shape()", lambda value: True, include=(shapes(),))
    outer.register("circle")(Circle)
    with pytest.raises(ValueError, match=f"named '{name}' already"):
        outer.register(name)(Shape)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("squar", r"`form='squar'` is unknown\.\nHINT: did you mean 'square'"),
        ("x", r"`form='x'` is unknown\.\nHINT: use one of 'square'"),
        (3, r"`form=3` is no shape\.\nHINT: write Shape\('2'\)"),
        (Shape, "`form=<class .*>` is no shape"),
        (None, "`form=None` is no shape"),
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
