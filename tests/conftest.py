"""What holds for all tests.

Where several processes test side by side, each takes one core: their threads would only wait for
each other. Ctrl-C is heeded, as in a shell, where the tests run in the background too.
"""

import os
import signal
import sys

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("SOURCE_DATE_EPOCH", "1700000000")  # so that reports of one repair are alike

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves figures out of reports, as where matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
