"""The tests marked `gpu` on the strict stand-in for CUDA, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_check import in_a_process
from repository import ROOT
from strict_build import built, reason_not_to

HERE = Path(__file__).parent
SECONDS = 600


def test_what_needs_a_device_holds_on_a_strict_one() -> None:
    reason = reason_not_to()
    if reason:
        pytest.skip(reason)
    try:
        built()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the strict device does not fit this torch: {error.stderr[:500]}")
    folders = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "strict_cuda", "-p", "no:cacheprovider", "-p", "no:xdist"]
    gpu = [*command, "-m", "gpu", str(HERE), str(ROOT / "tests" / "scoring" / "test_device.py")]
    done = subprocess.run(gpu, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_process_of_the_check_can_be_started_once_more() -> None:
    """As ddp does for each further rank."""
    status, text, _ = in_a_process("import os, sys; print(os.path.isfile(os.path.abspath(sys.argv[0])))", 60)
    assert (status, text.strip()) == (0, "True")
