"""Repairs published modules of other packages, each in a new virtual environment of its own.

    python examples/strangers.py torchgeo                        # both of torchgeo's modules
    python examples/strangers.py chemprop lightly --max_time 60

Each module is made as its own documentation says, trained on small data, and used in four ways:
repaired as training ends, repaired as a checkpoint, updated, and diagnosed. Right samples are
counted a second time by `trainer.validate`, with the metric that the module itself logs, or in the
way that `Project.count` says.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import random
import subprocess
import tempfile
import time
import traceback
import venv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from lightning_nrl import DataOptions, RegressionFreeRepair, RegressionMetrics, diagnose, repair
from lightning_nrl.tasks import Regression, Segmentation

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "torchgeo": "torchgeo requests",
    "torch_geometric": "torch_geometric pytorch-lightning",
    "chemprop": "chemprop",
    "pytorch_tabular": "pytorch-tabular requests",
    "transformers": "transformers pytorch-lightning",
    "lightly": "lightly",
    "timm": "timm torchvision pytorch-lightning",
    "torch_uncertainty": "torch-uncertainty[cpu]",
    "braindecode": "braindecode pytorch-lightning",
    "pytorch_forecasting": "pytorch-forecasting",
}
"""What is installed from the registry for each package."""
TRAINED_SAMPLES, VALIDATED_SAMPLES = 400, 200
AGREES = {True: "agrees", False: "DIFFERS"}


@dataclass(frozen=True)
class Project:
    """A module of somebody else, with data.

    Attributes:
        make_data: a data module, or loaders of training and validation data.
        metric: what the module logs as its validation accuracy, a share of `n_validated` samples.
        epochs: how long it is trained; the old model of an update for half of them.
        weights_only: False if its checkpoints hold objects.
        count: counts right validation samples where `metric` is not their share.
    """

    make_module: Callable[[], Any]
    make_data: Callable[[], Any]
    metric: str = "val_accuracy"
    n_validated: int = VALIDATED_SAMPLES
    epochs: int = 4
    task: Any = None
    adapter: Callable[[Any, Any], tuple] | None = None
    weights_only: bool = True
    count: Callable[[Any, Any, Any], int] | None = None


def digits(size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Handwritten digits of scikit-learn for `train` and `val`.

    Images are `n x 1 x size x size`; labels are their classes.
    """
    data, sizes = load_digits(), [TRAINED_SAMPLES, VALIDATED_SAMPLES]
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[
        : sum(sizes)
    ]
    images = F.interpolate(
        torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 16, size
    )
    columns = (tensor.split(sizes) for tensor in (images, torch.tensor(data.target[order])))
    return dict(zip(("train", "val"), zip(*columns, strict=True), strict=True))


def digit_pairs(size: int = 8) -> list[list[tuple[Tensor, Tensor]]]:
    """The same as lists of `(image, class)`, those to train on and those to validate on."""
    return [list(zip(*pair, strict=True)) for pair in digits(size).values()]


def loaders(train: Any, val: Any, size: int = 50, **options: Any) -> tuple[Any, Any]:
    return DataLoader(train, size, shuffle=True, **options), DataLoader(val, 50, **options)


