"""Low-rank adapters (LoRA) of the library `peft`, which move in place of a model's weights."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_nrl._utils.preserve import random_state, seed_all
from lightning_nrl._utils.state import State, completed, temporary_weights
from lightning_nrl.errors import ConfigurationError, check_kind, check_whole
from lightning_nrl.evaluation.layers import layers_of

Lora: TypeAlias = Any  # a rank, or a `peft.LoraConfig`
NAME = "lightning_nrl"  # of the adapters, beside adapters that a model may have
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_MARK = "lightning_nrl.adapter"  # in the metadata of this file
SUPPORTED = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Fields of a `LoraConfig` that leave the merged weights `W + scaling * B @ A`, at first `W`."""


def check_lora(argument: str, lora: Lora) -> None:
    """Raises a `ConfigurationError` unless `lora` is a rank or a `LoraConfig` of plain LoRA."""
    config_class = _peft().LoraConfig
    if isinstance(lora, int):
        check_whole(argument, lora, 1)
        return
    example = f"`{argument}=8` or `{argument}=LoraConfig(r=8)`"
    check_kind(argument, lora, isinstance(lora, config_class), "rank or `LoraConfig`", example)
    plain = config_class().to_dict()
    for name, value in lora.to_dict().items():
        if name not in SUPPORTED and value != plain[name]:
            raise ConfigurationError(
                f"`{argument}`: `{name}={value!r}` is not plain LoRA.",
                f"leave `{name}` out of the `LoraConfig`.",
            )


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank adapters of a model, which are not attached to it.

    Attributes:
        config: the `LoraConfig` as JSON.
        state: the tensors by their names in a model with attached adapters.
    """

    config: str
    state: State = field(default_factory=dict)

    @classmethod
    def configured(cls, lora: Lora, model: nn.Module, scope: Collection[str]) -> LoraAdapter:
        """Returns adapters without tensors, for layers whose weights are in `scope`."""
        peft = _peft()
        config = peft.LoraConfig(r=lora, lora_alpha=2 * lora) if isinstance(lora, int) else lora
        names = [name for name in _adaptable(model) if f"{name}.weight" in scope]
        if config.target_modules not in (None, "all-linear"):
            is_target = peft.tuners.tuners_utils.check_target_module_exists
            names = [name for name in names if is_target(config, name)]
        if not names:
            raise ConfigurationError(
                "`lora`: no Linear or convolution that may change can have adapters.",
                "leave `lora` out: a repair changes only what is not frozen, such as adapters of "
                "your own.",
            )
        values = config.to_dict()
        values |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        # A list would match other layers, too, whose names end like one of these.
        values["target_modules"] = "|".join(map(re.escape, names))
        return cls(json.dumps(values, indent=2, default=sorted))

    @contextmanager
    def attached(self, model: nn.Module, seed: int = 0) -> Iterator[AttachedLayers]:
        """Attaches new adapters for a block, in which nothing else is trainable."""
        peft = _peft()
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        own_config = vars(model).pop("peft_config", None)  # of adapters inside the model
        own_layers = [(layer, layer.active_adapters) for layer in _tuner_layers(model).values()]
        try:
            with random_state():
                seed_all(seed)
                config = peft.LoraConfig(**json.loads(self.config))
                peft.inject_adapter_in_model(config, model, NAME)
            # `PeftModel` has adapters in float32, too.
            peft.tuners.tuners_utils.cast_adapter_dtype(model, NAME)
            for layer, names in own_layers:
                layer.set_adapter(names)  # `peft` has switched them off
            model.eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(f".{NAME}" in name)
            yield AttachedLayers(model)
        finally:
            AttachedLayers(model).detach()
            vars(model).pop("peft_config", None)
            if own_config is not None:
                model.peft_config = own_config
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)

    def scaled(self, strength: float) -> LoraAdapter:
        """Returns adapters for `strength` times the change of the weights."""
        state = dict(self.state)
        for name in state:
            if ".lora_B." in name:
                state[name] = state[name] * strength
        return replace(self, state=state)

    def write(self, folder: Path) -> None:
        """Writes a folder for `PeftModel.from_pretrained`."""
        folder.mkdir()
        tensors = {}
        for name, value in self.state.items():
            tensors[f"base_model.model.{name.replace(f'.{NAME}', '')}"] = value.cpu().contiguous()
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt", ADAPTER_MARK: "1"}))
        (folder / "adapter_config.json").write_text(self.config, encoding="utf-8")


class AttachedLayers:
    """Layers of a model with attached adapters; `scope` has the names of the adapters' tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {}
        for name, layer in _tuner_layers(model).items():
            if isinstance(layer, _peft().tuners.lora.LoraLayer) and NAME in layer.scaling:
                self._layers[name] = layer
        parameters = dict(model.named_parameters())
        self.scope = tuple(name for name in parameters if f".{NAME}" in name)

    def of(self, state: State) -> dict[str, Tensor]:
        """Returns the adapters' tensors in a state; those that it lacks are the model's."""
        tensors = completed(self._model, state)
        return {name: tensors[name] for name in self.scope}

    @torch.no_grad()
    def merged(self, state: State) -> dict[str, Tensor]:
        """Returns the weights of the layers with the adapters in `state` added, by their names."""
        weights = {}
        with temporary_weights(self._model, self.of(state)):
            for name, layer in self._layers.items():
                weight = layer.get_base_layer().weight
                weights[f"{name}.weight"] = (weight + layer.get_delta_weight(NAME)).to(weight.dtype)
        return weights

    def detach(self) -> None:
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.get_base_layer())

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Detaches the adapters for a block."""
        self.detach()
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                self._model.set_submodule(name, layer)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigurationError(
            "`lora` needs the library `peft`, which is not installed.",
            "`pip install 'lightning_nrl[lora]'`, or leave `lora` out.",
        ) from error


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers with adapters of `peft`, by name."""
    kind = _peft().tuners.tuners_utils.BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _adaptable(model: nn.Module) -> list[str]:
    """Returns the names of the layers whose merged weights do what their adapters do."""
    # These read the weights of layers inside, past their adapters, or are adapters themselves.
    adapted = set(map(type, _tuner_layers(model).values()))
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer, *adapted)
    inside = tuple(f"{name}." for name, x in model.named_modules() if isinstance(x, readers))
    n_names = Counter(id(x) for _, x in model.named_parameters(remove_duplicate=False))
    names = []
    for name, layer in layers_of(model).items():
        is_plain = isinstance(layer, nn.Linear) or (
            layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        )
        is_shared = n_names[id(layer.weight)] > 1
        if name and is_plain and not is_shared and not name.startswith(inside):
            names.append(name)
    return names
