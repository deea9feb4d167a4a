"""A TensorBoard that serves a log folder, and a Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pytest
from PIL import Image
from tensorboard import default, program

from lightning_nrl.report.tensorboard_plugin import RepairPlugin, repair_plugin

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = (
    os.path.abspath(os.environ["NRL_SCREENSHOTS"]) if "NRL_SCREENSHOTS" in os.environ else None
)
"""The folder that pictures of the pages go to; none are made without it."""
COLOURS = 256
"""Of a screenshot: enough for pages, and small files."""
PATIENCE = 60.0  # seconds, on a busy machine

SHOWN_TEXT = """
const found = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.textContent.trim()) found.push(node.textContent.trim().replaceAll(/\\s+/g, " "));
  } else if (!["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName)) {
    if (node.nodeType === Node.ELEMENT_NODE && getComputedStyle(node).display === "none") return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  }
};
walk(document.body);
return found;
"""
FOUND = """
const all = root => [...root.querySelectorAll("*")].flatMap(
  one => [one, ...(one.shadowRoot ? all(one.shadowRoot) : [])]);
return all(document).filter(one => one.matches(arguments[0]));
"""

T = TypeVar("T")


@contextmanager
def tensorboard_of(log_dir: Path) -> Iterator[str]:
    """The address of a TensorBoard in this process, with the Repair tab whether or not the package
    is installed.
    """
    if SCREENSHOTS is not None:
        os.chdir(log_dir.parent)
        log_dir = Path(log_dir.name)  # as the pages print it
    board = program.TensorBoard(plugins=[*default.get_static_plugins(), RepairPlugin])
    board.configure(
        argv=["tensorboard", "--logdir", str(log_dir), "--port", "0", "--load_fast", "false"]
    )
    server = board._make_server()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repair_plugin, "LOOK_SECONDS", 0.0)  # tests add repairs
            yield server.get_url()
    finally:
        server.shutdown()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a screen that reaches nothing outside of this machine."""
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
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Browser:
    """A Chromium on one TensorBoard."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, place: str, width: int = 1280, height: int = 900) -> None:
        """A page of TensorBoard by what follows its address, loaded anew, or a file."""
        self.driver.switch_to.default_content()
        self.driver.set_window_size(width, height)
        self.driver.get("about:blank")
        self.driver.get_log("browser")  # so that `errors` has those of this page alone
        self.driver.get(place if "://" in place else self.url + place)

    def until(self, what: Callable[[], T]) -> T:
        """The first answer that is true; fails after `PATIENCE` seconds without any."""
        end = time.monotonic() + PATIENCE
        while not (found := what()):
            assert time.monotonic() < end, " | ".join(self.texts())[-3000:]
            time.sleep(0.1)
        return found

    def texts(self) -> list[str]:
        """All text that is shown, piece by piece, in shadow trees too."""
        found = self.driver.execute_script(SHOWN_TEXT)
        return found

    def elements(self, selector: str) -> list[Any]:
        """Elements of a page, in shadow trees too."""
        found = self.driver.execute_script(FOUND, selector)
        return found

    def shows(self, *texts: str) -> None:
        """Waits until all of these can be read."""
        self.until(lambda: all(text in "\n".join(self.texts()) for text in texts))

    def image_sizes(self, selector: str) -> list[tuple[int, int]]:
        """Width and height of each image that has loaded."""
        script = """
            return arguments[0]
                .filter(image => image.complete)
                .map(image => [image.naturalWidth, image.naturalHeight]);"""
        return [
            tuple(size)
            for size in self.driver.execute_script(script, self.elements(selector))
            if all(size)
        ]

    def errors(self, source: str = "") -> list[str]:
        """What the console has complained of since the page was opened, of places that have this in
        their name.
        """
        entries = self.driver.get_log("browser")
        return [
            entry["message"]
            for entry in entries
            if entry["level"] == "SEVERE" and source in entry["message"]
        ]

    def picture(self, name: str) -> None:
        """Saves what is seen as a small PNG file, if pictures are wanted."""
        if SCREENSHOTS is None:
            return
        folder = Path(SCREENSHOTS)
        folder.mkdir(parents=True, exist_ok=True)
        shot = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(COLOURS, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
