"""Builds the strict device once for each torch; `python tests/device/strict_build.py` does it by
hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("strict_cuda.cpp")


def reason_not_to() -> str | None:
    """Why it cannot be built here, if so."""
    import torch

    if sys.platform != "linux":
        return "the strict device is for Linux"
    if torch.version.cuda or getattr(torch.version, "hip", None):
        return "this torch has a CUDA of its own: tests/gpu_check.py is for it"
    return None if shutil.which("g++") else "no g++ to build the strict device"


def built() -> Path:
    """The library, from the user's cache or built into it.

    Raises:
        subprocess.CalledProcessError: the compiler does not take it; its words are in `stderr`.
    """
    torch = Path(str(importlib.util.find_spec("torch").origin)).parent
    version = (torch / "version.py").read_bytes()
    key = hashlib.sha256(
        SOURCE.read_bytes() + Path(__file__).read_bytes() + version + str(torch).encode()
    ).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_nrl_tests"
    library = home / f"strict_cuda-{key}.so"
    if library.exists():
        return library
    home.mkdir(parents=True, exist_ok=True)
    part = home / f"{library.stem}-{os.getpid()}.part"
    folders = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wl,--no-as-needed",
        f"-Wl,-rpath,{torch}/lib",
    ]
    command = ["g++", *flags, *folders, str(SOURCE), "-ltorch_cpu", "-lc10", "-o", str(part)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    part.replace(library)
    return library


if __name__ == "__main__":
    print(reason_not_to() or built())
