"""Checks on a real card, in ten minutes, what is promised of a GPU; prints a table.

python tests/gpu_check.py                   # 0: all holds, 1: something does not, 2: no card
python tests/gpu_check.py --device strict   # on the stand-in for CUDA, without a card or times
python tests/gpu_check.py --only waits memory
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CHECKS = [TESTS / "device", TESTS / "search" / "test_device.py"]
NO_CARD = """\
There is no CUDA device here, so nothing was checked (torch {version}).
On a machine with a card: install this package with a CUDA build of torch,
then `python tests/gpu_check.py`.
Without a card: `python tests/gpu_check.py --device strict` runs the same checks on a stand-in."""


class Rows:
    """A line for each check: what it found, and whether what is promised holds."""

    def __init__(self) -> None:
        self.lines = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        words = "; ".join(str(value) for _, value in report.user_properties)
        if report.skipped:
            words = report.longrepr[2].removeprefix("Skipped: ")
        if report.failed:
            words = report.longreprtext.strip().splitlines()[-1]
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        holds = {"passed": "yes", "failed": "NO", "skipped": ""}[report.outcome]
        self.lines.append((name, words[:90], holds))

    def show(self) -> None:
        width = max(len(name) for name, *_ in self.lines)
        for name, words, holds in self.lines:
            print(f"{name:{width}}  {holds:3}  {words}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "strict"), default="cuda")
    parser.add_argument("--only", nargs="+", help="checks whose names have one of these words")
    options = parser.parse_args()
    sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS, TESTS / "device", TESTS / "search")]
    if options.device == "strict":
        import strict_cuda  # noqa: F401  (before torch)
    import pytest
    import torch

    if not torch.cuda.is_available():
        print(NO_CARD.format(version=torch.__version__))
        return 2
    total = torch.cuda.mem_get_info()[1] / 2**30
    cards = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    from lightning_nrl.records import installed_versions

    print(f"{cards}, {total:.0f} GiB")
    print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    rows = Rows()
    arguments = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:terminal",
        "-W",
        "ignore",
        "-m",
        "gpu",
    ]
    if options.only:
        arguments += ["-k", " or ".join(options.only)]
    status = pytest.main([*arguments, *map(str, CHECKS)], plugins=[rows])
    if rows.lines:
        rows.show()
    failed = sum(holds == "NO" for _, _, holds in rows.lines)
    print(f"\n{failed} of {sum(bool(holds) for *_, holds in rows.lines)} promises do not hold.")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
