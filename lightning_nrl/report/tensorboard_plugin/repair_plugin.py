"""The TensorBoard plugin: serves the Repair tab's files and data."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response
from werkzeug.exceptions import abort

from lightning_nrl.report.tensorboard_plugin.repair_folders import (
    RepairFolder,
    find_repairs,
    is_below,
    log_roots,
)

if TYPE_CHECKING:
    from lightning_nrl.report.tensorboard_plugin.tab_data import LoadedRepair


HERE = Path(__file__).parent
STATIC_FILES = {path.name: path for path in (HERE / "static").iterdir()} | {
    name: HERE.parent / name for name in ("table.js", "report.css")
}
"""Files that the browser loads, by name; two are shared with report.html."""
MIME_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".png": "image/png",
    ".txt": "text/plain",
}
MAX_REPORT_BYTES = 64 * 2**20
MAX_SAMPLE_BYTES = 16 * 2**20
MAX_LISTED = 200  # latest repairs in the table
KEPT_REPORTS = 4  # number of reports kept in memory
LOOK_SECONDS = 5.0  # time until the folders are scanned again


class RepairPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The Repair tab of TensorBoard: verdict, flipped samples and search of each repair."""

    plugin_name = "lightning_nrl"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._roots = log_roots(context.logdir, context.flags)
        self._lock = threading.RLock()
        self._scanned: list[RepairFolder] = []
        self._scanned_at = float("-inf")
        self._summaries: dict[RepairFolder, dict[str, Any]] = {}
        self._load = lru_cache(maxsize=KEPT_REPORTS)(_read)

    def is_active(self) -> bool:
        return bool(self._folders())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(
            es_module_path="/static/index.js", tab_name="Repair", disable_reload=True
        )

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        apps = {
            "/static/*": self._static,
            "/repairs": self._repairs,
            "/repair": self._repair,
            "/beside": self._beside,
            "/sample": self._sample,
        }
        return {path: Request.application(app) for path, app in apps.items()}

    def _static(self, request: Request) -> Response:
        path = STATIC_FILES.get(request.path.rpartition("/")[2])
        if path is None:
            return _missing(request, "there is no such file.")
        return _file(request, path)

    def _repairs(self, request: Request) -> Response:
        folders = self._folders()
        summaries = [self._summary(folder) for folder in folders[:MAX_LISTED]]
        return _json(request, {"repairs": summaries, "found": len(folders)})

    def _repair(self, request: Request) -> Response:
        loaded = self._requested(request)
        try:
            return _json(request, loaded.details)
        except Exception as error:  # no report may break the tab
            return _missing(request, f"report.json cannot be shown: {error}")

    def _beside(self, request: Request) -> Response:
        repair, second = self._requested(request), self._requested(request, "other")
        try:
            return _json(request, {"html": repair.beside(second)})
        except Exception as error:  # such as repairs of different models
            return _json(request, {"problem": str(error).partition("\n")[0]})

    def _sample(self, request: Request) -> Response:
        loaded = self._requested(request)
        split, kind = request.args.get("split", ""), request.args.get("kind", "")
        name = loaded.sample_file(split, request.args.get("position", -1, type=int), kind)
        if name is not None:
            path = loaded.folder.path / name
            if is_below(path, loaded.folder.root) and path.stat().st_size <= MAX_SAMPLE_BYTES:
                return _file(request, path)
        return _missing(request, "this sample has no picture or text.")

    def _folders(self) -> list[RepairFolder]:
        with self._lock:
            if time.monotonic() - self._scanned_at > LOOK_SECONDS:
                self._scanned = find_repairs(self._roots)
                self._scanned_at = time.monotonic()
            return self._scanned

    def _requested(self, request: Request, argument: str = "name") -> LoadedRepair:
        """Returns the repair that a request names, or answers the request that it is missing."""
        loaded: LoadedRepair | str = "there is no repair of that name."
        name = request.args.get(argument, "")
        for folder in self._folders():
            if folder.name == name:
                loaded = self._load(folder)
        if isinstance(loaded, str):
            abort(_missing(request, loaded))
        return loaded

    def _summary(self, folder: RepairFolder) -> dict[str, Any]:
        with self._lock:
            if folder not in self._summaries:
                loaded = self._load(folder)
                if isinstance(loaded, str):
                    self._summaries[folder] = {"name": folder.name, "problem": loaded}
                else:
                    self._summaries[folder] = loaded.summary
            return self._summaries[folder]


def _read(folder: RepairFolder) -> LoadedRepair | str:
    if folder.size > MAX_REPORT_BYTES:
        size, limit = folder.size / 2**20, MAX_REPORT_BYTES // 2**20
        return f"report.json has {size:,.0f} MiB; the limit is {limit} MiB."
    # Imported late, since it imports torch, which takes seconds.
    from lightning_nrl.report.tensorboard_plugin.tab_data import LoadedRepair

    try:
        loaded = LoadedRepair(folder)
        json.dumps(loaded.summary, allow_nan=False)
        return loaded
    except Exception as error:
        return f"report.json cannot be read: {error}".partition("\n")[0]


def _respond(request: Request, content: str | bytes, kind: str, code: int = 200) -> Response:
    response: Response = http_util.Respond(request, content, kind, code=code)
    return response


def _json(request: Request, content: object, code: int = 200) -> Response:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return _respond(request, text, "application/json", code)


def _file(request: Request, path: Path) -> Response:
    return _respond(request, path.read_bytes(), MIME_TYPES[path.suffix])


def _missing(request: Request, problem: str) -> Response:
    return _json(request, {"problem": problem}, code=404)
