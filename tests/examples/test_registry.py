"""The example of a model registry, as MLflow's own client reads it afterwards."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
from repository import ROOT

from lightning_nrl.release import ReleaseReport

EXAMPLES = ROOT / "examples"
FILES = {"report.json", "report.md", "report.html", "predictions.csv"}
SHARED = ("digits", "output")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script in an empty folder and returns its exit status."""
    # Set before the first import of mlflow.
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    pytest.importorskip("mlflow", reason="mlflow is not among the test dependencies")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in SHARED:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["registry.py", "--fast", *arguments])
        with torch.random.fork_rng(), pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / "registry.py"), run_name="__main__")
        return end.value.code or 0

    return run


@pytest.mark.slow
def test_only_an_accepted_or_a_forced_version_becomes_the_champion(run, tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")

    def champion() -> int:
        return int(client.get_model_version_by_alias("digits", "champion").version)

    def tags(version: int) -> dict[str, str]:
        return client.get_model_version("digits", str(version)).tags

    assert run("--images", "200") == 0
    assert champion() == 1
    assert run("--images", "720") == 0
    assert champion() == 2
    assert run("--images", "60") == 1
    assert champion() == 2
    assert run("--images", "60", "--force", "withdrawn") == 0
    assert champion() == 4

    statuses = [tags(version)["release.status"] for version in (1, 2, 3, 4)]
    assert statuses == ["accepted", "accepted", "refused", "refused"]
    compared = [tags(version)["release.compared_with"] for version in (1, 2, 3, 4)]
    assert compared == ["version 1", "version 1", "version 2", "version 2"]
    assert "release.reasons" not in tags(2)
    assert [tags(version).get("release.forced") for version in (2, 3, 4)] == [
        None,
        None,
        "withdrawn",
    ]
    for version in (1, 2, 3, 4):
        run_id = client.get_model_version("digits", str(version)).run_id
        assert client.get_run(run_id).info.status == "FINISHED"
        folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
        assert (folder / "model.ckpt").exists()
        assert {path.name for path in (folder / "release").iterdir()} == FILES
        report = ReleaseReport.from_json((folder / "release/report.json").read_text())
        assert report.new.name == f"DigitNet from versions/{version}/model.ckpt"
        assert tags(version)["release.day"] == report.provenance.created[:10]
        assert date.fromisoformat(tags(version)["release.day"])
        n_broken = sum(len(ids) for ids in report.broken_ids.values())
        assert tags(version)["release.broken"] == str(n_broken)
        assert tags(version).get("release.reasons", "") == "\n".join(report.reasons)
    assert tags(3)["release.reasons"].startswith("nfr:5%: test: negative flip rate ")
    assert int(tags(4)["release.broken"]) > 27  # 5 % of 537
