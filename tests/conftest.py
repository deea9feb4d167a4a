"""What holds for all tests.

Where several processes test side by side, each takes one core: their threads would only wait for each other. What takes
long comes first, so that none of them waits at the end for a long test of another. Ctrl-C is heeded, as in a shell,
where the tests run in the background too.
"""

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)

collect_ignore = ["benchmarks/launches.py"]  # needs a stand-in for CUDA that is there before torch is

LONG = {"browser", "command_line", "device", "docs", "examples", "integration"}
"""Folders of tests that train networks, open pages or start processes, as those beside the folders do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def is_short(item: pytest.Item) -> bool:
        path = item.path.relative_to(here) if item.path.is_relative_to(here) else item.path
        return len(path.parts) > 1 and path.parts[0] not in LONG

    items.sort(key=is_short)