def classifier(network: Any, lr: float, n_classes: int = 10, smoothing: float = 0.0) -> Any:
    """A plain module around a network, as the documentation of Lightning writes it."""
    import pytorch_lightning

    class Classifier(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.accuracy = Accuracy(task="multiclass", num_classes=n_classes)

        def forward(self, *args: Any, **inputs: Any) -> Any:
            return self.network(*args, **inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not isinstance(batch, (list, tuple)):
                return self(**batch).loss  # as Hugging Face has it
            images, labels = batch
            return F.cross_entropy(self(images), labels, label_smoothing=smoothing)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if isinstance(batch, (list, tuple)):
                logits, labels = self(batch[0]), batch[1]
            else:
                logits, labels = self(**batch).logits, batch["labels"]
            self.accuracy(logits, labels)
            self.log("val_accuracy", self.accuracy, batch_size=len(labels))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=lr)

    return Classifier()


def torchgeo_classification() -> Project:
    """ClassificationTask, as published: a dictionary with `image` and `label`."""
    from torchgeo.trainers import ClassificationTask

    data = [
        [{"image": x.expand(3, -1, -1), "label": y} for x, y in pairs] for pairs in digit_pairs(32)
    ]
    return Project(
        lambda: ClassificationTask(
            model="resnet18", weights=None, in_channels=3, num_classes=10, lr=1e-3
        ),
        lambda: loaders(*data, size=32),
        metric="val_OverallAccuracy",
    )


def torchgeo_segmentation() -> Project:
    """SemanticSegmentationTask, as published: ink and paper of a noisy picture.

    A picture is right at a mean IoU of 0.7 or more. The module's own validation counts pixels, so
    right images are counted again by torchmetrics on what its own `predict_step` gives.
    """
    from torchgeo.trainers import SemanticSegmentationTask
    from torchmetrics.functional import jaccard_index

    iou, data = 0.7, {}
    for split, (images, _) in digits(32).items():
        noisy = images[:100] + torch.randn(
            images[:100].shape, generator=torch.Generator().manual_seed(0)
        )
        pairs = zip(noisy, (images[:100, 0] > 0.5).long(), strict=True)
        data[split] = [{"image": image, "mask": mask} for image, mask in pairs]

    def right_images(trainer: Any, module: Any, given: dict) -> int:
        predicted = torch.cat(trainer.predict(module, given["val_dataloaders"])).argmax(1)
        pairs = ((one, sample["mask"]) for one, sample in zip(predicted, data["val"], strict=True))
        return sum(
            float(jaccard_index(one, mask, "multiclass", num_classes=2)) >= iou
            for one, mask in pairs
        )

    size = {"num_filters": 16, "in_channels": 1, "num_classes": 2}
    return Project(
        lambda: SemanticSegmentationTask(
            model="fcn", weights=None, task="multiclass", lr=5e-3, **size
        ),
        lambda: loaders(**data, size=20),
        n_validated=100,
        epochs=8,
        task=Segmentation(iou=iou),
        count=right_images,
    )


def geometric_graphs() -> Project:
    """Graph classifier as in torch_geometric's Lightning examples, with its `LightningDataset`."""
    import pytorch_lightning
    from torch_geometric.data import Data
    from torch_geometric.data.lightning import LightningDataset
    from torch_geometric.nn import GIN, MLP, global_add_pool

    class Model(pytorch_lightning.LightningModule):
        """`examples/pytorch_lightning/gin.py` of torch_geometric, smaller."""

        def __init__(self, in_channels, out_channels, hidden_channels=32, num_layers=3):
            super().__init__()
            self.gnn = GIN(in_channels, hidden_channels, num_layers, jk="cat")
            self.classifier = MLP(
                [hidden_channels, hidden_channels, out_channels], norm="batch_norm"
            )
            self.val_acc = Accuracy(task="multiclass", num_classes=out_channels)

        def forward(self, x, edge_index, batch):
            return self.classifier(global_add_pool(self.gnn(x, edge_index), batch))

        def training_step(self, data, batch_idx):
            return F.cross_entropy(self(data.x, data.edge_index, data.batch), data.y)

        def validation_step(self, data, batch_idx):
            self.val_acc(self(data.x, data.edge_index, data.batch).softmax(dim=-1), data.y)
            self.log("val_acc", self.val_acc, batch_size=data.num_graphs)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def graph(image: Tensor, label: Tensor) -> Data:
        """A digit as a graph: its inked pixels with their places, neighbours connected."""
        places = (image[0] > 0.3).nonzero()
        near = (places[:, None] - places[None]).abs().amax(-1) == 1
        x = torch.cat([places / 7, image[0][tuple(places.T)][:, None]], 1)
        return Data(x=x, edge_index=near.nonzero().T.contiguous(), y=label.reshape(1))

    train, val = ([graph(*one) for one in pairs] for pairs in digit_pairs())
    return Project(
        lambda: Model(3, 10),
        lambda: LightningDataset(train, val, batch_size=50, pin_memory=False),
        metric="val_acc",
        epochs=20,
    )


def chemprop_mpnn() -> Project:
    """The MPNN for binary classification, with chemprop's own data points, data set and loader.

    `predict_step` gives a probability; the adapter gives the logit behind it. The checkpoint holds
    objects (metrics and the classes of the parts).
    """
    from chemprop import data, models
    from chemprop import nn as blocks
    from rdkit.Chem import Crippen, MolFromSmiles

    pieces = [
        "C",
        "CC",
        "C(C)",
        "O",
        "N",
        "C(=O)",
        "c1ccccc1",
        "C(F)",
        "S",
        "C(Cl)",
        "C(=O)N",
        "C1CCCCC1",
    ]

    def molecules(n: int, seed: int) -> Any:
        """Chains of random parts; the class says whether their estimated logP is above 2."""
        chance = random.Random(seed)
        smiles = ["C" + "".join(chance.choices(pieces, k=chance.randint(2, 6))) for _ in range(n)]
        wanted = [np.array([float(Crippen.MolLogP(MolFromSmiles(text)) > 2)]) for text in smiles]
        points = [
            data.MoleculeDatapoint.from_smi(*pair) for pair in zip(smiles, wanted, strict=True)
        ]
        return data.MoleculeDataset(points)

    def make_module() -> Any:
        ffn = blocks.BinaryClassificationFFN(input_dim=64, hidden_dim=64)
        message = blocks.BondMessagePassing(d_h=64), blocks.MeanAggregation()
        return models.MPNN(
            *message, ffn, batch_norm=True, metrics=[blocks.metrics.BinaryAccuracy()]
        )

    def adapter(module: Any, batch: Any) -> tuple:
        graphs, vertices, extras, targets, *_ = batch
        return module.predictor.train_step(module.fingerprint(graphs, vertices, extras)), targets

    train, val = molecules(400, 0), molecules(200, 1)
    return Project(
        make_module,
        lambda: (data.build_dataloader(train, 50), data.build_dataloader(val, 50, shuffle=False)),
        metric="val/accuracy",
        epochs=6,
        task="multilabel",
        adapter=adapter,
        weights_only=False,
    )


def tabular_embedding() -> Project:
    """CategoryEmbedding and loaders, as pytorch-tabular's `TabularModel` prepares them for `fit`.

    The checkpoint holds objects (configurations).
    """
    import pandas
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    names = [f"part_{i}" for i in range(16)]

    def table(images: Tensor, labels: Tensor) -> pandas.DataFrame:
        """The digits as a table of sixteen numbers, a category and the digit."""
        pooled = images[:, 0].reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1).numpy()
        rows = pandas.DataFrame(pooled, columns=names)
        rows["top_heavy"] = (pooled[:, :8].sum(1) > pooled[:, 8:].sum(1)).astype(str)
        rows["digit"] = labels.numpy().astype(str)
        return rows

    logging.getLogger("pytorch_tabular").setLevel(logging.ERROR)
    tabular = TabularModel(
        data_config=DataConfig(
            target=["digit"], continuous_cols=names, categorical_cols=["top_heavy"]
        ),
        model_config=CategoryEmbeddingModelConfig(
            task="classification", layers="64-32", learning_rate=0.01
        ),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=50, accelerator="cpu", progress_bar="none"),
        verbose=False,
    )
    train, val = (table(*pair) for pair in digits().values())
    data = tabular.prepare_dataloader(train=train, validation=val, seed=0)
    return Project(
        lambda: tabular.prepare_model(data),
        lambda: (data.train_dataloader(), data.val_dataloader()),
        metric="valid_accuracy",
        weights_only=False,
    )


