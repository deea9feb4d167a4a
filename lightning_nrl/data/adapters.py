"""Adapters, which split a batch into model inputs and target.

The default is `unpack`; a `ModelAdapter` runs the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from inspect import Parameter
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl.data.batch import (
    Adapter,
    Args,
    BatchTarget,
    Kwargs,
    ModelCall,
    ModelOutput,
    RawBatch,
    Unpacked,
    with_plain_tensors,
)
from lightning_nrl.errors import ConfigurationError

TARGET_KEYS = ("label", "labels", "target", "targets", "y", "mask", "masks")
"""Usual names of the target in a batch; the first one that the batch has is used."""

INPUT_KEYS = ("input", "inputs", "image", "images", "x", "pixel_values", "features", "data")
"""Usual names of a model's only input in a batch; the first one that the batch has is used."""

ADAPTER_HINT = """\
pass the prediction, here for a batch `(x, y)`, as `adapter=predict` \
(`data=DataOptions(adapter=predict)` in a repair):

    def predict(module, batch):
        x, y = batch
        logits = module.net(x)  # as in your own step, with its preprocessing
        return logits, y
"""

# Limits that keep the description of a batch readable in an error message.
MAX_STRUCTURE_LINES = 12
MAX_STRUCTURE_DEPTH = 4
MAX_SHOWN_ITEMS = 3

Fields = Mapping[Any, Any]
"""Named parts of a batch or an output; the keys of a mapping need not be texts."""


@runtime_checkable
class Graphs(Protocol):
    """Batch of graphs with named fields, as in torch_geometric."""

    @property
    def num_nodes(self) -> int | None: ...

    def keys(self) -> Sequence[str]: ...

    def __getitem__(self, key: str) -> object: ...


@runtime_checkable
class TensorTable(Protocol):
    """Batch of table rows with their targets, as a `TensorFrame` of torch_frame."""

    feat_dict: Mapping[Any, Any]
    col_names_dict: Mapping[Any, Any]
    y: Tensor


