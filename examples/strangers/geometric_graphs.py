"""A graph classifier as in torch_geometric's Lightning examples, with its own `LightningDataset`."""

from __future__ import annotations

import pytorch_lightning as L
import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GIN, MLP, global_add_pool
from torchmetrics import Accuracy
from uses import Project, digits, main


class Model(L.LightningModule):
    """`examples/pytorch_lightning/gin.py` of torch_geometric, smaller."""

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, hidden_channels, num_layers, jk="cat")
        self.classifier = MLP([hidden_channels, hidden_channels, out_channels], norm="batch_norm")
        self.val_acc = Accuracy(task="multiclass", num_classes=out_channels)

    def forward(self, x, edge_index, batch):
        x = self.gnn(x, edge_index)
        x = global_add_pool(x, batch)
        return self.classifier(x)

    def training_step(self, data, batch_idx):
        return F.cross_entropy(self(data.x, data.edge_index, data.batch), data.y)

    def validation_step(self, data, batch_idx):
        self.val_acc(self(data.x, data.edge_index, data.batch).softmax(dim=-1), data.y)
        self.log("val_acc", self.val_acc, batch_size=data.num_graphs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def graphs(split: str) -> list[Data]:
    """Each digit as a graph: its inked pixels with their places, neighbours connected."""
    made = []
    for image, label in zip(*digits()[split], strict=True):
        places = (image[0] > 0.3).nonzero()
        near = (places[:, None] - places[None]).abs().amax(-1) == 1
        x = torch.cat([places / 7, image[0][tuple(places.T)][:, None]], 1)
        made.append(Data(x=x, edge_index=near.nonzero().T.contiguous(), y=label.reshape(1)))
    return made


def project() -> Project:
    return Project(
        package="torch_geometric",
        lightning=L,
        make_module=lambda: Model(3, 10),
        make_data=lambda: LightningDataset(graphs("train"), graphs("val"), batch_size=50, pin_memory=False),
        metric="val_acc",
        epochs=20,
    )


if __name__ == "__main__":
    main(__doc__, project)