def transformers_vit() -> Project:
    """ViT with new weights, in a module as in Lightning's and Hugging Face's documentation."""
    from transformers import ViTConfig, ViTForImageClassification

    size = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    config = ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=10, **size)
    data = [
        [{"pixel_values": image, "labels": label} for image, label in pairs]
        for pairs in digit_pairs(16)
    ]
    return Project(
        lambda: classifier(ViTForImageClassification(config), 2e-3),
        lambda: loaders(*data),
        epochs=8,
    )


def transformers_bert() -> Project:
    """BERT with new weights; its own collator makes `BatchEncoding`s of several lengths."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertTokenizer,
        DataCollatorWithPadding,
    )

    good, bad = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]
    words = (
        good + bad + ["the", "film", "plot", "was", "and", "very", "actors", "music", "not", "but"]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        encode = BertTokenizer(str(path))

    def reviews(n: int, seed: int) -> list[dict]:
        """Sentences of several lengths.

        The label says if good words outnumber bad ones; `not` turns a word over.
        """
        generator, made = torch.Generator().manual_seed(seed), []
        while len(made) < n:
            length = int(torch.randint(5, 16, (1,), generator=generator))
            text = [words[i] for i in torch.randint(len(words), (length,), generator=generator)]
            score = sum((word in good) - (word in bad) for word in text) * (-1) ** text.count("not")
            if score:
                made.append({**encode(" ".join(text)), "labels": int(score > 0)})
        return made

    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = BertConfig(vocab_size=encode.vocab_size, num_labels=2, **size)
    train, val, collate = reviews(400, 0), reviews(200, 1), DataCollatorWithPadding(encode)
    return Project(
        lambda: classifier(BertForSequenceClassification(config), 2e-3, n_classes=2),
        lambda: loaders(train, val, collate_fn=collate),
        epochs=8,
    )


def lightly_linear() -> Project:
    """LinearClassifier on a frozen backbone, here random convolutions."""
    from lightly.utils.benchmarking import LinearClassifier

    def make_module() -> LinearClassifier:
        backbone = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
        return LinearClassifier(
            backbone, batch_size_per_device=50, lr=0.5, feature_dim=288, num_classes=10
        )

    return Project(make_module, lambda: loaders(*digit_pairs()), metric="val_top1")


def timm_augmented() -> Project:
    """A timm network in a plain module.

    The data set augments at random by torchvision's `transforms`.
    """
    import timm
    from torchvision.transforms import v2

    class Augmented(list):
        augment = v2.Compose([v2.RandomCrop(16, padding=2), v2.RandomRotation(10)])

        def __getitem__(self, index: int) -> tuple:
            image, label = super().__getitem__(index)
            return self.augment(image), label

    train, val = digit_pairs(16)
    return Project(
        lambda: classifier(
            timm.create_model("resnet10t", num_classes=10, in_chans=1), 1e-3, smoothing=0.1
        ),
        lambda: loaders(Augmented(train), val),
        epochs=8,
    )


def uncertainty_routine() -> Project:
    """ClassificationRoutine: one network, and torch-uncertainty's own metrics."""
    from torch_uncertainty.routines import ClassificationRoutine

    def make_module() -> ClassificationRoutine:
        convolutions = [
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
        ]
        network = nn.Sequential(*convolutions, nn.Linear(512, 10))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        return ClassificationRoutine(
            network, num_classes=10, loss=nn.CrossEntropyLoss(), optim_recipe=optimizer
        )

    return Project(make_module, lambda: loaders(*digit_pairs()), metric="val/cls/Acc")


