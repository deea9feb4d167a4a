"""A project from YAML and arguments, made by LightningCLI, with the arguments of its repair."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_nrl._trainer.lightning.packages import classes
from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl._utils.registry import import_function
from lightning_nrl.callbacks.repair import RegressionFreeRepair, RepairCallback
from lightning_nrl.errors import ConfigurationError, RepairError
from lightning_nrl.updates.rule_parsing import Require

HYPER_PARAMETERS = {
    "model": "hyper_parameters",
    "data": "datamodule_hyper_parameters",
}  # in a checkpoint

TRUST = "false: you trust the checkpoint, which may hold objects and run their code"

REQUIRE = "beside the rules, in each split: not-worse (accuracy has not fallen; the default), better (sign test), any"

OWN_ARGUMENTS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "repair": {
        "require": (Require, "of the unseen samples: better (sign test), not-worse (no net loss); any is the default")
    },
    "compare": {
        "methods": (list[str], "repairs and baselines by name, such as [convex, fine-tuning]; all by default"),
        "old": (str, "a checkpoint, or predictions (CSV), of the model in use: `new` is tested against it"),
        "new": (str, "the checkpoint of the model that is to replace it"),
        "rules": (list[str], "what `new` must satisfy to be accepted, as in a release; [instance] by default"),
        "require": (Require, REQUIRE),
    },
}
"""Arguments that one command has beside those of every project, with their types and help."""


@dataclass(frozen=True)
class Project:
    """What a command works on."""

    source: dict[str, Any]  # trainer, model, data module and checkpoint, by argument
    options: dict[str, Any]  # arguments of `RegressionFreeRepair` that are not as by default
    own: dict[str, Any]  # see `OWN_ARGUMENTS`


def read_project(command: str, purpose: str, arguments: Sequence[str]) -> Project:
    """Reads arguments of LightningCLI without a subcommand, with `ckpt_path`, `weights_only`, `repair` and its own.

    The `RegressionFreeRepair` among the trainer's callbacks, if there is one, says how to repair, and `repair` goes
    before it.
    """
    program, own = f"lightning-nrl {command}", OWN_ARGUMENTS.get(command, {})
    if find_spec("jsonargparse") is None:
        hint = 'python -m pip install "lightning_nrl[cli]"'
        raise RepairError(f"`{program}` reads YAML with jsonargparse, which is not installed.", hint)
    sketch = _sketch(arguments)
    kind = type("ProjectCLI", (_ProjectArguments, _cli_class(sketch["model"])), {"own": own})
    cli = kind(
        save_config_callback=None,
        run=False,
        args=[*_from_checkpoint(sketch), *arguments],
        seed_everything_default=False,
        parser_kwargs={"prog": program, "description": purpose},
    )
    config = cli.config_init
    source = {
        "trainer": cli.trainer,
        "model": cli.model,
        "datamodule": cli.datamodule,
        "ckpt_path": config.ckpt_path,
        "weights_only": config.weights_only is not False,
    }
    return Project(source, cli.options(), {name: config[name] for name in own})


class _ProjectArguments:
    """Hooks of LightningCLI that add arguments."""

    own: Mapping[str, tuple[Any, str]]
    config: Any
    config_init: Any

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.defaults = parser.get_defaults().repair
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="the checkpoint of the trained model")
        parser.add_argument("--weights_only", type=bool | None, default=None, help=TRUST)
        parser.add_class_arguments(RegressionFreeRepair, "repair", instantiate=False)
        for name, (kind, purpose) in self.own.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=purpose)

    def before_instantiate_classes(self) -> None:
        """Moves arguments of the trainer's `RegressionFreeRepair` to `repair`, unless given there."""
        callbacks = self.config.trainer.get("callbacks")
        listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        for entry in listed:
            if _is_repair(entry.class_path):
                for name, value in entry.get("init_args", {}).items():
                    if name in self.defaults and self.config.repair[name] == self.defaults[name]:
                        self.config.repair[name] = value
        self.config.trainer.callbacks = [entry for entry in listed if not _is_repair(entry.class_path)] or None

    def options(self) -> dict[str, Any]:
        given, made = self.config.repair, self.config_init.repair
        return {name: made[name] for name in vars(made) if given[name] != self.defaults[name]}


def _sketch(arguments: Sequence[str]) -> dict[str, str | None]:
    """Returns `model`, `data` and `ckpt_path`, which have to be known before the arguments can be parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", f"--{name}.class_path")
    parser.add_argument("--ckpt_path")
    try:
        given = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        return dict.fromkeys(("model", "data", "ckpt_path"))
    found: dict[str, Any] = {}
    for config in _configurations(given.config):
        found |= config
    named = {name: getattr(given, name) or _class_path(found.get(name)) for name in ("model", "data")}
    return {**named, "ckpt_path": given.ckpt_path or found.get("ckpt_path")}


def _from_checkpoint(sketch: Mapping[str, str | None]) -> Iterator[str]:
    """Yields arguments for a model and data that are not named, if the checkpoint is one of LightningCLI."""
    missing = [name for name in HYPER_PARAMETERS if sketch[name] is None]
    if not missing or sketch["ckpt_path"] is None:
        return
    hint = "give `model` and `data` in a YAML, and a checkpoint of tensors and plain values."
    checkpoint = load_mapping("ckpt_path", sketch["ckpt_path"], hint)
    for name in missing:
        own = dict(checkpoint.get(HYPER_PARAMETERS[name]) or {})
        own.pop("_instantiator", None)
        class_path = own.pop("_class_path", None)
        if class_path is not None:
            yield f"--{name}={json.dumps({'class_path': class_path, 'init_args': own})}"


def _configurations(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    import yaml

    for path in paths:
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # The parser says what is wrong with it.
        if isinstance(found, dict):
            yield found


def _class_path(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("class_path")
    return entry if isinstance(entry, str) else None


def _cli_class(model: str | None) -> Any:
    """Returns LightningCLI of the package of the model's class, else of the first that is installed."""
    pairs = list(zip(classes("pytorch.LightningModule"), classes("pytorch.cli.LightningCLI"), strict=True))
    try:
        kind: Any = None if model is None else import_function("model", model)
    except ConfigurationError:
        kind = None  # LightningCLI says what is wrong with it.
    found = [cli for base, cli in pairs if isinstance(kind, type) and issubclass(kind, base)]
    return (found or [pairs[0][1]])[0]


def _is_repair(class_path: str) -> bool:
    kind: Any = import_function("callbacks", class_path)
    return isinstance(kind, type) and issubclass(kind, RepairCallback)
