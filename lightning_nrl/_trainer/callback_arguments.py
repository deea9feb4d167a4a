"""Arguments that several callbacks have, checked and read."""

from __future__ import annotations

from lightning_nrl._utils.imports import import_function
from lightning_nrl.data.batch import Adapter, unpack
from lightning_nrl.errors import check_kind

__all__ = ["parse_adapter", "parse_prefix"]


def parse_adapter(adapter: str | Adapter | None) -> Adapter:
    """What takes batches apart: a function, its address, or by default `unpack`."""
    return unpack if adapter is None else import_function("adapter", adapter)


def parse_prefix(prefix: str, default: str) -> str:
    """What tags begin with, without a slash at the end."""
    fits = isinstance(prefix, str) and bool(prefix.strip("/"))
    check_kind("prefix", prefix, fits, "name", f"prefix={default!r}")
    return prefix.rstrip("/")
