"""Magika's network as a LightningModule: its weights come from the ONNX file and go back to it."""

from __future__ import annotations

import json
from pathlib import Path

import magika
import onnx
import torch
from lightning.pytorch import LightningModule
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassRecall

FOLDER = Path(magika.__file__).parent / "models" / "standard_v3_3"
MODEL = FOLDER / "model.onnx"
CONFIG = json.loads((FOLDER / "config.min.json").read_text())
LABELS: list[str] = CONFIG["target_labels_space"]
LABEL_INDEX = {label: index for index, label in enumerate(LABELS)}

TENSORS = {  # parameter: the end of its name in the file
    "embedding.weight": "/Const:0",
    "embedding_bias": "/Dense_0/Reshape:0",
    "norm_bytes.weight": "/LayerNorm_0/Reshape_2:0",
    "norm_bytes.bias": "/LayerNorm_0/Reshape_3:0",
    "convolution.weight": "/Conv_0/transpose_3:0",
    "convolution.bias": "const_fold_opt__209",
    "norm.weight": "/LayerNorm_1/Reshape_2:0",
    "norm.bias": "/LayerNorm_1/Reshape_3:0",
    "classifier.weight": "/Const_24:0",
    "classifier.bias": "/Dense_1/Reshape:0",
}
TRANSPOSED = "classifier.weight"


class Magika(LightningModule):
    """The network of Magika 1.0; a batch is bytes (n x 2048), labels and packages."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 64)  # 256 is the padding
        self.embedding_bias = nn.Parameter(torch.zeros(64))
        self.norm_bytes = nn.LayerNorm(512, eps=1e-6)
        self.convolution = nn.Conv1d(256, 512, kernel_size=5)
        self.norm = nn.LayerNorm(512, eps=1e-6)
        self.classifier = nn.Linear(512, len(LABELS))
        self.recall = MulticlassRecall(len(LABELS), average="macro")
        self._read(onnx.load(MODEL))

    def forward(self, files: Tensor) -> Tensor:
        x = F.gelu(self.embedding(files) + self.embedding_bias, approximate="tanh")
        x = self.norm_bytes(x.reshape(len(x), 512, 256).transpose(1, 2))
        x = F.gelu(self.convolution(x), approximate="tanh")
        return self.classifier(self.norm(x.amax(2)))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        files, labels, _packages = batch
        return F.cross_entropy(self(files), labels)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        files, labels, _packages = batch
        self.recall(self(files), labels)
        self.log("test/recall", self.recall)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    @torch.no_grad()
    def _read(self, model: onnx.ModelProto) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in _tensors(model).items():
            value = torch.tensor(numpy_helper.to_array(tensor))
            if name == TRANSPOSED:
                value = value.T
            parameters[name].copy_(value.reshape(parameters[name].shape))

    def write(self, path: str) -> None:
        """Writes Magika's ONNX file with the weights of this network."""
        model = onnx.load(MODEL)
        parameters = dict(self.named_parameters())
        for name, tensor in _tensors(model).items():
            value = parameters[name].detach().cpu()
            if name == TRANSPOSED:
                value = value.T
            array = value.reshape(tuple(tensor.dims)).contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, path)


def _tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Returns the tensor of each parameter."""
    return {
        name: next(t for t in model.graph.initializer if t.name.endswith(end))
        for name, end in TENSORS.items()
    }