def braindecode_eeg() -> Project:
    """ShallowFBCSPNet in the Lightning module of braindecode's own tutorial.

    It has no `forward` and no validation.
    """
    import pytorch_lightning
    from braindecode.datasets import create_from_X_y
    from braindecode.models import ShallowFBCSPNet

    n_channels, n_times, frequency = 8, 200, 100

    class LitModule(pytorch_lightning.LightningModule):
        """The tutorial's module, without its logging of losses."""

        def __init__(self, module):
            super().__init__()
            self.module = module
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            x, y, _ = batch
            return self.loss(self.module(x), y)

        def test_step(self, batch, batch_idx):
            x, y, _ = batch
            self.log("test_acc", (self.module(x).argmax(1) == y).float().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, T_max=self.trainer.max_epochs
            )
            return [optimizer], [scheduler]

    class Validated(LitModule):
        """What the tutorial leaves out: failures come from validation."""

        def validation_step(self, batch, batch_idx):
            self.test_step(batch, batch_idx)

    def trials(n: int, seed: int) -> Any:
        """Noise in eight channels; the class is the rhythm (9, 11 or 13 Hz) that two share."""
        chance = np.random.default_rng(seed)
        labels = chance.integers(0, 3, n)
        signals = chance.normal(0, 1, (n, n_channels, n_times))
        angles = 2 * np.pi * (9 + 2 * labels)[:, None] * np.arange(n_times) / frequency
        signals[:, :2] += 0.4 * np.sin(angles + chance.uniform(0, 6.28, (n, 1)))[:, None]
        options = {"drop_last_window": False, "sfreq": frequency, "window_size_samples": n_times}
        return create_from_X_y(signals.astype("float32"), labels, **options)

    def adapter(module: Any, batch: Any) -> tuple:
        x, y, _ = batch
        return module.module(x), y

    logging.getLogger("mne").setLevel(logging.ERROR)
    train, val = trials(400, 0), trials(200, 1)
    return Project(
        lambda: Validated(ShallowFBCSPNet(n_channels, 3, n_times=n_times)),
        lambda: loaders(train, val),
        metric="test_acc",
        epochs=6,
        adapter=adapter,
    )


