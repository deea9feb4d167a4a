"""Finds the layers to repair, and puts their weights into one flat vector."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl.errors import ConfigurationError, first_line
from lightning_nrl.evaluation.recurrent import Gates, Recurrent, gates_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution
"""Kinds of layer that can be repaired directly. Recurrent layers are unrolled into Linears."""
KINDS = "Linear, Conv1d/2d/3d, LSTM, GRU or RNN"
Modules = Mapping[str, nn.Module]
"""Modules of a model by dotted name; a shared module has several names."""


@dataclass(frozen=True)
class LayerRef:
    """One layer to repair, also called a site."""

    name: str  # dotted name in the model; empty if the model itself is the layer
    module: Layer  # the layer itself, not a copy
    offset: int  # position of its first weight in the flat vector
    include_bias: bool = False  # True if the bias follows the weight in the flat vector
    gates: Gates | None = None  # the recurrent layer of `module`; None for other layers

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The layer's repairable parameters by dotted name, in the order of the flat vector."""
        owner = self.name
        suffix = ""
        if self.gates is not None:
            owner, _, end = self.name.rpartition(".")
            suffix = f"_{end}"
        parameters = {_dotted(owner, f"weight{suffix}"): self.module.weight}
        if self.include_bias and self.module.bias is not None:
            parameters[_dotted(owner, f"bias{suffix}")] = self.module.bias
        return parameters

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight: `out x in`, or `out x in/groups x kernel...` of a convolution."""
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
        return tuple(dict.fromkeys(site.gates for site in self.sites if site.gates is not None))

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
    def parameters(self) -> dict[str, Tensor]:
        """All repairable parameters by dotted name, in the order of the flat vector."""
        parameters: dict[str, Tensor] = {}
        for site in self.sites:
            parameters |= site.parameters
        return parameters

    def flat(self, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the flat vector; tensors in `state` replace those of the model."""
        parameters = {**self.parameters, **(state or {})}
        return _flattened([parameters[name] for name in self.parameters])

    def changed(self, where: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Returns copies of all parameters by name, with new `values`, see `with_values`."""
        return with_values(self.parameters, where, values)


def with_values(
    parameters: Mapping[str, Tensor], where: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """Returns copies of parameters by name, with new `values` at positions in the flat vector."""
    flat = _flattened(parameters.values())
    flat[where.to(flat.device)] = values.to(flat)
    parts = flat.split([parameter.numel() for parameter in parameters.values()])
    return {
        name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)
    }


def _flattened(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def find_layers(
    model: nn.Module,
    layer: str | Sequence[str] = "auto",
    *,
    include_bias: bool = False,
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
    sites = []
    offset = 0
    for name in _names(layer, modules):
        for part, module, gates in _parts(name, modules):
            site = LayerRef(part, module, offset, include_bias, gates)
            sites.append(site)
            offset += site.size
    if len({id(site.module.weight) for site in sites}) < len(sites):
        raise ConfigurationError(f"`layer={layer!r}` names a layer twice.", "name each layer once.")
    _check_shared(model, sites)
    space = ParameterSpace(tuple(sites))
    kinds = {f"{x.dtype} on {x.device}" for x in space.parameters.values()}
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
    """Finds the layers to search, and the names of all parameters that training may change.

    `layer` is as for `find_layers`, or names a module of several layers: then the module's last
    layer is searched, and training may change all its parameters. With `auto`, training may change
    all parameters that are not frozen, and the searched layer is, if possible, one in `called`, the
    layers that a prediction calls. If `auto` finds no layer, a `ConfigurationError` is raised; with
    `trains=True`, for methods that train, the space is empty instead.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    is_auto = layer == "auto" and "auto" not in modules
    trainable = tuple(name for name, x in model.named_parameters() if x.requires_grad)
    try:
        names = [_last_inside(name, modules) for name in _names(layer, modules, called)]
        space = find_layers(model, names, include_bias=include_bias)
    except ConfigurationError as error:
        # Layers outside the module tree are an error even for methods that train: checkpoints do
        # not contain them.
        if not (is_auto and trains and trainable) or _outside_tree(modules):
            raise
        return ParameterSpace((), first_line(error)), trainable
    if not is_auto:
        prefixes = tuple(_dotted(block, "") for block in layer_names(layer))
        scope = tuple(name for name, _ in model.named_parameters() if name.startswith(prefixes))
        return space, scope or tuple(space.parameters)
    # If all called layers are frozen, as in a moving average, training other layers would not
    # change predictions.
    if not any(x.requires_grad for x in space.parameters.values()):
        return space, tuple(space.parameters)
    return space, trainable


def layer_names(layer: str | Sequence[str]) -> list[str]:
    """Returns one or several names as a list; if there is none, raises a `ConfigurationError`."""
    if isinstance(layer, str):
        return [layer]
    is_list = isinstance(layer, Sequence) and len(layer) > 0
    if not is_list or not all(isinstance(name, str) for name in layer):
        raise ConfigurationError(
            f"`layer={layer!r}` names no layer.", "name one, or write `layer='auto'`."
        )
    return list(layer)


def _names(
    layer: str | Sequence[str],
    modules: Modules,
    called: Collection[str] | None = None,
) -> list[str]:
    names = layer_names(layer)
    if names != ["auto"] or "auto" in modules:
        return names

    def preference(name: str) -> tuple[bool, bool, bool]:
        weight = _own_weight(modules[name])
        is_free = weight is None or weight.requires_grad
        # A network without a Linear, such as one for segmentation, ends in a convolution.
        is_linear = isinstance(modules[name], nn.Linear)
        return called is not None and name in called, is_linear, is_free

    layers = _layers_in(modules)
    if layers:
        # Among equals, `max` returns the first of the reversed list: the last layer.
        return [max(reversed(layers), key=preference)]
    outside = _outside_tree(modules)
    if outside:
        raise _outside_error("auto", outside[0])
    raise ConfigurationError(
        "`layer='auto'` found no Linear layer and no convolution.",
        f"name a {KINDS} that is not scripted (`torch.jit`); 'auto' finds no recurrent layers.",
    )


def _last_inside(name: str, modules: Modules) -> str:
    if name not in modules or isinstance(modules[name], Layer | Recurrent):
        return name
    for layer in reversed(_layers_in(modules)):
        if layer.startswith(_dotted(name, "")):
            return layer
    return name


def _layers_in(modules: Modules) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, Layer)]


