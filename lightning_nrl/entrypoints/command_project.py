"""Reads a project (trainer, model, data, and options of the repair) from YAML and arguments by
LightningCLI.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from lightning_nrl._trainer.lightning.packages import classes
from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl._utils.registry import import_function
from lightning_nrl.callbacks.repair import RegressionFreeRepair, RepairCallback
from lightning_nrl.entrypoints.arguments import OPTION_CLASSES, is_used
from lightning_nrl.errors import ConfigurationError, RepairError
from lightning_nrl.updates.rule_parsing import Require

HYPER_PARAMETERS = {
    "model": "hyper_parameters",
    "data": "datamodule_hyper_parameters",
}  # keys in a checkpoint

NEEDED = "jsonargparse[signatures]>=4.51"  # as in pyproject.toml
FULL_HELP = "--help_lightning"
OWN_WEIGHTS = "model"  # value of `ckpt_path`

TRUST = "false: trust the checkpoint, which may hold objects that run code; true (the default): refuse objects"

REQUIRE = "further condition on each split: not-worse (accuracy has not fallen; the default), better (sign test), any"

PROJECT_ARGUMENTS: Mapping[str, tuple[Any, str]] = {
    "ckpt_path": (
        str,
        f"checkpoint of the trained model, or `{OWN_WEIGHTS}` if the model's code loads its weights",
    ),
    "weights_only": (bool, TRUST),
}
OWN_ARGUMENTS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "repair": {
        "require": (
            Require,
            "condition on unseen samples: better (sign test), not-worse (no net loss), any (default)",
        )
    },
    "compare": {
        "methods": (
            list[str],
            "methods and baselines by name, such as [convex, fine-tuning]; by default, a selection",
        ),
        "old": (
            str,
            "checkpoint, or predictions (CSV), of the model in use, against which `new` is tested",
        ),
        "new": (str, "checkpoint of the model that is to replace the model in use"),
        "rules": (
            list[str],
            "rules that `new` must meet, as in the command `release`; [instance] by default",
        ),
        "require": (Require, REQUIRE),
    },
}
"""Arguments that a command takes in addition to `PROJECT_ARGUMENTS`: type and help text by name."""


@dataclass(frozen=True)
class Project:
    """Model, data and options of a command."""

    source: dict[str, Any]  # arguments for trainer, model, data module and checkpoint
    options: dict[str, Any]  # arguments of `RegressionFreeRepair` that differ from the defaults
    own: dict[str, Any]  # values of `PROJECT_ARGUMENTS` and `OWN_ARGUMENTS`


def read_project(command: str, purpose: str, arguments: Sequence[str]) -> Project:
    """Reads a project from arguments of the command and of LightningCLI. They include no subcommand
    such as `fit`.

    Options under `repair` override the options of a `RegressionFreeRepair` among the trainer's
    callbacks.
    """
    program, own = (
        f"lightning-nrl {command}",
        {**PROJECT_ARGUMENTS, **OWN_ARGUMENTS.get(command, {})},
    )
    if not {"-h", "--help"}.isdisjoint(arguments):
        _print_help(command, program, purpose, own)
        raise SystemExit(0)
    if not RequirementCache(NEEDED):
        hint = 'python -m pip install "lightning_nrl[cli]"'
        raise RepairError(f"`{program}` reads YAML with {NEEDED}, which is not installed.", hint)
    sketch = _early_arguments(program, arguments)
    kind = type("ProjectCLI", (_ProjectArguments, _cli_class(sketch["model"])), {"own": own})
    try:
        cli = kind(
            save_config_callback=None,
            run=False,
            args=[
                *_from_checkpoint(sketch),
                *("--help" if word == FULL_HELP else word for word in arguments),
            ],
            seed_everything_default=False,
            parser_kwargs={"prog": program, "description": purpose, "exit_on_error": False},
        )
    except (ValueError, argparse.ArgumentError) as error:
        listed = re.search(
            r"^ *- (.+)\n +HINT: (.+)", str(error), re.MULTILINE
        )  # our error, quoted by jsonargparse
        if listed is not None and not isinstance(error, RepairError):
            raise ConfigurationError(listed[1], listed[2]) from None
        if isinstance(error, argparse.ArgumentError):
            hint = f"name a project by --config, or by --model and --data; see `{program} --help`."
            raise ConfigurationError(f"{error}.", hint) from None
        raise
    config = cli.config_init
    source = {
        "trainer": cli.trainer,
        "model": cli.model,
        "datamodule": cli.datamodule,
        "ckpt_path": None if config.ckpt_path == OWN_WEIGHTS else config.ckpt_path,
        "weights_only": config.weights_only is not False,
    }
    return Project(source, cli.options(), {name: config[name] for name in own})


def _print_help(
    command: str, program: str, purpose: str, own: Mapping[str, tuple[Any, str]]
) -> None:
    project = "(--config config.yaml | --model CLASS --data CLASS) --ckpt_path best.ckpt"
    usage = f"{program} {project} [--repair.ARGUMENT VALUE ...]"
    lightning = (
        "The arguments of LightningCLI can be given too, without a subcommand: --config, --model, --model.ARGUMENT, "
        f"--data, --trainer.ARGUMENT, --seed_everything and others. {FULL_HELP} prints all arguments with their types."
    )
    parser = argparse.ArgumentParser(program, usage, purpose, lightning, add_help=False)
    for name, (_, text) in own.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    group = parser.add_argument_group("arguments of `RegressionFreeRepair`")
    section = (
        (inspect.getdoc(RegressionFreeRepair) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    )
    for name, text in re.findall(r"^    (\w+): ((?:.|\n {5})*)", section, re.MULTILINE):
        if command == "compare" and not is_used(command, name):
            continue
        inside = (
            ", ".join(field.name for field in fields(OPTION_CLASSES[name]))
            if name in OPTION_CLASSES
            else ""
        )
        option, more = (f"{name}.FIELD", f" FIELD: {inside}.") if inside else (name, "")
        group.add_argument(
            f"--repair.{option}", metavar="VALUE", help=text.replace("%", "%%") + more
        )
    parser.print_help()


class _ProjectArguments:
    """Mixin for LightningCLI. Adds the arguments in `own`, and those of `RegressionFreeRepair` as
    `repair.NAME`.
    """

    own: Mapping[str, tuple[Any, str]]
    config: Any
    config_init: Any

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.defaults = parser.get_defaults().repair
        self.config = parser.parse_args(args)
        if not any(self.config.get(name) for name in ("ckpt_path", "old", "new")):
            problem = "`ckpt_path` is not given, so the model has no trained weights."
            hint = f"add --ckpt_path best.ckpt, or --ckpt_path {OWN_WEIGHTS} if its own code loads them."
            raise ConfigurationError(problem, hint)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(RegressionFreeRepair, "repair", instantiate=False)
        for name, (kind, purpose) in self.own.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=purpose)

    def before_instantiate_classes(self) -> None:
        """Moves the options of a `RegressionFreeRepair` in the callbacks to `repair`. Options set
        in `repair` stay.
        """
        callbacks = self.config.trainer.get("callbacks")
        listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        for entry in listed:
            if _is_repair(entry.class_path):
                for name, value in vars(entry.get("init_args", argparse.Namespace())).items():
                    if name in self.defaults and self.config.repair[name] == self.defaults[name]:
                        self.config.repair[name] = value
        self.config.trainer.callbacks = [
            entry for entry in listed if not _is_repair(entry.class_path)
        ] or None

    def options(self) -> dict[str, Any]:
        given, made = self.config.repair, self.config_init.repair
        return {name: made[name] for name in vars(made) if given[name] != self.defaults[name]}


def _early_arguments(program: str, arguments: Sequence[str]) -> dict[str, str | None]:
    # The parser of LightningCLI is made with `model`, `data` and `ckpt_path`, so these are read
    # first.
    parser = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", f"--{name}.class_path")
    parser.add_argument("--ckpt_path")
    given = parser.parse_known_args(arguments)[0]
    found: dict[str, Any] = {}
    for config in _configurations(given.config):
        found |= config
    named = {
        name: getattr(given, name) or _class_path(found.get(name)) for name in ("model", "data")
    }
    return {**named, "ckpt_path": given.ckpt_path or found.get("ckpt_path")}


def _from_checkpoint(sketch: Mapping[str, str | None]) -> Iterator[str]:
    # LightningCLI saves the classes of model and data in the checkpoint.
    missing = [name for name in HYPER_PARAMETERS if sketch[name] is None]
    if not missing or sketch["ckpt_path"] in (None, OWN_WEIGHTS):
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
        except UnicodeDecodeError as error:
            hint = "give YAML, such as the config.yaml that LightningCLI writes; a checkpoint is `--ckpt_path`."
            raise ConfigurationError(f"`config={str(path)!r}` is no text.", hint) from error
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser reports the error
        if isinstance(found, dict):
            yield found


def _class_path(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("class_path")
    return entry if isinstance(entry, str) else None


def _cli_class(model: str | None) -> Any:
    # The LightningCLI of the model's package, or else of the first installed package.
    pairs = list(
        zip(classes("pytorch.LightningModule"), classes("pytorch.cli.LightningCLI"), strict=True)
    )
    try:
        kind: Any = None if model is None else import_function("model", model)
    except ConfigurationError:
        kind = None  # LightningCLI reports the error
    found = [cli for base, cli in pairs if isinstance(kind, type) and issubclass(kind, base)]
    return (found or [pairs[0][1]])[0]


def _is_repair(class_path: str) -> bool:
    kind: Any = import_function("callbacks", class_path)
    return isinstance(kind, type) and issubclass(kind, RepairCallback)
