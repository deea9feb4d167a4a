"""pytorch-tabular's CategoryEmbedding model and loaders, as its own `TabularModel` prepares them for `fit`.

The checkpoint holds objects (configurations).
"""

from __future__ import annotations

import logging

import pandas
import pytorch_lightning as L
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from uses import Project, digits, main


def table(split: str) -> pandas.DataFrame:
    """The digits as a table of sixteen numbers, two categories and the digit."""
    images, labels = digits()[split]
    pooled = images[:, 0].reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1).numpy()
    rows = pandas.DataFrame(pooled, columns=[f"part_{i}" for i in range(16)])
    rows["top_heavy"] = (images[:, 0, :4].sum((1, 2)) > images[:, 0, 4:].sum((1, 2))).numpy().astype(str)
    rows["left_heavy"] = (images[:, 0, :, :4].sum((1, 2)) > images[:, 0, :, 4:].sum((1, 2))).numpy().astype(str)
    rows["digit"] = labels.numpy().astype(str)
    return rows


def project() -> Project:
    logging.getLogger("pytorch_tabular").setLevel(logging.ERROR)
    tabular = TabularModel(
        data_config=DataConfig(
            target=["digit"],
            continuous_cols=[f"part_{i}" for i in range(16)],
            categorical_cols=["top_heavy", "left_heavy"],
        ),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="64-32", learning_rate=0.01),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=50, accelerator="cpu", progress_bar="none"),
        verbose=False,
    )
    data = tabular.prepare_dataloader(train=table("train"), validation=table("val"), seed=0)
    return Project(
        package="pytorch_tabular",
        lightning=L,
        make_module=lambda: tabular.prepare_model(data),
        make_data=lambda: (data.train_dataloader(), data.val_dataloader()),
        metric="valid_accuracy",
        weights_only=False,
    )


if __name__ == "__main__":
    main(__doc__, project)
