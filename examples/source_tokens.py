"""Repairs a network that classifies each character of Python code, as a syntax highlighter does.

    python examples/source_tokens.py

A sample is a line of Python's standard library. Each character has a label from the module
`tokenize`: name, keyword, number, string, operator, comment or white space. A line is right if all
its characters are. No string in the training data has a prefix, such as b"bytes" or r"raw". Later
data have such strings. Nothing is downloaded. The counts depend on the version of Python.
"""

from __future__ import annotations

import io
import keyword
import random
import re
import sysconfig
import tokenize
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, seed_everything
from output import Splits, quiet_trainer, start, summary
from rich import print
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_nrl import RegressionFreeRepair, Target
from lightning_nrl.tasks import Sequence

WIDTH, IGNORED = 60, -100
NAME, KEYWORD, NUMBER, STRING, OPERATOR, COMMENT, SPACE = range(7)
KINDS = {
    tokenize.NAME: NAME,
    tokenize.NUMBER: NUMBER,
    tokenize.STRING: STRING,
    tokenize.OP: OPERATOR,
    tokenize.COMMENT: COMMENT,
}
PREFIXED = re.compile(r"""(?<!\w)[bBrRuU]{1,2}["']""")
SPLITS = {
    "train": (3_000, 0.0),
    "repair": (900, 0.25),
    "test": (1_200, 0.25),
}  # lines, share of lines with prefixes


def labels_of(line: str) -> list[int] | None:
    """Returns the label of each character, or None if the line is no complete code."""
    labels = [SPACE] * len(line)
    try:
        for token in tokenize.generate_tokens(io.StringIO(line).readline):
            if token.start[0] == token.end[0] == 1 and token.type in KINDS:
                kind = KEYWORD if keyword.iskeyword(token.string) else KINDS[token.type]
                labels[token.start[1] : token.end[1]] = [kind] * len(token.string)
            elif token.type in (tokenize.ERRORTOKEN, getattr(tokenize, "FSTRING_START", -1)):
                return None
    except (tokenize.TokenError, SyntaxError):
        return None
    return labels


def prefixed(line: str, labels: list[int]) -> bool:
    """True if a string of the line has a prefix.

    Text inside comments and other strings does not count.
    """
    starts = (match.start() for match in PREFIXED.finditer(line))
    return any(labels[at] == STRING and (at == 0 or labels[at - 1] != STRING) for at in starts)


def lines() -> list[str]:
    """Returns the distinct lines of the standard library, stripped, in the order of its files."""
    folder, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(folder.glob("*.py")):
        for line in map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
            if 8 <= len(line) <= WIDTH and line.isascii() and not re.search(r"[fF]['\"]", line):
                found[line] = None
    return list(found)


class Code(Splits):
    """Batches of `(characters, labels, prefixed)`.

    Lines are padded to `WIDTH`; splits do not overlap.
    """

    def __init__(self, seed: int = 0, share: float = 1.0) -> None:
        super().__init__()
        code, rng = lines(), random.Random(seed)
        rng.shuffle(code)
        code.sort(
            key=lambda line: not PREFIXED.search(line)
        )  # lines with a prefix are rare, so they come first
        sizes = {split: round(n * share) for split, (n, _) in SPLITS.items()}
        counts = {split: round(sizes[split] * prefixes) for split, (_, prefixes) in SPLITS.items()}
        wanted = {True: sum(counts.values()), False: sum(sizes.values()) - sum(counts.values())}
        pools: dict[bool, list[tuple[str, list[int]]]] = {True: [], False: []}
        for line in code:
            labels = labels_of(line)
            if labels is not None:
                pools[prefixed(line, labels)].append((line, labels))
            if all(len(pools[kind]) >= n for kind, n in wanted.items()):
                break
        rng.shuffle(pools[False])
        self.data = {}
        for split, n in sizes.items():
            kinds = [True] * counts[split] + [False] * (n - counts[split])
            rows = [pools[kind].pop() for kind in kinds]
            characters = torch.tensor(
                [[ord(c) for c in line.ljust(WIDTH, "\0")] for line, _ in rows]
            )
            labels = torch.tensor(
                [labels + [IGNORED] * (WIDTH - len(labels)) for _, labels in rows]
            )
            self.data[split] = TensorDataset(characters, labels, torch.tensor(kinds))


class Colours(LightningModule):
    """Character embedding, bidirectional GRU and a Linear layer; logits are `n x WIDTH x 7`."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, 24)
        self.read = nn.GRU(24, 48, batch_first=True, bidirectional=True)
        self.kind = nn.Linear(96, 7)

    def forward(self, characters: Tensor) -> Tensor:
        return self.kind(self.read(self.characters(characters))[0])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        characters, labels, _ = batch
        return F.cross_entropy(self(characters).transpose(1, 2), labels, ignore_index=IGNORED)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        task=Sequence(ignore_index=IGNORED),
        target=Target.where(lambda batch: batch[2], name="prefixed"),
        unseen="test",
        max_time=5 if fast else None,
        verbose=False,
    )
    quiet_trainer(3 if fast else 5, repair).fit(
        Colours(), datamodule=Code(share=0.2 if fast else 1.0)
    )
    print(summary(repair=repair.report))
