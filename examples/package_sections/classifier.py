"""MiniLM with a Linear layer, which tells the section of a package from its description."""

from __future__ import annotations

import torch
from descriptions import MINILM
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


class SectionClassifier(LightningModule):
    """MiniLM, the mean of its tokens, and a Linear layer; a batch is tokens (n x 24) and labels."""

    def __init__(self, n_sections: int, lr: float = 5e-5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = AutoModel.from_pretrained(MINILM, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, n_sections)
        self.accuracy = MulticlassAccuracy(n_sections, average="micro")

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].to(hidden)
        return self.classifier((hidden * weights).sum(1) / weights.sum(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, sections = batch
        return F.cross_entropy(self(tokens), sections)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, sections = batch
        self.accuracy(self(tokens), sections)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
