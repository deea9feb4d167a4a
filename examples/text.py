"""Repairs a text classifier: is a line of a message prose, or is it code?

    python examples/text.py

The lines are those of Python's own standard library: code, and the prose of its docstrings. Then people begin to paste
interactive sessions, lines such as `>>> x = sorted(names)`. They are code, and many are taken for prose. Nothing is
downloaded; figures differ a little with the version of Python, whose library it is.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from output import start, summary
from rich import print
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_nrl import RegressionFreeRepair, Target

CODE, PROSE, SESSION = range(3)
VOCABULARY, LENGTH = 8192, 24


def lines() -> tuple[list[str], list[str], list[str]]:
    """Distinct lines of code, of docstrings, and of interactive sessions inside of these."""
    code, prose, sessions = {}, {}, {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        written = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for line in map(str.strip, (ast.get_docstring(node) or "").splitlines()):
                    if len(line) > 12 and not line.startswith("..."):
                        (sessions if line.startswith(">>>") else prose)[line] = None
            elif isinstance(node, (ast.Assign, ast.Return, ast.If, ast.For)):
                code[written[node.lineno - 1].strip()] = None
    return list(code), list(prose), list(sessions)


def encoded(text: str) -> Tensor:
    """The numbers of its words and signs, `LENGTH` of them; 0 is nothing."""
    words = re.findall(r"\w+|[^\w\s]", text)[:LENGTH]
    numbers = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words]
    return torch.tensor(numbers + [0] * (LENGTH - len(numbers)))


class Messages(LightningDataModule):
    """Batches of `(words, prose, session)`; no line is in two splits, and no session in the training data."""

    def __init__(self, size: int) -> None:
        super().__init__()
        found = lines()
        for texts in found:
            random.Random(0).shuffle(texts)
        code, prose, sessions = map(iter, found)
        few = size // 8
        self.data = {}
        for split, n, n_sessions in (("train", size, 0), ("repair", 2 * few, few), ("test", 4 * few, few)):
            chosen = islice(code, n), islice(prose, n), islice(sessions, n_sessions)
            self.data[split] = [
                (encoded(text), int(kind == PROSE), kind == SESSION)
                for kind, texts in zip((CODE, PROSE, SESSION), chosen, strict=True)
                for text in texts
            ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data["train"], 64, shuffle=True)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.data["repair"], 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 512)


class BagOfWords(LightningModule):
    """The mean of the words' vectors, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(VOCABULARY, 32, padding_idx=0)
        self.kind = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, words: Tensor) -> Tensor:
        return self.kind(self.words(words))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        words, prose, _session = batch
        return F.cross_entropy(self(words), prose)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def is_session(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return batch[2]


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.where(is_session), unseen="test", max_time=3 if fast else None, verbose=False
    )
    trainer = Trainer(
        max_epochs=2 if fast else 5,
        accelerator="cpu",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Messages(size=800 if fast else 3000)
    trainer.fit(BagOfWords(), datamodule=data)
    print(summary(repair=repair.report))
