"""Runs scripts of this folder, each in the virtual environment of its package, which is made first.

python examples/strangers/run.py torchgeo                # both of torchgeo's modules
python examples/strangers/run.py chemprop lightly --max_time 60
"""

from __future__ import annotations

import argparse
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1]


@dataclass(frozen=True)
class Environment:
    """What is installed from the registry, and the scripts that need it."""

    requirements: tuple[str, ...]
    scripts: tuple[str, ...]


ENVIRONMENTS = {
    "torchgeo": Environment(("torchgeo", "requests"), ("torchgeo_classification", "torchgeo_segmentation")),
    "torch_geometric": Environment(("torch_geometric", "pytorch-lightning"), ("geometric_graphs",)),
    "chemprop": Environment(("chemprop",), ("chemprop_mpnn",)),
    "pytorch_tabular": Environment(("pytorch-tabular", "requests"), ("tabular_embedding",)),
    "transformers": Environment(("transformers", "pytorch-lightning"), ("transformers_vit", "transformers_bert")),
    "lightly": Environment(("lightly",), ("lightly_linear",)),
    "timm": Environment(("timm", "torchvision", "pytorch-lightning"), ("timm_augmented",)),
    "torch_uncertainty": Environment(("torch-uncertainty[cpu]",), ("uncertainty_routine",)),
    "braindecode": Environment(("braindecode", "pytorch-lightning"), ("braindecode_eeg",)),
    "pytorch_forecasting": Environment(("pytorch-forecasting",), ("forecasting_mlp",)),
}


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of an environment; it is made if it is not there."""
    place = folder / name
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        packages = [*ENVIRONMENTS[name].requirements, "scikit-learn", "-e", f"{PACKAGE}[patch]"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=ENVIRONMENTS, metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--folder", type=Path, default=Path("environments"), help="of environments (%(default)s)")
    parser.add_argument("--max_time", type=float, default=20, help="seconds for each repair (%(default)s)")
    arguments = parser.parse_args()
    for name in arguments.names:
        python = python_of(name, arguments.folder)
        for script in ENVIRONMENTS[name].scripts:
            subprocess.run([python, HERE / f"{script}.py", "--max_time", str(arguments.max_time)], check=True)
