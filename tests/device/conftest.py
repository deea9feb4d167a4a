"""The stand-in is imported before torch or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

collect_ignore = ["strict_cuda.py"]


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """As exact as a CPU: with TensorFloat-32 a repair keeps more distance from the border."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
