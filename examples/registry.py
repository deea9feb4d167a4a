"""Promotes a model in an MLflow registry only if a release gate accepts it.

    python examples/registry.py --images 200   # version 1, the first champion
    python examples/registry.py --images 720   # version 2 is better and becomes the champion
    python examples/registry.py --images 60    # version 3 is refused; the champion stays
    python examples/registry.py --images 60 --force "the other images were withdrawn"   # version 4

Needs `python -m pip install mlflow`. The registry is `mlflow.db` in the current folder, and
`mlflow ui --backend-store-uri sqlite:///mlflow.db` shows it. The data and the network are in
`digits.py`. The exit status is 0 if the version is promoted, 1 if refused and 3 if undecided.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from output import quiet_trainer, start
from torch.utils.data import DataLoader, Subset

from lightning_nrl import ReleaseGate
from lightning_nrl.release import ReleaseReport

STORE = "sqlite:///mlflow.db"  # for a team, the address of its server
MODEL, ALIAS = "digits", "champion"
CHECKPOINT = "model.ckpt"
RULES = [
    "nfr:5%",  # at most 5 % of samples like these break, with 95 % confidence
    "floor:70%",  # the accuracy is at least 70 %, with 95 % confidence
]


def train(data: SlashedZeros, images: int, epochs: int) -> Trainer:
    trainer = quiet_trainer(epochs)
    digits = Subset(data.data["train"], range(images))
    trainer.fit(DigitNet(), DataLoader(digits, 32, shuffle=True))
    return trainer


def register(client: MlflowClient, trainer: Trainer) -> ModelVersion:
    """Registers the trained model as a version. Its checkpoint is an artifact of a run."""
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    run = client.create_run(experiment_id="0").info
    with TemporaryDirectory() as folder:
        path = Path(folder) / CHECKPOINT
        trainer.save_checkpoint(path)
        client.log_artifact(run.run_id, str(path))
    return client.create_model_version(MODEL, run.artifact_uri, run.run_id)


def find_champion(client: MlflowClient) -> ModelVersion | None:
    number = client.get_registered_model(MODEL).aliases.get(ALIAS)
    if number is None:
        return None
    return client.get_model_version(MODEL, number)


def download(client: MlflowClient, version: ModelVersion) -> Path:
    """Returns a version's checkpoint. The report names it by its path, which has the number."""
    folder = Path(f"versions/{version.version}")
    folder.mkdir(parents=True, exist_ok=True)
    client.download_artifacts(version.run_id, CHECKPOINT, str(folder))
    return folder / CHECKPOINT


def judge(
    client: MlflowClient, new: ModelVersion, old: ModelVersion, data: SlashedZeros
) -> ReleaseReport:
    """Compares two versions. The files of the report become artifacts of the new version's run."""
    path = download(client, new)
    gate = ReleaseGate(download(client, old), RULES, dirpath=path.parent / "release")
    logger = MLFlowLogger(run_id=new.run_id, tracking_uri=STORE)
    trainer = quiet_trainer(1, gate, logger=logger)
    trainer.test(DigitNet(), ckpt_path=path, datamodule=data, verbose=False)
    return gate.report


def tags_of(report: ReleaseReport, old: ModelVersion, forced: str | None) -> dict[str, str]:
    """Returns what the registry is told of a decision. `forced` is the reason to overrule it."""
    tags = {
        "release.status": report.status,
        "release.compared_with": f"version {old.version}",
        "release.broken": str(sum(map(len, report.broken_ids.values()))),
        "release.day": report.provenance.created.partition(" ")[0],  # without the time
    }
    if report.reasons:
        tags["release.reasons"] = "\n".join(report.reasons)
    if forced:
        tags["release.forced"] = forced
    return tags


if __name__ == "__main__":
    given = start(
        __doc__,
        **{
            "--images": {
                "type": int,
                "default": 200,
                "help": "training images, at most 720",
            },
            "--force": {"metavar": "REASON", "help": "promote the version even if it is refused"},
        },
    )
    seed_everything(0, verbose=False)
    client, data = MlflowClient(STORE), SlashedZeros()

    # 1. Train.
    trainer = train(data, given.images, epochs=20 if given.fast else 30)

    # 2. Register.
    version = register(client, trainer)

    # 3. Judge. The first version is compared with itself, so only the floor can refuse it.
    champion = find_champion(client) or version
    report = judge(client, version, champion, data)

    # 4. Record the decision first, so that no champion lacks one.
    forced = None if report.accepted else given.force
    for name, value in tags_of(report, champion, forced).items():
        client.set_model_version_tag(MODEL, version.version, name, value)

    # 5. Promote.
    if report.accepted or forced:
        client.set_registered_model_alias(MODEL, ALIAS, version.version)
        print(f"Version {version.version} is the {ALIAS}.")
        sys.exit()
    print(f"Version {version.version} is not promoted.")
    sys.exit(report.exit_status)
