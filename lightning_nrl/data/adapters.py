"""Adapters, which split a batch into model inputs and target: `unpack` by default; a `ModelAdapter`
runs the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl.data.batch import Adapter, ModelCall, Unpacked
from lightning_nrl.errors import ConfigurationError

TARGET_KEYS = ("label", "labels", "target", "targets", "y", "mask", "masks")
"""Usual names of the target in a batch; the first one that the batch has is used."""

FUTURE_KEYS = ("future_target", "future_values")
"""Names of forecasting targets in batches of darts and Hugging Face."""

INPUT_KEYS = ("input", "inputs", "image", "images", "x", "pixel_values", "features", "data")
"""Usual names of a model's only input in a batch; the first one that the batch has is used."""

ADAPTER_HINT = """pass the model's prediction as `data=DataOptions(adapter=predict)`, here for a batch `(x, y)`:

    def predict(module, batch):
        x, y = batch
        logits = module.net(x)  # as in your own step, with its preprocessing
        return logits, y
"""

MAX_STRUCTURE_LINES, MAX_STRUCTURE_DEPTH, MAX_SHOWN_ITEMS = 12, 4, 3


@runtime_checkable
class Graphs(Protocol):
    """Batch of graphs with named fields, as in torch_geometric."""

    @property
    def num_nodes(self) -> int | None: ...

    def keys(self) -> Any: ...

    def __getitem__(self, key: str) -> Any: ...


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """Returns the fields of a mapping, data class, named tuple or batch of graphs. Returns None for
    anything else.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (type, Tensor)):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, Graphs):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118, not a mapping
    return None


class _Part(NamedTuple):
    path: str  # Python expression for the value, such as `batch['x'][0]`
    name: str  # last key or index of the path
    depth: int
    value: Any


def describe(raw: Any, name: str = "batch") -> str:
    """Lists the names, types, shapes and dtypes in a batch or an output, in at most
    `MAX_STRUCTURE_LINES` lines.
    """
    lines = [
        f"{'  ' * part.depth}{part.name}: {_kind(part.value)}" for part in _parts(raw, name, name)
    ]
    if len(lines) > MAX_STRUCTURE_LINES:
        lines[MAX_STRUCTURE_LINES - 1 :] = [
            f"  ... and {len(lines) - MAX_STRUCTURE_LINES + 1} more"
        ]
    return "\n".join(f"    {line}" for line in lines)


def adapter_hint(
    raw: Any, where: str = "`adapter=f` (`data=DataOptions(adapter=f)` in a repair)"
) -> str:
    """Returns a hint: code of an adapter for the batch, with guessed fields. `where` tells how to
    pass the adapter.
    """
    tensors = [part for part in _parts(raw) if isinstance(part.value, Tensor)]
    future = [x for x in tensors if x.name.lower() in FUTURE_KEYS]
    classes = [
        x for x in tensors if x.value.ndim == 1 and x.value.dtype in (torch.int64, torch.int32)
    ]
    truth = next(iter([*future, *classes[-1:], *tensors[-1:]]), None)
    rest = [part for part in tensors if part is not truth]
    given = next(
        (part for part in rest if part.value.is_floating_point()), rest[0] if rest else None
    )
    return (
        f"pass {where}, with the right fields for these:\n"
        "    def f(batch):\n"
        "        args, kwargs = ("
        + (given.path if given else "INPUT")
        + ",), {}  # what the model is called with\n"
        "        return args, kwargs, "
        + (truth.path if truth else "TARGET")
        + "  # and the truth of each sample"
    )


def _parts(value: Any, path: str = "batch", name: str = "batch", depth: int = 0) -> Iterator[_Part]:
    yield _Part(path, name, depth, value)
    if depth < MAX_STRUCTURE_DEPTH:
        for inner_path, inner_name, inner in _items(value, path):
            yield from _parts(inner, inner_path, inner_name, depth + 1)


def _items(value: Any, path: str) -> list[tuple[str, str, Any]]:
    named = fields_of(value)
    if named is not None:
        by_key = isinstance(value, Mapping)
        return [
            (f"{path}[{key!r}]" if by_key else f"{path}.{key}", str(key), x)
            for key, x in named.items()
        ]
    if isinstance(value, (list, tuple)):
        # Of long lists, such as lists with one item per sample, the first items are enough.
        most = len(value) if len(value) <= 2 * MAX_SHOWN_ITEMS else MAX_SHOWN_ITEMS
        return [(f"{path}[{i}]", f"[{i}]", x) for i, x in enumerate(value[:most])]
    return []


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (bool, int, float)) or value is None:
        return repr(value)
    length = f" of {len(value)}" if isinstance(value, (list, tuple, str, Mapping)) else ""
    return f"{type(value).__name__}{length}"


@dataclass(frozen=True)
class ForwardSignature:
    """Names of the parameters of a model's forward, without `*args` and `**kwargs`."""

    names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()  # names of the parameters without a default
    takes_mapping: bool = (
        False  # True if the only required parameter is annotated as a mapping or named `batch`
    )
    takes_keywords: bool = False  # True if forward has `**kwargs`

    @classmethod
    def of(cls, module: nn.Module) -> ForwardSignature | None:
        """Inspects a module's forward. Returns None if it takes `*args`, as in wrappers, or has no
        signature.
        """
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):
            return None
        kinds = {p.kind for p in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return None
        own = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        required = [p for p in own if p.default is inspect.Parameter.empty]
        return cls(
            tuple(p.name for p in own),
            tuple(p.name for p in required),
            len(required) == 1 and _is_whole_batch(required[0]),
            inspect.Parameter.VAR_KEYWORD in kinds,
        )


def bind_adapter(adapter: Adapter, module: nn.Module) -> Adapter:
    """Binds `unpack` to the signature of a module's forward, and a `ModelAdapter` to the module.
    Keeps others.
    """
    if adapter is unpack:
        return partial(unpack, signature=ForwardSignature.of(module))
    adapter = as_adapter(adapter)
    return replace(adapter, model=module) if isinstance(adapter, ModelAdapter) else adapter


def unpack(raw: Any, signature: ForwardSignature | None = None) -> Unpacked:
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
        if len(named) == 1 and _is_batch(inner := next(iter(named.values()))):
            return unpack(inner, signature)
        return _unpack_named(raw, named, signature)
    if isinstance(raw, Sequence) and not isinstance(raw, (str, bytes)) and len(raw) >= 2:
        return _unpack_sequence(raw, signature)
    raise _unknown_structure(
        raw, f"a batch of type {type(raw).__name__} is neither (x, y, *extras) nor a mapping"
    )


def _named(raw: Any) -> Mapping[str, Any] | None:
    """Returns the fields of a batch. Returns None for sequences, also for a named tuple without a
    target key.
    """
    named = fields_of(raw)
    return (
        None if named is None or (isinstance(raw, tuple) and _target_key(named) is None) else named
    )


def _unpack_named(
    raw: Any, named: Mapping[str, Any], signature: ForwardSignature | None
) -> Unpacked:
    names, key = sorted(map(str, named)), _target_key(named)
    if key is None:
        raise _unknown_structure(
            raw, f"a batch with the keys {names} lacks a target key: {list(TARGET_KEYS)}"
        )
    target = _only_value(named[key])
    rest = {name: value for name, value in named.items() if name != key}
    inner = _only_value(rest)
    nested = (
        isinstance(inner, Mapping)
        and inner is not rest
        and not (signature and set(rest) <= set(signature.names))
    )
    if nested:
        raw, rest = inner, dict(inner)
    tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    if signature is not None:
        own = {name: rest[name] for name in signature.names if name in rest}
        if key in signature.required:
            own[key] = target
        takes_one = len(signature.required) == 1
        if takes_one and (isinstance(raw, Graphs) or (signature.takes_mapping and not own)):
            return (raw,), {}, target
        if own and set(signature.required) <= set(own):
            given = own | (tensors if signature.takes_keywords else {})
            return (tuple(given.values()), {}, target) if len(given) == 1 else ((), given, target)
        if signature.takes_keywords and not signature.required and tensors:
            return (), tensors, target
        if takes_one and len(tensors) == 1:
            return tuple(tensors.values()), {}, target
    usual = next((name for name in INPUT_KEYS if name in rest), None)
    if isinstance(raw, Graphs):
        return (raw,), {}, target
    if usual is not None:
        return (rest[usual],), {}, target
    if nested or (signature is not None and len(signature.required) == 1):
        return (raw,), {}, target
    if not tensors:
        raise _unknown_structure(
            raw, f"a batch with the keys {names} has no tensor besides the target"
        )
    return (), tensors, target


def _unpack_sequence(raw: Sequence[Any], signature: ForwardSignature | None) -> Unpacked:
    x, y = raw[0], _only_value(raw[1])
    if signature is None:
        return (x,), {}, y
    least, most = len(signature.required), len(signature.names)
    if isinstance(x, Mapping) and not signature.takes_mapping:
        named = {
            name: x[name]
            for name in (x if signature.takes_keywords else signature.names)
            if name in x
        }
        if named and set(signature.required) <= set(named):
            return (), named, y
    if least > 1 and isinstance(x, (list, tuple)) and least <= len(x) <= most:
        return tuple(x), {}, y
    if least > 1 and len(raw) > least:
        return tuple(raw[:least]), {}, raw[least]
    return (x,), {}, y


def _only_value(target: Any) -> Any:
    return (
        next(iter(target.values())) if isinstance(target, Mapping) and len(target) == 1 else target
    )


def _target_key(named: Mapping[str, Any]) -> str | None:
    lower = {str(key).lower(): key for key in reversed(list(named))}
    return next((lower[key] for key in TARGET_KEYS if key in lower), None)


def _is_batch(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) > 1
    return is_pair or (not isinstance(value, Tensor) and _named(value) is not None)


def _is_whole_batch(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kind = text.partition("[")[0].rpartition(".")[2]
    return parameter.name == "batch" or kind in (
        "dict",
        "Dict",
        "Mapping",
        "MutableMapping",
        "BatchEncoding",
    )


def _unknown_structure(raw: Any, problem: str) -> ConfigurationError:
    return ConfigurationError(f"`adapter`: {problem}.\n{describe(raw)}", adapter_hint(raw))


@dataclass(frozen=True)
class _AdapterCall(ModelCall):
    adapt: Callable[[nn.Module, Any], tuple[Any, Any]]

    def __call__(self, model: nn.Module, raw: Any) -> Any:
        return _pair(self.adapt(model, raw))[0]


@dataclass(frozen=True)
class ModelAdapter:
    """Adapter that runs the model itself: `adapt(module, batch) -> (logits, target)`.

    Each time a batch is read, `adapt` runs one extra time, without gradients, to get the target.
    """

    adapt: Callable[[nn.Module, Any], tuple[Any, Any]]
    model: nn.Module | None = None  # set by `bind_adapter`

    def __call__(self, raw: Any) -> Unpacked:
        if self.model is None:
            raise ConfigurationError(
                "`adapter`: inputs are needed here, which f(module, batch) -> (logits, target) does not return.",
                "give f(batch) -> (args, kwargs, target).",
            )
        with torch.no_grad(), preserve_state(self.model):
            _, target = _pair(self.adapt(self.model, raw))
        return (_AdapterCall(self.adapt), raw), {}, target


def as_adapter(function: Callable[..., Any]) -> Adapter:
    """Returns an adapter for a function: a `ModelAdapter` for f(module, batch), the function itself
    for f(batch).
    """
    if isinstance(function, nn.Module):
        hint = (
            "pass a function f(batch) -> (args, kwargs, target); pass an old model as `reference=`."
        )
        raise ConfigurationError(f"`adapter`: {type(function).__name__} is a model.", hint)
    return ModelAdapter(function) if required_parameters(function) == 2 else function


def required_parameters(function: Callable[..., Any]) -> int:
    """Counts positional parameters without a default. Returns 0 for a function without a signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _pair(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigurationError(
            f"`adapter`: f(module, batch) returned {type(found).__name__}, not (logits, target).",
            ADAPTER_HINT,
        )
    return found
