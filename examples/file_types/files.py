"""Files of Debian packages with labels by their extension, in two halves of the packages."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import torch
from classifier import CONFIG, LABEL_INDEX, LABELS
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

EXTENSIONS = {
    **dict.fromkeys((".pl", ".pm"), "perl"),
    **dict.fromkeys((".cc", ".cpp", ".hpp"), "cpp"),
    **dict.fromkeys((".yaml", ".yml"), "yaml"),
    **dict.fromkeys((".el", ".lisp"), "lisp"),
    **dict.fromkeys((".html", ".htm"), "html"),
    **dict.fromkeys((".ml", ".mli"), "ocaml"),
    **dict.fromkeys((".erl", ".hrl"), "erlang"),
    ".css": "css",
    ".gif": "gif",
    ".go": "go",
    ".hs": "haskell",
    ".java": "java",
    ".jl": "julia",
    ".js": "javascript",
    ".json": "json",
    ".lua": "lua",
    ".m": "matlab",  # Octave; only in its packages
    ".md": "markdown",
    ".otf": "otf",
    ".pdf": "pdf",
    ".php": "php",
    ".png": "png",
    ".proto": "proto",
    ".py": "python",
    ".R": "r",
    ".rb": "ruby",
    ".rs": "rust",
    ".rst": "rst",
    ".scss": "scss",
    ".sql": "sql",
    ".svg": "svg",
    ".tcl": "tcl",
    ".toml": "toml",
    ".ts": "typescript",
    ".ttf": "ttf",
    ".woff": "woff",
    ".woff2": "woff2",
    ".xml": "xml",
    ".zig": "zig",
}
LEAST_BYTES = 32
SHOWN_BYTES = 400


class PackageFiles(LightningDataModule):
    """Distinct files: those of one half of the packages to train on, the others to test.

    At most `most_of_a_kind` have the same label and package.
    """

    def __init__(self, folder: str, most_of_a_kind: int = 20) -> None:
        super().__init__()
        paths, labels, packages = _labelled(Path(folder), most_of_a_kind)
        self.packages = sorted(set(packages))
        known = torch.tensor([_is_known(package) for package in packages])
        inputs = torch.stack([features(path) for path in paths])
        labels = torch.tensor([LABEL_INDEX[label] for label in labels])
        numbers = torch.tensor([self.packages.index(package) for package in packages])
        self.data = {
            split: TensorDataset(inputs[rows], labels[rows], numbers[rows])
            for split, rows in {"train": known, "test": ~known}.items()
        }
        for dataset in self.data.values():
            dataset.classes = LABELS

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data["train"], 128, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 128)


def package(batch: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """Returns the package of each file, for `SampleOptions(groups=...)`."""
    _files, _labels, packages = batch
    return [f"package {number}" for number in packages.tolist()]


def beginning(sample: tuple[Tensor, Tensor, Tensor]) -> str:
    """Returns the first bytes of a file as text, for `DataOptions(render=...)`."""
    files, _label, _package = sample
    return bytes(byte for byte in files[:SHOWN_BYTES].tolist() if byte < 256).decode("latin-1")


def features(path: Path) -> Tensor:
    """Returns the first and the last 1,024 bytes as Magika reads them: stripped, padded by 256."""
    content = path.read_bytes()
    first = content[: CONFIG["block_size"]].lstrip()[: CONFIG["beg_size"]]
    last = content[-CONFIG["block_size"] :].rstrip()[-CONFIG["end_size"] :]
    padded = torch.full((CONFIG["beg_size"] + CONFIG["end_size"],), CONFIG["padding_token"])
    padded[: len(first)] = torch.tensor(list(first))
    padded[len(padded) - len(last) :] = torch.tensor(list(last))
    return padded


def _labelled(folder: Path, most_of_a_kind: int) -> tuple[list[Path], list[str], list[str]]:
    """Returns paths, labels and packages of distinct files."""
    seen: set[bytes] = set()
    counts: Counter[tuple[str, str]] = Counter()
    rows = []
    for path in sorted(folder.glob("*/**/*")):
        label = EXTENSIONS.get(path.suffix)
        package = path.relative_to(folder).parts[0]
        is_octave = package.startswith("octave-")
        if label is None or path.is_symlink() or not path.is_file():
            continue
        if (label == "matlab" and not is_octave) or counts[label, package] == most_of_a_kind:
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if len(content.strip()) < LEAST_BYTES or digest in seen:
            continue
        seen.add(digest)
        counts[label, package] += 1
        rows.append((path, label, package))
    paths, labels, packages = zip(*rows, strict=True)
    return list(paths), list(labels), list(packages)


def _is_known(package: str) -> bool:
    return hashlib.sha256(package.encode()).digest()[0] % 2 == 0
