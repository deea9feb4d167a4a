"""A repair from a configuration file, through LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from digit_models import Classifier, Digits
from lightning_package import LightningCLI
from toy_searcher import RandomLocalSearch

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, RepairInTraining, Target
from lightning_nrl.gate import Instance, Tolerance
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto
from lightning_nrl.published import bundle
from lightning_nrl.search import Fitness
from lightning_nrl.tasks import Custom, Segmentation

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*deprecated in v4.49.0"),
]

TRAINER = """
model: {class_path: digit_models.Classifier}
data: {class_path: digit_models.Digits}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""

WORDS = """
layer: network.3
target: label 3 and not where digit_models:is_noisy
gate: tolerance:1%
method: {class_path: lightning_nrl.ParticleSwarm, init_args: {particles: 10, iterations: 5}}
search: {fitness: eq2, n_passed: 100}
samples: {slices: "digit_models:camera", quotas: {noisy: 1}}
verbose: false
"""

OBJECTS = """
layer: [network.1, network.3]
target:
  class_path: lightning_nrl.data.And
  init_args:
    left: {class_path: lightning_nrl.data.Where, init_args: {predicate: "digit_models:is_noisy"}}
    right:
      class_path: lightning_nrl.data.Not
      init_args: {target: {class_path: lightning_nrl.data.Label, init_args: {label: 1}}}
gate: {class_path: lightning_nrl.gate.Tolerance, init_args: {limit: 3}}
method:
  class_path: lightning_nrl.ParticleSwarm
  init_args: {particles: 10, iterations: 5, start: half, inertia: 0.6}
search:
  class_path: lightning_nrl.SearchOptions
  init_args:
    fitness:
      class_path: lightning_nrl.search.Fitness
      init_args: {kind: eq1, alpha: 5, perfect_intact: true}
    localizer: {class_path: lightning_nrl.localization.NeuRecoverLite, init_args: {n_weights: 12}}
task: {class_path: lightning_nrl.tasks.Multiclass}
unseen: test
calibration: val
data: {adapter: "lightning_nrl.data.adapters:unpack", start_from: best}
bounds:
  class_path: lightning_nrl.BoundOptions
  init_args: {limit: "tolerance:1%", confidence: 0.9}
verbose: false
"""


def cli(
    folder: Path, repair: str, *arguments: str, run: bool = True, kind: type = RegressionFreeRepair
) -> LightningCLI:
    config = yaml.safe_load(TRAINER)
    entry = {
        "class_path": f"lightning_nrl.{kind.__name__}",
        "init_args": yaml.safe_load(repair) or {},
    }
    config["trainer"] |= {"callbacks": [entry], "default_root_dir": str(folder)}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    args = ["fit"] if run else []
    return LightningCLI(
        save_config_callback=None,
        run=run,
        args=[*args, "--config", str(file), *arguments],
        seed_everything_default=0,
    )


def repair_of(found: LightningCLI) -> Any:
    (repair,) = (c for c in found.trainer.callbacks if isinstance(c, RegressionFreeRepair))
    return repair


def test_words_in_a_file_make_a_repair(tmp_path):
    found = cli(tmp_path, WORDS)
    settings = repair_of(found).settings
    assert settings.target == Target.label(3) & ~Target.where("digit_models:is_noisy")
    assert settings.gate == Tolerance(0.01)
    assert settings.fitness == Fitness("eq2")
    assert settings.method == ParticleSwarm(particles=10, iterations=5)
    assert repair_of(found).report.target == "label 3 and not where digit_models:is_noisy"
    assert (tmp_path / "repair" / "report.json").exists()


WITHIN = """
every_n_epochs: 2
monitor: val_loss
at_end: false
target: label 3 or label 8
method: convex
verbose: false
"""


def test_a_file_makes_repairs_within_the_training(tmp_path):
    repair = repair_of(cli(tmp_path, WITHIN, run=False, kind=RepairInTraining))
    assert isinstance(repair, RepairInTraining)
    assert (repair.every_n_epochs, repair.monitor, repair.at_end) == (2, "val_loss", False)
    assert repair.settings.target == Target.label(3) | Target.label(8)


def test_objects_in_a_file_make_a_repair(tmp_path):
    found = cli(tmp_path, OBJECTS)
    settings = repair_of(found).settings
    assert settings.layer == ["network.1", "network.3"]
    assert str(settings.target) == "where digit_models:is_noisy and not label 1"
    assert settings.gate == Tolerance(3)
    assert settings.fitness == Fitness("eq1", alpha=5, perfect_intact=True)
    assert settings.method == ParticleSwarm(particles=10, iterations=5, start="half", inertia=0.6)
    assert settings.localizer == NeuRecoverLite(n_weights=12)
    assert set(repair_of(found).report.layers) <= {"network.1", "network.3"}


def test_a_file_may_leave_everything_out_and_the_command_line_may_add_or_do_alone(tmp_path):
    added = ["seed=5", "method=lightning_nrl.ParticleSwarm", "method.particles=7"]
    settings = repair_of(
        cli(tmp_path, "", *(f"--trainer.callbacks.{one}" for one in added), run=False)
    ).settings
    assert settings.seed == 5
    assert settings.gate == Instance()
    assert settings.method == ParticleSwarm(particles=7)
    arguments = [
        "--trainer.logger=false",
        "--trainer.callbacks+=lightning_nrl.RegressionFreeRepair",
        "--trainer.callbacks.target=lightning_nrl.data.Label",
        "--trainer.callbacks.target.label=3",
    ]
    found = LightningCLI(Classifier, Digits, save_config_callback=None, run=False, args=arguments)
    assert repair_of(found).settings.target == Target.label(3)


def test_a_printed_configuration_can_be_read_again(tmp_path, capsys):
    arguments = ["fit", "--trainer.callbacks+=lightning_nrl.RegressionFreeRepair", "--print_config"]
    with pytest.raises(SystemExit):
        LightningCLI(Classifier, Digits, args=arguments)
    (entry,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_nrl.RegressionFreeRepair"
    assert entry["init_args"]["gate"] == "instance"
    assert entry["init_args"]["layer"] == "auto"
    again = repair_of(cli(tmp_path, yaml.safe_dump(entry["init_args"]), run=False))
    assert again.settings == RegressionFreeRepair().settings


PARTS = {
    "task: {class_path: lightning_nrl.tasks.Segmentation, init_args: {iou: 0.7, classes: [1]}}": (
        Segmentation(0.7, (1,))
    ),
    "task: {class_path: lightning_nrl.tasks.Custom,"
    " init_args: {passed: 'torch:eq', loss: 'torch:dist'}}": Custom("torch:eq", "torch:dist"),
    "method: {class_path: toy_searcher.RandomLocalSearch, init_args: {iterations: 3}}": (
        RandomLocalSearch(iterations=3)
    ),
    "method: {class_path: lightning_nrl.methods.Auto, init_args: {swarm: "
    "{class_path: lightning_nrl.ParticleSwarm, init_args: {particles: 9}}}}": (
        Auto(ParticleSwarm(particles=9))
    ),
    "method: arachne-de\nsearch: {localizer: random}": bundle("arachne-de", localizer="random"),
}


@pytest.mark.parametrize("words", PARTS, ids=lambda words: words[:40])
def test_tasks_and_methods_have_names_and_arguments(tmp_path, words):
    made = repair_of(cli(tmp_path, words, run=False))
    found = made.trainer_repair.task if words.startswith("task") else made.settings.method
    assert repr(found) == repr(PARTS[words])
