"""chemprop's MPNN for binary classification, with its own data points, data set and loader.

`predict_step` gives a probability; the adapter gives the logit behind it. The checkpoint holds objects (metrics and the
classes of the parts).
"""

from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
from chemprop import data, models, nn
from rdkit.Chem import Crippen, MolFromSmiles
from uses import Project, main

from lightning_nrl import DataOptions

PARTS = ["C", "CC", "C(C)", "O", "N", "C(=O)", "c1ccccc1", "C(F)", "S", "C(Cl)", "C(=O)N", "C1CCCCC1"]


def molecules(n: int, seed: int) -> data.MoleculeDataset:
    """Chains of random parts; the class says whether their estimated logP is above 2."""
    chance = random.Random(seed)
    smiles = ["C" + "".join(chance.choices(PARTS, k=chance.randint(2, 6))) for _ in range(n)]
    wanted = [np.array([float(Crippen.MolLogP(MolFromSmiles(text)) > 2)]) for text in smiles]
    points = [data.MoleculeDatapoint.from_smi(*pair) for pair in zip(smiles, wanted, strict=True)]
    return data.MoleculeDataset(points)


def make_module() -> models.MPNN:
    mp, agg = nn.BondMessagePassing(d_h=64), nn.MeanAggregation()
    ffn = nn.BinaryClassificationFFN(input_dim=64, hidden_dim=64)
    return models.MPNN(mp, agg, ffn, batch_norm=True, metrics=[nn.metrics.BinaryAccuracy()])


def adapter(module: models.MPNN, batch: tuple) -> tuple:
    bmg, V_d, X_d, targets, *_ = batch
    return module.predictor.train_step(module.fingerprint(bmg, V_d, X_d)), targets


def project() -> Project:
    train, val = molecules(400, 0), molecules(200, 1)
    return Project(
        package="chemprop",
        lightning=L,
        make_module=make_module,
        make_data=lambda: (data.build_dataloader(train, 50), data.build_dataloader(val, 50, shuffle=False)),
        metric="val/accuracy",
        epochs=6,
        options={"task": "multilabel", "data": DataOptions(adapter=adapter)},
        counting={"task": "multilabel", "adapter": adapter},
        weights_only=False,
    )


if __name__ == "__main__":
    main(__doc__, project)