def fields_of(value: object) -> Fields | None:
    """Returns the fields of a mapping, data class, named tuple, table or batch of graphs."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (type, Tensor)):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # named tuple
        return dict(value._asdict())
    if isinstance(value, Graphs):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118, not a mapping
    if isinstance(value, TensorTable):
        return {name: getattr(value, name) for name in ("feat_dict", "col_names_dict", "y")}
    return None


def outputs_in(output: ModelOutput) -> dict[int | str, Tensor]:
    """Returns the tensors among several outputs by position, key or field, but no scalars."""
    parts = fields_of(output) or {}
    if not parts and isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    return {name: x for name, x in parts.items() if isinstance(x, Tensor) and x.ndim}


class _Part(NamedTuple):
    path: str  # Python expression for the value, such as `batch['x'][0]`
    name: str  # last key or index of the path
    depth: int
    value: Any


def describe(raw: object, name: str = "batch") -> str:
    """Lists names, types and shapes in a batch or an output, in `MAX_STRUCTURE_LINES` at most."""
    lines = []
    for part in _parts(_Part(name, name, 0, raw)):
        lines.append(f"    {'  ' * part.depth}{part.name}: {_kind(part.value)}")
    if len(lines) > MAX_STRUCTURE_LINES:
        n_more = len(lines) - MAX_STRUCTURE_LINES + 1
        lines[-n_more:] = [f"      ... and {n_more} more"]
    return "\n".join(lines)


def paths_in(raw: object) -> dict[str, object]:
    """Returns the parts of a batch by Python expressions such as `batch['x'][0]`."""
    return {part.path: part.value for part in _parts(_Part("batch", "batch", 0, raw))}


def adapter_hint(
    raw: RawBatch,
    where: str = "`adapter=f` (`data=DataOptions(adapter=f)` in a repair)",
    *,
    labels: str = "",
    args: Args = (),
) -> str:
    """Returns a hint: code of an adapter for the batch.

    `where` tells how to pass the adapter, `labels` is the path of the labels, and `args` are the
    model's inputs. Without these, the fields are known only of a pair of inputs and class numbers.
    """
    paths = paths_in(raw)
    tensors = {path: x for path, x in paths.items() if isinstance(x, Tensor)}
    numbers = [path for path, x in tensors.items() if x.ndim == 1 and not x.is_floating_point()]
    if not labels and len(tensors) == 2 and len(numbers) == 1:
        labels = numbers[0]
        args = tuple(x for path, x in tensors.items() if path != labels)
    inputs = [path for arg in args for path, x in paths.items() if x is arg]
    return (
        f"pass {where}, with the right fields for these:\n"
        "    def f(batch):\n"
        f"        args, kwargs = ({', '.join(inputs or ['INPUT'])},), {{}}  "
        "# what the model is called with\n"
        f"        return args, kwargs, {labels or 'TARGET'}  # and the truth of each sample"
    )


def _parts(part: _Part) -> Iterator[_Part]:
    yield part
    if part.depth < MAX_STRUCTURE_DEPTH:
        for inner in _inner_parts(part):
            yield from _parts(inner)


def _inner_parts(part: _Part) -> Iterator[_Part]:
    value, depth = part.value, part.depth + 1
    named = fields_of(value)
    if named is not None:
        for name, x in named.items():
            key = f"[{name!r}]" if isinstance(value, Mapping) else f".{name}"
            yield _Part(part.path + key, str(name), depth, x)
    elif isinstance(value, (list, tuple)):
        if len(value) > 2 * MAX_SHOWN_ITEMS:  # such as one item per sample
            value = value[:MAX_SHOWN_ITEMS]
        for i, x in enumerate(value):
            yield _Part(f"{part.path}[{i}]", f"[{i}]", depth, x)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (int, float)) or value is None:
        return repr(value)
    if isinstance(value, (list, tuple, str, Mapping)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


@dataclass(frozen=True)
class ForwardSignature:
    """Names of the parameters of a model's forward, without `*args` and `**kwargs`."""

    names: tuple[str, ...]
    required: tuple[str, ...]  # names of the parameters without a default
    takes_mapping: bool  # the only required parameter is a mapping or named `batch`
    takes_keywords: bool  # forward has `**kwargs`

    @classmethod
    def of(cls, module: nn.Module) -> ForwardSignature | None:
        """Inspects a module's forward.

        Returns None if forward takes `*args`, as in wrappers, or has no signature.
        """
        parameters = _parameters(module.forward)
        if parameters is None:
            return None
        names = []
        required = []
        takes_keywords = takes_mapping = False
        for name, parameter in parameters.items():
            if parameter.kind is Parameter.VAR_POSITIONAL:
                return None
            if parameter.kind is Parameter.VAR_KEYWORD:
                takes_keywords = True
                continue
            names.append(name)
            if parameter.default is Parameter.empty:
                required.append(name)
                takes_mapping = len(required) == 1 and _is_batch_parameter(parameter)
        return cls(tuple(names), tuple(required), takes_mapping, takes_keywords)

    @property
    def takes_one(self) -> bool:
        return len(self.required) == 1

    def is_complete(self, arguments: Fields) -> bool:
        """True if there are arguments, and no required one is missing."""
        return bool(arguments) and set(self.required) <= set(arguments)


def bind_adapter(adapter: Adapter, module: nn.Module) -> Adapter:
    """Binds `unpack` to the signature of a module's forward, and a `ModelAdapter` to the module."""
    if adapter is unpack:
        return partial(unpack, signature=ForwardSignature.of(module))
    adapter = as_adapter(adapter)
    if isinstance(adapter, ModelAdapter):
        return replace(adapter, model=module)
    return adapter


def is_default(adapter: Adapter) -> bool:
    """True for `unpack`, as `bind_adapter` returns it."""
    return isinstance(adapter, partial) and adapter.func is unpack


