"""One repair, one TensorBoard and one Chromium for all tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsed_logs import small_log
from live_tensorboard import Browser, chromium, tensorboard_of

from lightning_nrl import RepairReport


@pytest.fixture(scope="session")
def driver() -> Iterator[object]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def log_dir(driver: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory)


@pytest.fixture(scope="session")
def browser(driver: object, log_dir: Path) -> Iterator[Browser]:
    with tensorboard_of(log_dir) as url:
        yield Browser(driver, url)


@pytest.fixture(scope="session")
def report(log_dir: Path) -> RepairReport:
    return RepairReport.from_json((log_dir / "version_0/repair/report.json").read_text())
