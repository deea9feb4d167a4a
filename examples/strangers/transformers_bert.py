"""A Hugging Face BERT with new weights; batches are `BatchEncoding`s of several lengths from its own collator."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytorch_lightning as L
import torch
from torch.utils.data import DataLoader
from torchmetrics import Accuracy
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DataCollatorWithPadding
from uses import Project, main

GOOD, BAD = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]
OTHER = ["the", "film", "plot", "was", "and", "very", "actors", "music", "not", "but"]


class Bert(L.LightningModule):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=vocab_size, num_labels=2, **size))
        self.accuracy = Accuracy(task="multiclass", num_classes=2)

    def forward(self, **inputs):
        return self.bert(**inputs)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(**batch).logits, batch["labels"])
        self.log("val_accuracy", self.accuracy, batch_size=len(batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def tokenizer() -> BertTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]))
        return BertTokenizer(str(path))


def reviews(n: int, seed: int, encode: BertTokenizer) -> list[dict]:
    """Sentences of several lengths; the label says whether good words outnumber bad ones, turned over by `not`."""
    generator = torch.Generator().manual_seed(seed)
    words, made = GOOD + BAD + OTHER, []
    while len(made) < n:
        length = int(torch.randint(5, 16, (1,), generator=generator))
        text = [words[i] for i in torch.randint(len(words), (length,), generator=generator)]
        score = sum((word in GOOD) - (word in BAD) for word in text) * (-1) ** text.count("not")
        if score:
            made.append({**encode(" ".join(text)), "labels": int(score > 0)})
    return made


def project() -> Project:
    encode = tokenizer()
    train, val = reviews(400, 0, encode), reviews(200, 1, encode)
    collate = DataCollatorWithPadding(encode)
    return Project(
        package="transformers",
        lightning=L,
        make_module=lambda: Bert(encode.vocab_size),
        make_data=lambda: (
            DataLoader(train, 50, shuffle=True, collate_fn=collate),
            DataLoader(val, 50, collate_fn=collate),
        ),
        epochs=8,
    )


if __name__ == "__main__":
    main(__doc__, project)
