from __future__ import annotations

import pytest

from lightning_nrl import ConfigurationError
from lightning_nrl._utils.registry import import_function


@pytest.mark.parametrize("address", ["math:floor", "math.floor", "os.path:join", "collections:Counter.most_common"])
def test_a_function_is_found_by_its_address(address: str) -> None:
    assert import_function("adapter", address).__name__ == address.replace(":", ".").rpartition(".")[2]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("floor", "='floor'` was not found: No module named 'floor'"),
        (":floor", "=':floor'` was not found"),
        ("", "=''` was not found"),
        (".:floor", "='.:floor'` was not found"),
        ("no.such.module:f", "='no.such.module:f'` was not found: No module named 'no'"),
        ("math:flour", "='math:flour'` was not found: module 'math' has no attribute 'flour'"),
        ("math:pi", "`: a value of type float cannot be called"),
    ],
)
def test_an_address_without_a_function_is_refused(address: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        import_function("adapter", address)
    assert str(refusal.value).startswith(f"`adapter{problem}")
    assert "\nHINT: " in str(refusal.value)


def test_a_function_stands_for_itself() -> None:
    assert import_function("adapter", len) is len
    with pytest.raises(ConfigurationError, match="`adapter`: a value of type int cannot be called"):
        import_function("adapter", 3)  # type: ignore[arg-type]