def unpack(raw: RawBatch, signature: ForwardSignature | None = None) -> Unpacked:
    """Splits a batch into model inputs and target. This is the default adapter.

    A sequence is `(x, y, *extras)` with input x and target y. x may be a mapping of forward's
    arguments. If forward needs several inputs, x may also be a tuple of them, or the batch may
    begin with them, followed by the target.

    In a mapping, named tuple, data class or batch of graphs, the target is the first of
    `TARGET_KEYS`. The inputs or the whole batch may be nested: `{"inputs": {...}, "targets": ...}`,
    `{"batch": ...}`. Inputs depend on forward:

    - If forward has one required parameter, it gets a batch of graphs as a whole. Of any other
      batch, it gets the field with the parameter's name. Without such a field, a parameter named
      `batch` or annotated as a mapping gets the whole batch; any other parameter gets the only
      tensor, else the first of `INPUT_KEYS`, else the whole batch.
    - If forward has several parameters, it gets fields of these names. `**kwargs` gets all tensors
      but the target.
    - If `signature` is None, forward gets the first of `INPUT_KEYS`, else every tensor except the
      target, by name.

    Returns:
        `(args, kwargs, target)`.

    Raises:
        ConfigurationError: the batch has an unknown structure.
    """
    named = _named(raw)
    if named is not None:
        if len(named) == 1:
            [only] = named.values()
            is_pair = isinstance(only, (list, tuple)) and len(only) > 1
            if is_pair or _named(only) is not None:
                return unpack(only, signature)
        return _unpack_named(raw, named, signature)
    is_sequence = isinstance(raw, Sequence) and not isinstance(raw, (str, bytes))
    if is_sequence and len(raw) >= 2:
        return _unpack_sequence(raw, signature)
    raise _unknown_structure(
        raw, f"a batch of type {type(raw).__name__} is neither (x, y, *extras) nor a mapping"
    )


def _named(raw: RawBatch) -> Fields | None:
    named = fields_of(raw)
    # A named tuple without a target key is `(x, y, *extras)`.
    if named is None or (isinstance(raw, tuple) and _target_key(named) is None):
        return None
    return named


def _unpack_named(raw: RawBatch, named: Fields, signature: ForwardSignature | None) -> Unpacked:
    keys = sorted(map(str, named))
    target_key = _target_key(named)
    if target_key is None:
        raise _unknown_structure(
            raw, f"a batch with the keys {keys} lacks a target key: {list(TARGET_KEYS)}"
        )
    candidates = dict(named)
    target = _only_value(candidates.pop(target_key))
    takes_raw = signature is not None and signature.takes_one
    inner = _only_value(candidates)
    is_argument = signature is not None and set(candidates) <= set(signature.names)
    if isinstance(inner, Mapping) and inner is not candidates and not is_argument:
        takes_raw = True
        raw = inner
        candidates = dict(inner)
    tensors = {name: value for name, value in candidates.items() if isinstance(value, Tensor)}
    if signature is not None:
        arguments = {name: candidates[name] for name in signature.names if name in candidates}
        if target_key in signature.required:
            arguments[target_key] = target
        inputs = _forward_inputs(raw, arguments, tensors, signature)
        if inputs is not None:
            return *inputs, target
    if isinstance(raw, Graphs):
        return (raw,), {}, target
    for name in INPUT_KEYS:
        if name in candidates:
            return (candidates[name],), {}, target
    if takes_raw:
        return (raw,), {}, target
    if not tensors:
        raise _unknown_structure(
            raw, f"a batch with the keys {keys} has no tensor besides the target"
        )
    return (), tensors, target


def _forward_inputs(
    raw: RawBatch,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    signature: ForwardSignature,
) -> tuple[Args, Kwargs] | None:
    """Chooses forward's inputs among a batch, its fields that are `arguments`, and its tensors."""
    takes_raw = isinstance(raw, Graphs) or (signature.takes_mapping and not arguments)
    if signature.takes_one and takes_raw:
        return (raw,), {}
    if signature.is_complete(arguments):
        if signature.takes_keywords:
            arguments |= tensors
        if len(arguments) == 1:
            return tuple(arguments.values()), {}
        return (), arguments
    if signature.takes_keywords and not signature.required and tensors:
        return (), tensors
    if signature.takes_one and len(tensors) == 1:
        return tuple(tensors.values()), {}
    return None