def forecasting_mlp() -> Project:
    """DecoderMLP with pytorch-forecasting's own data set and loader: numbers within a tolerance.

    Its validation logs errors only; forecasts within the tolerance are counted again on what the
    module's `predict` gives. The checkpoint holds objects (encoders and normalisers of the data
    set).
    """
    import pandas
    from pytorch_forecasting import DecoderMLP, TimeSeriesDataSet
    from pytorch_forecasting.data import TorchNormalizer
    from pytorch_forecasting.metrics import MAE

    tolerance, horizon = 0.8, 4

    def series(n: int, seed: int) -> pandas.DataFrame:
        """Sales that follow two numbers that are known ahead, with noise."""
        chance = np.random.default_rng(seed)
        price, weather = chance.normal(0, 1, (2, n, 24))
        value = np.sin(2 * price) + 0.5 * weather * price + chance.normal(0, 0.1, price.shape)
        frame = {"series": np.repeat(np.arange(n), 24), "time": np.tile(np.arange(24), n)}
        columns = {"price": price.ravel(), "weather": weather.ravel(), "value": value.ravel()}
        return pandas.DataFrame({**frame, **columns}).astype({"series": str})

    def adapter(module: Any, batch: Any) -> tuple:
        x, (y, _) = batch
        return module(x).prediction[..., 0], y

    def within(trainer: Any, module: Any, data: dict) -> int:
        loader = data["val_dataloaders"]
        predicted = module.predict(
            loader, trainer_kwargs={"accelerator": "cpu", "logger": False}
        ).cpu()
        truth = torch.cat([y for _, (y, _) in loader])
        return int(((predicted - truth).abs() < tolerance).all(1).sum())

    names = {"time_idx": "time", "target": "value", "group_ids": ["series"]}
    lengths = {
        "max_encoder_length": 12,
        "max_prediction_length": horizon,
        "min_prediction_length": horizon,
    }
    reals = {
        "time_varying_known_reals": ["price", "weather"],
        "time_varying_unknown_reals": ["value"],
    }
    train = TimeSeriesDataSet(
        series(40, 0), **names, **lengths, **reals, target_normalizer=TorchNormalizer()
    )
    val = TimeSeriesDataSet.from_dataset(train, series(25, 1))
    return Project(
        lambda: DecoderMLP.from_dataset(train, hidden_size=32, learning_rate=0.01, loss=MAE()),
        lambda: (
            train.to_dataloader(train=True, batch_size=50),
            val.to_dataloader(False, batch_size=50),
        ),
        n_validated=len(val),
        task=Regression(tolerance=tolerance),
        adapter=adapter,
        epochs=10,
        weights_only=False,
        count=within,
    )


