"""Object detection, in the form of torchvision's models and batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from digit_models import quiet_trainer
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nrl import ConfigurationError, RegressionFreeRepair, RegressionMetrics, ReleaseGate

N_CLASSES = 4


class Detector(LightningModule):
    """A box for each class with a score of more than 0.05; a mapping of losses in training."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.scores = nn.Conv2d(3, N_CLASSES, 3)
            self.boxes = nn.Conv2d(3, 4 * N_CLASSES, 3)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        detections = []
        loss = 0.0
        for i, image in enumerate(images):
            scores = 8 * self.scores(image).mean((1, 2))
            boxes = self.boxes(image).mean((1, 2)).view(N_CLASSES, 4)
            if self.training:
                loss += scores.logsumexp(0) - scores[targets[i]["labels"]].mean()
            kept = (scores.sigmoid() > 0.05).nonzero().flatten()
            found = {"boxes": boxes[kept], "labels": kept, "scores": scores[kept].sigmoid()}
            detections.append(found)
        return {"loss_classifier": loss} if self.training else detections

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the training has begun")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(list(batch[0]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def images(n: int = 60) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images of two sizes with one to three boxes each."""
    samples = []
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        labels = torch.randperm(N_CLASSES, generator=generator)[: 1 + i % 3]
        target = {"boxes": torch.rand(len(labels), 4, generator=generator), "labels": labels}
        samples.append((torch.randn(3, 8, 8 + i % 2, generator=generator), target))
    return samples


def loader() -> DataLoader:
    return DataLoader(images(), 16, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


@pytest.mark.parametrize(
    "callback",
    [RegressionFreeRepair(), RegressionMetrics(Detector(1)), ReleaseGate(Detector(1))],
)
def test_detection_is_refused_in_these_words(callback, tmp_path):
    trainer = quiet_trainer(tmp_path, callback, enable_checkpointing=False)
    message = r"object detection and instance segmentation are not supported\.\nHINT: judge which"
    run = partial(trainer.fit, Detector(), loader(), loader())
    if isinstance(callback, ReleaseGate):
        run = partial(trainer.test, Detector(), loader())
    with pytest.raises(ConfigurationError, match=message):
        run()


def classes_found(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The adapter of docs/modules.md."""
    images, targets = batch
    floor = torch.zeros(N_CLASSES)
    outputs = module(list(images))
    scores = [floor.scatter_reduce(0, x["labels"], x["scores"], "amax") for x in outputs]
    truth = [floor.index_fill(0, x["labels"], 1.0) for x in targets]
    return torch.stack(scores).logit(1e-4), torch.stack(truth)


def test_the_classes_found_can_be_judged(tmp_path):
    old, new = Detector(1), Detector(0)
    gate = ReleaseGate(old, task="multilabel", adapter=classes_found, verbose=False)
    quiet_trainer(tmp_path, gate).test(new, loader(), verbose=False)
    by_model = []
    for model in (old.eval(), new.eval()):
        right = []
        for image, target in images():
            (found,) = model([image])
            named = set(found["labels"][found["scores"] > 0.5].tolist())
            right.append(named == set(target["labels"].tolist()))
        by_model.append(torch.tensor(right))
    was, now = by_model
    counts = gate.report.rows[0].counts
    assert (counts.broken, counts.repaired) == (int((was & ~now).sum()), int((~was & now).sum()))
    assert counts.repaired
