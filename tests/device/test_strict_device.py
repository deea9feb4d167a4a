"""The tests marked `gpu` on the strict stand-in for CUDA, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from repository import ROOT
from strict_build import built, reason_not_to


def test_what_needs_a_device_holds_on_a_strict_one():
    reason = reason_not_to()
    if reason:
        pytest.skip(reason)
    try:
        built()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the strict device does not fit this torch: {error.stderr[:500]}")
    command = [sys.executable, str(ROOT / "tests" / "gpu_check.py"), "--device", "strict"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