PL, LIGHTNING = "pytorch_lightning", "lightning.pytorch"
MODULES: dict[str, tuple[str, str, Callable[[], Project]]] = {
    "ClassificationTask": ("torchgeo", LIGHTNING, torchgeo_classification),
    "SemanticSegmentationTask": ("torchgeo", LIGHTNING, torchgeo_segmentation),
    "GIN": ("torch_geometric", PL, geometric_graphs),
    "MPNN": ("chemprop", LIGHTNING, chemprop_mpnn),
    "CategoryEmbeddingModel": ("pytorch_tabular", PL, tabular_embedding),
    "ViTForImageClassification": ("transformers", PL, transformers_vit),
    "BertForSequenceClassification": ("transformers", PL, transformers_bert),
    "LinearClassifier": ("lightly", PL, lightly_linear),
    "ResNet-10": ("timm", PL, timm_augmented),
    "ClassificationRoutine": ("torch_uncertainty", LIGHTNING, uncertainty_routine),
    "ShallowFBCSPNet": ("braindecode", PL, braindecode_eeg),
    "DecoderMLP": ("pytorch_forecasting", LIGHTNING, forecasting_mlp),
}
"""Each module with its package, the Lightning that it is of, and what makes it."""


class Uses:
    """The four uses of one module, in a folder; `lightning` is the package of the module."""

    def __init__(self, project: Project, lightning: Any, folder: Path, **options: Any) -> None:
        self.project, self.lightning, self.folder = project, lightning, folder
        self.options = {
            "task": project.task,
            "data": DataOptions(adapter=project.adapter),
            **options,
        }
        self.old, self.trained = folder / "old.ckpt", folder / "trained.ckpt"
        for path, seed, epochs in (
            (self.old, 1, max(1, project.epochs // 2)),
            (self.trained, 0, project.epochs),
        ):
            trainer = self.trainer(path.stem, max_epochs=epochs)
            trainer.fit(self.module(seed), **self.data())
            trainer.save_checkpoint(path)

    def trainer(self, name: str, callbacks: list[Any] | None = None, **arguments: Any) -> Any:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        arguments = {"max_epochs": self.project.epochs, "accelerator": "cpu", **quiet, **arguments}
        return self.lightning.Trainer(
            default_root_dir=self.folder / name, callbacks=callbacks, **arguments
        )

    def data(self) -> dict[str, Any]:
        data = self.project.make_data()
        if isinstance(data, self.lightning.LightningDataModule):
            return {"datamodule": data}
        return dict(zip(("train_dataloaders", "val_dataloaders"), data, strict=True))

    def module(self, seed: int = 0, path: Path | str | None = None) -> Any:
        """A new module, or one with the weights of a checkpoint."""
        self.lightning.seed_everything(seed, verbose=False)
        module = self.project.make_module()
        if path is not None:
            module.load_state_dict(
                torch.load(path, weights_only=self.project.weights_only)["state_dict"]
            )
        return module

    def right(self, path: str | Path) -> int:
        """Validation samples that a checkpoint has right, as the module itself counts them."""
        module, trainer, data = self.module(path=path), self.trainer("validate"), self.data()
        if self.project.count is not None:
            return self.project.count(trainer, module, data)
        loaders = {"dataloaders": data["val_dataloaders"]} if "val_dataloaders" in data else data
        trainer.validate(module, **loaders, verbose=False)
        return round(
            float(trainer.callback_metrics[self.project.metric]) * self.project.n_validated
        )

    def counted(self, report: Any, before: str | Path) -> str:
        """Counts targets repaired and samples broken, and right validation samples in two ways."""
        val = next(split for split in report.splits if split.split == "val")
        known = report.pooled("known")
        ours = val.passed, val.kept + val.repaired
        own = self.right(before), self.right(report.files.get("checkpoint") or before)
        return (
            f"{report.status}, {known.repaired_in_target} of {known.targeted} targets, "
            f"{known.broken} broken; right of {val.n}: {ours[0]} -> {ours[1]}, "
            f"its own validation {own[0]} -> {own[1]}: {AGREES[ours == own]}"
        )

    def fit(self) -> str:
        """The callback in a training, and nothing else."""
        callback = RegressionFreeRepair(**self.options, dirpath=self.folder / "fit" / "repair")
        trainer = self.trainer("fit", [callback])
        trainer.fit(self.module(), **self.data())
        return self.counted(callback.report, trainer.checkpoint_callback.best_model_path)

    def of_checkpoint(self) -> dict[str, Any]:
        """Arguments of a repair or a diagnosis without training."""
        loading = {"ckpt_path": self.trained, "weights_only": self.project.weights_only}
        return {**self.data(), **loading, **self.options}

    def repair(self) -> str:
        """The same of a checkpoint, without training."""
        report = repair(
            self.trainer("repair"),
            self.module(),
            **self.of_checkpoint(),
            dirpath=self.folder / "repair",
        )
        return self.counted(report, self.trained)

    def update(self) -> str:
        """Replaces an old model: counts regressions while the new one trains, and repairs them."""
        old = self.old if self.project.weights_only else self.module(path=self.old)
        metrics = RegressionMetrics(old, task=self.project.task, adapter=self.project.adapter)
        callback = RegressionFreeRepair(
            reference=old, **self.options, dirpath=self.folder / "update" / "repair"
        )
        trainer = self.trainer("update", [metrics, callback])
        trainer.fit(self.module(), **self.data())
        logged = round(
            float(trainer.callback_metrics["regression/reference_accuracy"])
            * self.project.n_validated
        )
        regressions = round(float(trainer.callback_metrics["regression/broken"]))
        line = self.counted(callback.report, trainer.checkpoint_callback.best_model_path)
        known = next(split for split in callback.report.update if split.split == "val")
        agree = logged == self.right(self.old) and regressions == known.trained.broken
        return f"{line}; old model {logged} right, {regressions} regressions: {AGREES[agree]}"

    def diagnose(self) -> str:
        """What can be repaired, before any repair."""
        found = diagnose(self.trainer("diagnose"), self.module(), **self.of_checkpoint())
        targeted, judged = found.known["targeted"], found.count("yes") + found.count("no")
        agree = targeted == self.project.n_validated - self.right(self.trained)
        fixable = (
            f"{found.count('yes')} of {judged} that could be judged"
            if judged
            else "cannot be judged"
        )
        return f"{targeted} failures: {AGREES[agree]}; can be fixed: {fixable}"


def use(name: str, max_time: float, verbose: bool) -> None:
    """Uses one module in this environment; prints a line for each use, also for one that fails."""
    package, lightning_name, make_project = MODULES[name]
    warnings.simplefilter("ignore")
    for logger in (
        "lightning.pytorch",
        "pytorch_lightning",
        "lightning.fabric",
        "lightning_fabric",
    ):
        logging.getLogger(logger).setLevel(logging.ERROR)
    lightning = importlib.import_module(lightning_name)
    print(
        f"{name}: {package} {metadata.version(package)}, {lightning_name} {lightning.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        uses = Uses(make_project(), lightning, Path(folder), max_time=max_time, verbose=verbose)
        for run in (uses.fit, uses.repair, uses.update, uses.diagnose):
            started = time.perf_counter()
            try:
                line = run()
            except Exception as error:  # a use that fails is a row of the table
                traceback.print_exc()
                line = f"FAILS {type(error).__name__}: {error}"
            print(f"  {run.__name__:8} {line} ({time.perf_counter() - started:.0f} s)", flush=True)


def python_of(package: str, folder: Path) -> Path:
    """The interpreter of a package's environment, which is made if it is not there."""
    python = folder / package / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(folder / package, with_pip=True)
        packages = [*PACKAGES[package].split(), "scikit-learn", "-e", str(ROOT)]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "packages", nargs="+", choices=PACKAGES, metavar="PACKAGE", help=", ".join(PACKAGES)
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("environments"), help="of environments (%(default)s)"
    )
    parser.add_argument(
        "--here", action="store_true", help="use this environment, which has the package"
    )
    parser.add_argument(
        "--max_time", type=float, default=20, help="seconds for each repair (%(default)s)"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the report of each repair, and errors in full"
    )
    given = parser.parse_args()
    for package in given.packages:
        if not given.here:
            options = ["--here", "--max_time", str(given.max_time), *["--verbose"] * given.verbose]
            subprocess.run(
                [python_of(package, given.folder), __file__, package, *options], check=True
            )
            continue
        for name in (name for name, (of, *_) in MODULES.items() if of == package):
            use(name, given.max_time, given.verbose)


if __name__ == "__main__":
    main()
