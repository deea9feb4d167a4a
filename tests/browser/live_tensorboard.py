"""A TensorBoard that serves a log folder, and a Chromium that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard import default, program

from lightning_nrl.tensorboard_plugin import RepairPlugin

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@contextmanager
def tensorboard_of(log_dir: Path) -> Iterator[str]:
    """The address of a TensorBoard in this process, with the Repair tab whether or not the package is installed."""
    board = program.TensorBoard(plugins=[*default.get_static_plugins(), RepairPlugin])
    board.configure(argv=["tensorboard", "--logdir", str(log_dir), "--port", "0", "--load_fast", "false"])
    server = board._make_server()
    from threading import Thread

    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.get_url()
    finally:
        server.shutdown()


@contextmanager
def chromium(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A browser without a screen and, for all that is not on this machine, without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--force-device-scale-factor=1",
        f"--window-size={width},{height}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
        *(["--force-dark-mode"] if dark else []),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
