"""Reads a project (trainer, model, data, options of the repair) by LightningCLI."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core.imports import RequirementCache

from lightning_nrl._trainer.lightning.packages import classes
from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl._utils.registry import import_function
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.entrypoints.arguments import OPTION_CLASSES, is_used
from lightning_nrl.errors import ConfigurationError, RepairError
from lightning_nrl.release.release_report import OnUndecided
from lightning_nrl.release.rule_parsing import Require

if TYPE_CHECKING:  # an optional dependency
    import jsonargparse

HYPER_PARAMETERS = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
"""Keys in a checkpoint under which LightningCLI saves the classes of model and data."""

NEEDED = "jsonargparse[signatures]>=4.51"  # as in pyproject.toml
FULL_HELP = "--help_lightning"
OWN_WEIGHTS = "model"  # value of `ckpt_path`

TRUST = (
    "false: trust the checkpoint, which may hold objects that run code; "
    "true (the default): refuse objects"
)
REQUIRE = (
    "further condition on each split: not-worse (accuracy has not fallen; the default), "
    "better (sign test), any"
)
ON_UNDECIDED = "what becomes of a model that fails only for lack of samples; else exit status 3"
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
SUITE_HELP = "CSV file of samples that must stay right"
GROW = "false: only read the suite; true (the default): an accepted release adds samples to it"
JUNIT = "file for the decision as JUnit XML: a suite for each split, a case for each rule"
SUMMARY = f"file to which the report is appended in Markdown; '' means ${SUMMARY_VARIABLE}"

Values: TypeAlias = dict[str, Any]
"""Values of arguments by name."""

TypesAndHelp: TypeAlias = Mapping[str, tuple[Any, str]]
"""Type and help text of arguments by name."""

PROJECT_ARGUMENTS: TypesAndHelp = {
    "ckpt_path": (
        str,
        f"checkpoint of the trained model, or `{OWN_WEIGHTS}` "
        "if the model's code loads its weights",
    ),
    "weights_only": (bool, TRUST),
}
OWN_ARGUMENTS: Mapping[str, TypesAndHelp] = {
    "repair": {
        "require": (
            Require,
            "condition on unseen samples: better (sign test), not-worse (no net loss), "
            "any (default)",
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
        "on_undecided": (OnUndecided, ON_UNDECIDED),
        "suite": (str, SUITE_HELP),
        "grow": (bool, GROW),
        "junit": (str, JUNIT),
        "summary": (str, SUMMARY),
    },
}
"""Arguments that a command takes in addition to `PROJECT_ARGUMENTS`."""


@dataclass(frozen=True)
class Project:
    """Model, data and options of a command."""

    source: Values  # arguments for trainer, model, data module and checkpoint
    options: Values  # arguments of `RegressionFreeRepair` that differ from the defaults
    arguments: Values  # values of `PROJECT_ARGUMENTS` and `OWN_ARGUMENTS`


def read_project(command: str, purpose: str, arguments: Sequence[str]) -> Project:
    """Reads a project from arguments of the command and of LightningCLI.

    They include no subcommand such as `fit`. Options under `repair` override the options of a
    `RegressionFreeRepair` among the trainer's callbacks.
    """
    program = f"lightning-nrl {command}"
    added = {**PROJECT_ARGUMENTS, **OWN_ARGUMENTS.get(command, {})}
    if not {"-h", "--help"}.isdisjoint(arguments):
        _print_help(command, program, purpose, added)
        raise SystemExit(0)
    if not RequirementCache(NEEDED):
        raise RepairError(
            f"`{program}` reads YAML with {NEEDED}, which is not installed.",
            'python -m pip install "lightning_nrl[cli]"',
        )
    sketch = _early_arguments(program, arguments)
    words = [*_from_checkpoint(sketch), *arguments]
    make_cli = type(
        "ProjectCLI", (_ProjectArguments, _cli_class(sketch["model"])), {"added": added}
    )
    try:
        cli = make_cli(
            save_config_callback=None,
            run=False,
            args=["--help" if word == FULL_HELP else word for word in words],
            seed_everything_default=False,
            parser_kwargs={
                "prog": program,
                "description": purpose,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
        )
    except (ValueError, argparse.ArgumentError) as error:
        # An error of this package, quoted by jsonargparse.
        quoted = re.search(r"^ *- (.+)\n +HINT: (.+)", str(error), re.MULTILINE)
        if quoted is not None and not isinstance(error, RepairError):
            raise ConfigurationError(quoted[1], quoted[2]) from None
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
    return Project(source, cli.options(), {name: config[name] for name in added})


def _print_help(command: str, program: str, purpose: str, added: TypesAndHelp) -> None:
    project = "(--config config.yaml | --model CLASS --data CLASS) --ckpt_path best.ckpt"
    usage = f"{program} {project} [--repair.ARGUMENT VALUE ...]"
    lightning = (
        "The arguments of LightningCLI can be given too, without a subcommand: --config, --model, "
        "--model.ARGUMENT, --data, --trainer.ARGUMENT, --seed_everything and others. "
        f"{FULL_HELP} prints all arguments with their types."
    )
    parser = argparse.ArgumentParser(program, usage, purpose, lightning, add_help=False)
    for name, (_, text) in added.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    group = parser.add_argument_group("arguments of `RegressionFreeRepair`")
    docstring = inspect.getdoc(RegressionFreeRepair) or ""
    section = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for name, text in re.findall(r"^    (\w+): ((?:.|\n {5})*)", section, re.MULTILINE):
        if not is_used(command, name):
            continue
        option, purpose = f"--repair.{name}", text.replace("%", "%%")
        if name in OPTION_CLASSES:
            known = [field.name for field in fields(OPTION_CLASSES[name])]
            names = ", ".join(field for field in known if is_used(command, field))
            option, purpose = f"{option}.FIELD", f"{purpose} FIELD: {names}."
        group.add_argument(option, metavar="VALUE", help=purpose)
    parser.print_help()


class _ProjectArguments:
    """Mixin for LightningCLI.

    Adds the arguments in `added`, and those of `RegressionFreeRepair` as `repair.NAME`.
    """

    added: TypesAndHelp
    config: jsonargparse.Namespace
    config_init: jsonargparse.Namespace

    def parse_arguments(self, parser: jsonargparse.ArgumentParser, args: Any) -> None:
        self.defaults = parser.get_defaults().repair
        self.config = parser.parse_args(args)
        if not any(self.config.get(name) for name in ("ckpt_path", "old", "new")):
            raise ConfigurationError(
                "`ckpt_path` is not given, so the model has no trained weights.",
                f"add --ckpt_path best.ckpt, or --ckpt_path {OWN_WEIGHTS} "
                "if its own code loads them.",
            )

    def add_arguments_to_parser(self, parser: jsonargparse.ArgumentParser) -> None:
        parser.add_class_arguments(RegressionFreeRepair, "repair", instantiate=False)
        for name, (kind, purpose) in self.added.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=purpose)

    def before_instantiate_classes(self) -> None:
        """Moves the options of a `RegressionFreeRepair` in the callbacks to `repair`.

        Options set in `repair` stay.
        """
        callbacks = self.config.trainer.get("callbacks") or []
        if not isinstance(callbacks, list):
            callbacks = [callbacks]
        kept = []
        for entry in callbacks:
            callback = import_function("callbacks", entry.class_path)
            if not (isinstance(callback, type) and issubclass(callback, RegressionFreeRepair)):
                kept.append(entry)
                continue
            repair = self.config.repair
            for name, value in vars(entry.get("init_args", argparse.Namespace())).items():
                if name in self.defaults and repair[name] == self.defaults[name]:
                    repair[name] = value
        self.config.trainer.callbacks = kept or None

    def options(self) -> Values:
        """Returns the options that differ from their defaults."""
        values, instances = self.config.repair, self.config_init.repair
        names = [name for name in vars(instances) if values[name] != self.defaults[name]]
        return {name: instances[name] for name in names}


def _early_arguments(program: str, arguments: Sequence[str]) -> dict[str, str | None]:
    # The parser of LightningCLI is made with `model`, `data` and `ckpt_path`, so these are read
    # first.
    parser = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--model", "--model.class_path")
    parser.add_argument("--data", "--data.class_path")
    parser.add_argument("--ckpt_path")
    parsed = parser.parse_known_args(arguments)[0]
    config: Values = {}
    for part in _configurations(parsed.config):
        config |= part
    return {
        "model": parsed.model or _class_path(config.get("model")),
        "data": parsed.data or _class_path(config.get("data")),
        "ckpt_path": parsed.ckpt_path or config.get("ckpt_path"),
    }


def _from_checkpoint(sketch: Mapping[str, str | None]) -> Iterator[str]:
    """Yields arguments for the classes that LightningCLI saved in the checkpoint."""
    missing = [name for name in HYPER_PARAMETERS if sketch[name] is None]
    if not missing or sketch["ckpt_path"] in (None, OWN_WEIGHTS):
        return
    hint = "give `model` and `data` in a YAML, and a checkpoint of tensors and plain values."
    checkpoint = load_mapping("ckpt_path", sketch["ckpt_path"], hint)
    for name in missing:
        init_args = dict(checkpoint.get(HYPER_PARAMETERS[name]) or {})
        init_args.pop("_instantiator", None)
        class_path = init_args.pop("_class_path", None)
        if class_path is not None:
            entry = json.dumps({"class_path": class_path, "init_args": init_args})
            yield f"--{name}={entry}"


def _configurations(paths: Sequence[str]) -> Iterator[Values]:
    import yaml

    for path in paths:
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"`config={str(path)!r}` is no text.",
                "give YAML, such as the config.yaml that LightningCLI writes; "
                "a checkpoint is `--ckpt_path`.",
            ) from error
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser reports the error
        if isinstance(config, dict):
            yield config


def _class_path(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("class_path")
    return entry if isinstance(entry, str) else None


def _cli_class(model: str | None) -> Any:
    """Returns the LightningCLI of the model's package, or of the first installed package."""
    cli_classes = classes("pytorch.cli.LightningCLI")
    try:
        model_class = import_function("model", model) if model else None
    except ConfigurationError:
        return cli_classes[0]  # LightningCLI reports the error
    for base, cli_class in zip(classes("pytorch.LightningModule"), cli_classes, strict=True):
        if isinstance(model_class, type) and issubclass(model_class, base):
            return cli_class
    return cli_classes[0]