def _unpack_sequence(raw: Sequence[Any], signature: ForwardSignature | None) -> Unpacked:
    x, target = raw[0], _only_value(raw[1])
    if signature is None:
        return (x,), {}, target
    if isinstance(x, Mapping) and not signature.takes_mapping:
        names = x if signature.takes_keywords else signature.names
        arguments = {name: x[name] for name in names if name in x}
        if signature.is_complete(arguments):
            return (), arguments, target
    least, most = len(signature.required), len(signature.names)
    if least > 1:
        if isinstance(x, (list, tuple)) and least <= len(x) <= most:
            return tuple(x), {}, target
        if len(raw) > least:
            return tuple(raw[:least]), {}, raw[least]
    return (x,), {}, target


def _only_value(value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) == 1:
        return next(iter(value.values()))
    return value


def _target_key(named: Fields) -> object:
    keys = {str(key).lower(): key for key in named}
    for name in TARGET_KEYS:
        if name in keys:
            return keys[name]
    return None


def _is_batch_parameter(parameter: Parameter) -> bool:
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        annotation = inspect.formatannotation(annotation)
    kind = annotation.partition("[")[0].rpartition(".")[2]
    mappings = ("dict", "Dict", "Mapping", "MutableMapping", "BatchEncoding")
    return parameter.name == "batch" or kind in mappings


def _unknown_structure(raw: RawBatch, problem: str) -> ConfigurationError:
    return ConfigurationError(f"`adapter`: {problem}.\n{describe(raw)}", adapter_hint(raw))


Predict = Callable[[nn.Module, RawBatch], tuple[ModelOutput, BatchTarget]]
"""Runs a module on a raw batch and returns `(logits, target)`."""


@dataclass(frozen=True)
class _AdapterCall(ModelCall):
    adapt: Predict

    def __call__(self, model: nn.Module, raw: RawBatch) -> ModelOutput:
        logits, _ = _pair(self.adapt(model, raw))
        return logits


@dataclass(frozen=True)
class ModelAdapter:
    """Adapter that runs the model itself: `adapt(module, batch) -> (logits, target)`.

    Each time a batch is read, `adapt` runs one extra time, without gradients, to get the target.
    """

    adapt: Predict
    model: nn.Module | None = None  # set by `bind_adapter`

    def __call__(self, raw: RawBatch) -> Unpacked:
        if self.model is None:
            raise ConfigurationError(
                "`adapter`: inputs are needed here, which f(module, batch) -> (logits, target) "
                "does not return.",
                "give f(batch) -> (args, kwargs, target).",
            )
        with torch.no_grad(), preserve_state(self.model):
            _, target = _pair(self.adapt(self.model, raw))
        return (_AdapterCall(self.adapt), raw), {}, with_plain_tensors(target)


def as_adapter(function: Callable[..., Any]) -> Adapter:
    """Returns a `ModelAdapter` for f(module, batch), and the function itself for f(batch)."""
    if isinstance(function, nn.Module):
        raise ConfigurationError(
            f"`adapter`: {type(function).__name__} is a model.",
            "pass a function f(batch) -> (args, kwargs, target); pass an old model as "
            "`reference=`.",
        )
    parameters = _parameters(function) or {}
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    if sum(p.kind in positional and p.default is p.empty for p in parameters.values()) == 2:
        return ModelAdapter(function)
    return function


def _parameters(function: Callable[..., object]) -> Mapping[str, Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _pair(result: tuple[ModelOutput, BatchTarget]) -> tuple[ModelOutput, BatchTarget]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConfigurationError(
            f"`adapter`: f(module, batch) returned {type(result).__name__}, not (logits, target).",
            ADAPTER_HINT,
        )
    return result
