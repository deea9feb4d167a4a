"""What takes a batch apart where the user says nothing: by its names, its order and what the model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.batch_structure import Graphs, adapter_hint, describe, fields_of
from lightning_nrl.data.model_call import bound
from lightning_nrl.errors import ConfigurationError

__all__ = ["INPUT_KEYS", "TARGET_KEYS", "ForwardSignature", "bind_adapter", "unpack"]

TARGET_KEYS = ("label", "labels", "target", "targets", "y", "mask", "masks")
"""Usual names of the truth. Where there are several, the first of this list is it."""

INPUT_KEYS = ("input", "inputs", "image", "images", "x", "pixel_values", "features", "data")
"""Usual names of a model's only input."""

Unpacked = tuple[tuple[Any, ...], Mapping[str, Any], Any]


@dataclass(frozen=True)
class ForwardSignature:
    """What a model's forward takes.

    Attributes:
        names: of its parameters, without `*args` and `**kwargs`.
        required: those without a default, in the same order.
        takes_mapping: whether its one parameter is a whole batch, by its annotation or because it is called `batch`.
        takes_keywords: whether any keyword argument is taken.
    """

    names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    takes_mapping: bool = False
    takes_keywords: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ForwardSignature | None:
        """That of a module; None where it takes whatever comes, as wrapped modules do."""
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):
            return None
        kinds = {p.kind for p in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return None
        own = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        required = tuple(p.name for p in own if p.default is inspect.Parameter.empty)
        return cls(
            tuple(p.name for p in own),
            required,
            len(required) == 1 and _is_whole_batch(next(p for p in own if p.name == required[0])),
            inspect.Parameter.VAR_KEYWORD in kinds,
        )


def bind_adapter(adapter: Adapter, module: nn.Module) -> Adapter:
    """An adapter for one module: `unpack` with what its forward takes, one that runs the module with it (`bound`)."""
    if adapter is unpack:
        return partial(unpack, signature=ForwardSignature.of(module))
    return bound(adapter, module)


def unpack(raw: Any, signature: ForwardSignature | None = None) -> Unpacked:
    """The default adapter: takes `(x, y, *extras)`, mappings, named tuples, data classes and graphs.

    In `(x, y, *extras)` x may be a tuple of several inputs, which are as many arguments if forward takes so many.

    Where there are names, the truth is the first of `TARGET_KEYS`. A forward with one parameter gets the field of its
    name, or the one of `INPUT_KEYS`, or the only tensor; the whole batch if its annotation is a mapping, if it is
    called `batch`, or if nothing else suits. A forward with several gets the fields of their names. `**kwargs` get
    every tensor but the truth. Inputs may be nested (`{"inputs": {...}, "targets": ...}`), and so may the batch
    (`{"batch": ...}`).

    Args:
        raw: a batch as a data loader gives it.
        signature: of the model's forward, if it is known; else one usual input goes by position, or all tensors do by
            their names.

    Returns:
        `(args, kwargs, target)`.

    Raises:
        ConfigurationError: the batch has no shape that is known here.
    """
    named = _named(raw)
    if named is not None:
        if len(named) == 1 and _is_batch(inner := next(iter(named.values()))):
            return unpack(inner, signature)
        return _unpack_named(raw, named, signature)
    if isinstance(raw, Sequence) and not isinstance(raw, (str, bytes)) and len(raw) >= 2:
        return _unpack_sequence(raw, signature)
    raise _unknown(raw, f"a batch of type {type(raw).__name__} is neither (x, y, *extras) nor a mapping")


def _named(raw: Any) -> Mapping[str, Any] | None:
    """The fields of a batch; a named tuple without a usual name of the truth, such as a plain pair, is a sequence."""
    named = fields_of(raw)
    return None if named is None or (isinstance(raw, tuple) and _target_key(named) is None) else named


def _unpack_named(raw: Any, named: Mapping[str, Any], signature: ForwardSignature | None) -> Unpacked:
    names, key = sorted(map(str, named)), _target_key(named)
    if key is None:
        raise _unknown(raw, f"a batch with the keys {names} lacks a target key: {list(TARGET_KEYS)}")
    target = _only_value(named[key])
    rest = {name: value for name, value in named.items() if name != key}
    inner = _only_value(rest)
    nested = isinstance(inner, Mapping) and inner is not rest and not (signature and set(rest) <= set(signature.names))
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
        raise _unknown(raw, f"a batch with the keys {names} has no tensor beside the target")
    return (), tensors, target


def _unpack_sequence(raw: Sequence[Any], signature: ForwardSignature | None) -> Unpacked:
    x, y = raw[0], _only_value(raw[1])
    if signature is None:
        return (x,), {}, y
    least, most = len(signature.required), len(signature.names)
    if isinstance(x, Mapping) and not signature.takes_mapping:
        named = {name: x[name] for name in signature.names if name in x}
        if signature.takes_keywords:
            named |= x
        if named and set(signature.required) <= set(named):
            return (), named, y
    if least > 1:
        if isinstance(x, (list, tuple)) and least <= len(x) <= most:
            return tuple(x), {}, y
        if len(raw) > least:
            return tuple(raw[:least]), {}, raw[least]
    return (x,), {}, y


def _only_value(target: Any) -> Any:
    return next(iter(target.values())) if isinstance(target, Mapping) and len(target) == 1 else target


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
    return parameter.name == "batch" or kind in ("dict", "Dict", "Mapping", "MutableMapping", "BatchEncoding")


def _unknown(raw: Any, problem: str) -> ConfigurationError:
    return ConfigurationError(f"`adapter`: {problem}.\n{describe(raw)}", adapter_hint(raw))