def _dotted(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _parts(name: str, modules: Modules) -> Iterator[tuple[str, Layer, Gates | None]]:
    """Yields a layer with its name, or the Linears of a recurrent layer with their names."""
    module = modules.get(name)
    if not isinstance(module, Recurrent):
        yield name, _repairable(name, modules), None
        return
    for parameter in module._parameters.values():
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            raise _not_own(name)
    gates = gates_of(name, module)
    for end, linear in gates.linears.items():
        yield _dotted(name, end), linear, gates


def _repairable(name: str, modules: Modules) -> Layer:
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
        hint = f"name a {KINDS}"
        inside = _suggest("", dict(module.named_modules(prefix=name)))
        if inside:
            hint += f", such as one of {inside}"
        raise ConfigurationError(
            f"`layer={name!r}` is a {type(module).__name__}, which cannot be repaired.", f"{hint}."
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
        "remove a parametrisation with "
        "`torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')`; repair before "
        "quantising.",
    )


def _outside_tree(modules: Modules) -> list[str]:
    """Lists attributes with layers in plain lists, tuples or dicts, unknown to torch as modules."""
    known = {id(module) for module in modules.values()}
    attributes = []
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and _holds_other_layer(value, known):
                attributes.append(_dotted(name, attribute))
    return attributes


def _holds_other_layer(value: object, known: Collection[int]) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return False
    modules = [module for item in value if isinstance(item, nn.Module) for module in item.modules()]
    return any(isinstance(module, Layer) and id(module) not in known for module in modules)


def _outside_error(layer: str, attribute: str) -> ConfigurationError:
    return ConfigurationError(
        f"`layer={layer!r}`: `{attribute}` holds layers in a plain list or dict, outside of the "
        "module tree, so `parameters()` does not return them to an optimizer and no checkpoint has "
        "them.",
        "make it an `nn.ModuleList` or an `nn.ModuleDict`.",
    )


def _check_shared(model: nn.Module, sites: Sequence[LayerRef]) -> None:
    n_owners = Counter[int]()
    for module in model.modules():
        n_owners.update(map(id, module.parameters(recurse=False)))
    for site in sites:
        if any(n_owners[id(parameter)] > 1 for parameter in site.parameters.values()):
            raise ConfigurationError(
                f"`layer={site.name!r}` shares its weights with another module (tied weights).",
                "name a layer whose weights are its own, or untie them before the repair.",
            )


def _suggest(name: str, modules: Modules) -> list[str]:
    names = _layers_in(modules)
    return difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[-5:]


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Returns the Linears and convolutions with a floating-point parameter as weight, by name."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            weight = _own_weight(module)
            if weight is not None and weight.is_floating_point():
                layers[name] = module
    return layers


def last_linear(
    model: nn.Module, called: Collection[str] | None = None
) -> tuple[str, nn.Linear] | tuple[None, None]:
    """Returns the last Linear's name and module, or `(None, None)`.

    If `called` is given, only these layers count.
    """
    for name, layer in reversed(layers_of(model).items()):
        if isinstance(layer, nn.Linear) and (called is None or name in called):
            return name, layer
    return None, None


def is_compiled(model: nn.Module) -> bool:
    """True if calls of the model or of a part are compiled."""
    for module in model.modules():
        # `torch.compile(model)`, `model.compile()`, and Lightning's way to call a compiled model.
        is_wrapper = type(module).__name__ == "OptimizedModule"
        by_lightning = vars(module).get("_compiler_ctx") is not None
        if is_wrapper or by_lightning or module._compiled_call_impl is not None:
            return True
    return False


def force_eager() -> AbstractContextManager[object]:
    """Returns a context in which compiled parts of a model run as plain Python.

    Compiled code would ignore hooks.
    """
    is_compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()


@contextmanager
def forbid_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Raises a `ConfigurationError` if a batch norm without running statistics is called."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                stack.enter_context(module.register_forward_pre_hook(partial(_refuse, name)))
                stack.enter_context(force_eager())
        yield


def _refuse(name: str, *_: object) -> None:
    raise ConfigurationError(
        f"`model`: `{name}` is a batch norm without running statistics, so a prediction depends on "
        "the other samples in its batch, and no sample is sure to stay right.",
        "create it with `track_running_stats=True`, or use a layer norm or group norm instead.",
    )


def layer_output(module: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the output of a Linear or a convolution with other parameters."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    output: Tensor = module._conv_forward(x, weight, bias)
    return output
