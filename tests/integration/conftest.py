"""A network trained once, for tests that need one and not its training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from digit_models import Classifier, Digits, quiet_trainer
from lightning_package import seed_everything
from task_models import CASES

# Scripts that tests start find the helpers of all tests, as pytest itself does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(autouse=True, scope="module")
def figures_are_left_out() -> Iterator[ModuleType | None]:
    """They take a second for each repair, those of a module's fixtures included."""
    matplotlib = sys.modules.get("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield matplotlib


@pytest.fixture(autouse=True)
def figures_are_drawn_where_they_are_looked_at(
    request: pytest.FixtureRequest,
    figures_are_left_out: ModuleType | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if request.node.get_closest_marker("figures") is not None:
        monkeypatch.setitem(sys.modules, "matplotlib", figures_are_left_out)


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten() -> None:
    """Torch compiles a method a limited number of times in a process, whatever the test, then runs
    it as it is.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="session")
def trained_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an MLP after three epochs."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = quiet_trainer(folder, enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Digits())
    trainer.save_checkpoint(folder / "trained.ckpt", weights_only=False)
    return folder / "trained.ckpt"


@pytest.fixture(scope="session")
def trained_task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of one of `CASES` after twelve epochs, trained when first asked for."""
    folder = tmp_path_factory.mktemp("tasks")

    def checkpoint(name: str) -> Path:
        path = folder / f"{name}.ckpt"
        if not path.exists():
            seed_everything(0, verbose=False)
            data, model = CASES[name].make()
            trainer = quiet_trainer(folder, max_epochs=12, enable_checkpointing=False)
            trainer.fit(model, datamodule=data)
            trainer.save_checkpoint(path)
        return path

    return checkpoint


@pytest.fixture
def old(trained_path: Path) -> Classifier:
    """The same as the model that an update replaces."""
    return Classifier.load_from_checkpoint(trained_path)


@pytest.fixture
def trained(trained_path: Path) -> Classifier:
    """The trained MLP, fresh for each test."""
    return Classifier.load_from_checkpoint(trained_path)


def pytest_configure(config: pytest.Config) -> None:
    for noise in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Checkpoint directory .* exists and is not empty",
        "You defined a `validation_step` but have no `val_dataloader`",
        "You passed in a `val_dataloader` but have no `validation_step`",
        "\\s*By default only one JsonargparseDeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{noise}")
