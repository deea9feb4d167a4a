"""Finds the layers to repair, puts their weights into one flat vector, and refuses batch norms that
use the batch.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.recurrent import Gates, Recurrent, gates_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution
"""Kinds of layer that can be repaired directly. Recurrent layers are first unrolled into Linears.
"""
KINDS = "Linear, Conv1d/2d/3d, LSTM, GRU or RNN"


@dataclass(frozen=True)
class LayerRef:
    """One layer to repair, also called a site."""

    name: str  # dotted name in the model; empty if the model itself is the layer
    module: Layer  # the layer itself, not a copy
    offset: int  # position of its first weight in the flat vector
    include_bias: bool = False  # True if the bias follows the weight in the flat vector
    gates: Gates | None = (
        None  # the recurrent layer that `module` was made from; None for other layers
    )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The layer's repairable parameters by dotted name, in the order of the flat vector."""
        kinds = ["weight", "bias"] if self.include_bias else ["weight"]
        owner, module = self.name, cast(nn.Module, self.module)
        if self.gates is not None:
            owner, _, end = self.name.rpartition(".")
            kinds, module = [f"{kind}_{end}" for kind in kinds], self.gates.module
        own = dict(module.named_parameters(recurse=False))
        return {f"{owner}.{name}" if owner else name: own[name] for name in kinds if name in own}

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight: `out x in` of a Linear, `out x in/groups x kernel...` of a
        convolution.
        """
        return self.module.weight.shape


@dataclass(frozen=True)
class ParameterSpace:
    """The weights to search: all weights of the layers in `sites`, as one flat vector.

    The vector has for each layer its weight, row by row, and then its bias if biases are included.
    If `sites` is empty, no weights can be searched, and `obstacle` says why; training may still
    change the model's parameters.
    """

    sites: tuple[LayerRef, ...]
    obstacle: str = ""

    @property
    def gates(self) -> tuple[Gates, ...]:
        """The recurrent layers among the sites, each once, as arguments for `unroll`."""
        return tuple(
            {id(site.gates): site.gates for site in self.sites if site.gates is not None}.values()
        )

    @property
    def size(self) -> int:
        return sum(site.size for site in self.sites)

    @property
    def device(self) -> torch.device:
        return self.sites[0].module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sites[0].module.weight.dtype

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All repairable parameters by dotted name, in the order of the flat vector."""
        return {
            name: parameter for site in self.sites for name, parameter in site.parameters.items()
        }

    def flat(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()])

    def changed(self, where: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Returns copies of all parameters by name, with `values` at the positions `where` of the
        flat vector.
        """
        flat = self.flat()
        flat[where.to(flat.device)] = values.to(flat.device, flat.dtype)
        parameters = self.parameters
        parts = flat.split([parameter.numel() for parameter in parameters.values()])
        return {
            name: part.view_as(parameters[name])
            for name, part in zip(parameters, parts, strict=True)
        }


def find_layers(
    model: nn.Module, layer: str | Sequence[str] = "auto", *, include_bias: bool = False
) -> ParameterSpace:
    """Finds the layers to repair by a dotted name, several names, or `auto`.

    `auto` chooses the last registered Linear that is not frozen, or the last Linear if all are
    frozen. In a model without a Linear it chooses a convolution by the same rule. `include_bias`
    adds the biases to the weights.

    Raises:
        ConfigurationError: a name is unknown or given twice; a layer is of an unsupported kind,
            lazy, quantised or parametrised, or shares weights with another module; or the layers
            differ in dtype or device.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: list[LayerRef] = []
    for name in _names(layer, modules):
        for part, module, gates in _parts(name, modules):
            offset = sites[-1].offset + sites[-1].size if sites else 0
            sites.append(LayerRef(part, module, offset, include_bias, gates))
    if len({id(next(iter(site.parameters.values()))) for site in sites}) < len(sites):
        raise ConfigurationError(f"`layer={layer!r}` names a layer twice.", "name each layer once.")
    _check_shared(model, sites)
    space = ParameterSpace(tuple(sites))
    kinds = {f"{parameter.dtype} on {parameter.device}" for parameter in space.parameters.values()}
    if len(kinds) > 1:
        raise ConfigurationError(
            f"`layer={layer!r}` spans several dtypes or devices: {sorted(kinds)}.",
            "repair these layers one by one.",
        )
    return space


def find_scope(
    model: nn.Module,
    layer: str | Sequence[str] = "auto",
    *,
    include_bias: bool = False,
    called: Collection[str] | None = None,
    trains: bool = False,
) -> tuple[ParameterSpace, tuple[str, ...]]:
    """Finds the layers whose weights can be searched, and the names of all parameters that training
    may change.

    `layer` is as for `find_layers`, or names a module of several layers: then the module's last
    layer is searched, and training may change all its parameters. With `auto`, training may change
    all parameters that are not frozen, and the searched layer is, if possible, one in `called`, the
    layers that a prediction calls. If `auto` finds no layer, a `ConfigurationError` is raised; with
    `trains=True`, for methods that train, the space is empty instead.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    is_auto = layer == "auto" and "auto" not in modules
    parameters = dict(model.named_parameters())
    try:
        names = [_last_inside(name, modules) for name in _names(layer, modules, called)]
        space = find_layers(model, names, include_bias=include_bias)
    except ConfigurationError as error:
        scope = [name for name, parameter in parameters.items() if parameter.requires_grad]
        # Layers outside the module tree are an error even for methods that train: checkpoints do
        # not contain them.
        if not (is_auto and trains and scope) or _outside_tree(modules):
            raise
        return ParameterSpace((), str(error).partition("\n")[0]), tuple(scope)
    if is_auto:
        scope = [name for name, parameter in parameters.items() if parameter.requires_grad]
        # If all called layers are frozen, as in a moving average, training other layers would not
        # change predictions.
        scope = (
            scope if any(parameter.requires_grad for parameter in space.parameters.values()) else []
        )
    else:
        scope = [
            name
            for name in parameters
            if any(_is_inside(name, block) for block in layer_names(layer))
        ]
    return space, tuple(scope or space.parameters)


def layer_names(layer: str | Sequence[str]) -> list[str]:
    """Returns one name or several names as a list. Raises a `ConfigurationError` if there is no
    name.
    """
    names = (
        [layer] if isinstance(layer, str) else list(layer) if isinstance(layer, Sequence) else []
    )
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(
            f"`layer={layer!r}` names no layer.", "name one, or write `layer='auto'`."
        )
    return names


def _names(
    layer: str | Sequence[str],
    modules: Mapping[str, nn.Module],
    called: Collection[str] | None = None,
) -> list[str]:
    names = layer_names(layer)
    if names != ["auto"] or "auto" in modules:
        return names
    pools = (
        [modules]
        if called is None
        else [{name: modules[name] for name in modules if name in called}, modules]
    )
    # A network without a Linear, such as one for segmentation, ends in a convolution.
    for pool in pools:
        for kind in (nn.Linear, Layer):
            found = [name for name, module in pool.items() if isinstance(module, kind)]
            if found:
                # Frozen layers are not chosen, unless all are frozen.
                free = [
                    name
                    for name in found
                    if (w := _own_weight(modules[name])) is None or w.requires_grad
                ]
                return (free or found)[-1:]
    found_outside = _outside_tree(modules)
    if found_outside:
        raise _outside_error("auto", next(iter(found_outside)))
    hint = f"name a {KINDS} that is not scripted (`torch.jit`); 'auto' finds no recurrent layers."
    raise ConfigurationError("`layer='auto'` found no Linear layer and no convolution.", hint)


def _is_inside(parameter: str, block: str) -> bool:
    return not block or parameter.startswith(f"{block}.")


def _last_inside(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name not in modules or isinstance(modules[name], Layer | Recurrent):
        return name
    inside = [
        other
        for other, module in modules.items()
        if isinstance(module, Layer) and _is_inside(other, name)
    ]
    return inside[-1] if inside else name


def _parts(name: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, Layer, Gates | None]]:
    """Returns (name, module, None) for a layer, or (name, Linear, gates) for each weight of a
    recurrent layer.
    """
    module = modules.get(name)
    if not isinstance(module, Recurrent):
        return [(name, _repairable(name, modules), None)]
    if not all(
        isinstance(x, nn.Parameter) and x.is_floating_point() for x in module._parameters.values()
    ):
        raise _not_own(name)
    gates = gates_of(name, module)
    return [
        (f"{name}.{end}" if name else end, linear, gates) for end, linear in gates.linears.items()
    ]


def _repairable(name: str, modules: Mapping[str, nn.Module]) -> Layer:
    if name not in modules:
        for attribute in _outside_tree(modules):
            if name == attribute or name.startswith(f"{attribute}."):
                raise _outside_error(name, attribute)
        raise ConfigurationError(
            f"`layer={name!r}` is not in the model.",
            f"the nearest names are {_suggest(name, modules)}.",
        )
    module = modules[name]
    if not isinstance(module, Layer):
        inside = _suggest("", dict(module.named_modules(prefix=name)))
        raise ConfigurationError(
            f"`layer={name!r}` is a {type(module).__name__}, which cannot be repaired.",
            f"name a {KINDS}{f', such as one of {inside}' if inside else ''}.",
        )
    weight = _own_weight(module)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ConfigurationError(
            f"`layer={name!r}` is lazy: it has no weights yet.",
            "run one batch through the model first.",
        )
    if weight is None or not weight.is_floating_point():
        raise _not_own(name)
    return module


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    # Not `module.weight`: under spectral norm in training mode, reading it takes a step of the
    # power iteration.
    return module._parameters.get("weight")


def _not_own(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"`layer={name!r}` has no floating-point weight of its own (parametrised or quantised).",
        "remove a parametrisation with `torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')`; "
        "repair before quantising.",
    )


def _outside_tree(modules: Mapping[str, nn.Module]) -> list[str]:
    """Lists attributes that hold layers in plain lists, tuples or dicts, which torch does not
    search for modules.
    """
    known = {id(module) for module in modules.values()}
    found = []
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            inside = (
                value.values()
                if isinstance(value, dict)
                else value
                if isinstance(value, (list, tuple))
                else ()
            )
            layers = (layer for x in inside if isinstance(x, nn.Module) for layer in x.modules())
            if not attribute.startswith("_") and any(
                isinstance(x, Layer) and id(x) not in known for x in layers
            ):
                found.append(f"{name}.{attribute}" if name else attribute)
    return found


def _outside_error(layer: str, attribute: str) -> ConfigurationError:
    return ConfigurationError(
        f"`layer={layer!r}`: `{attribute}` holds layers in a plain list or dict, outside of the module tree, so "
        "`parameters()` does not return them to an optimizer and no checkpoint has them.",
        "make it an `nn.ModuleList` or an `nn.ModuleDict`.",
    )


def _check_shared(model: nn.Module, sites: Sequence[LayerRef]) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for site in sites:
        if any(owners[id(parameter)] > 1 for parameter in site.parameters.values()):
            raise ConfigurationError(
                f"`layer={site.name!r}` shares its weights with another module (tied weights).",
                "name a layer whose weights are its own, or untie them before the repair.",
            )


def _suggest(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    names = [other for other, module in modules.items() if isinstance(module, Layer)]
    return difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[-5:]


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Returns the Linears and convolutions whose weight is a floating-point parameter, by dotted
    name.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer)
        and (weight := _own_weight(module)) is not None
        and weight.is_floating_point()
    }


def last_linear(
    model: nn.Module, called: Collection[str] | None = None
) -> tuple[str | None, nn.Linear | None]:
    """Returns the last Linear's name and module, or `(None, None)`. If `called` is given, only
    these layers count.
    """
    linear = [
        (name, layer)
        for name, layer in layers_of(model).items()
        if isinstance(layer, nn.Linear) and (called is None or name in called)
    ]
    return linear[-1] if linear else (None, None)


def force_eager() -> AbstractContextManager[Any]:
    """Returns a context in which compiled parts of a model run as plain Python, since compiled code
    ignores hooks.
    """
    return (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else nullcontext()
    )


@contextmanager
def forbid_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Raises a `ConfigurationError` inside the context if a batch norm without running statistics
    is called.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if (
                isinstance(module, _BatchNorm)
                and module.running_mean is None
                and module.running_var is None
            ):
                stack.callback(module.register_forward_pre_hook(partial(_refuse, name)).remove)
                stack.enter_context(force_eager())
        yield


def _refuse(name: str, *_: Any) -> None:
    raise ConfigurationError(
        f"`model`: `{name}` is a batch norm without running statistics, so a prediction depends on the other "
        "samples in its batch, and no sample is sure to stay right.",
        "create it with `track_running_stats=True`, or use a layer norm or group norm instead.",
    )


def layer_output(module: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the output of a Linear or a convolution with `weight` and `bias` instead of its
    parameters.
    """
    return (
        F.linear(x, weight, bias)
        if isinstance(module, nn.Linear)
        else module._conv_forward(x, weight, bias)
    )
