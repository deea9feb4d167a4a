"""Where weights live: the layers to be repaired, seen as one flat vector of weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrl.errors import ConfigurationError, explain

__all__ = ["Site", "WeightSpace", "find_sites"]

REPAIRABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Site:
    """One layer to be repaired.

    Attributes:
        name: its dotted name in the model; empty if the model itself is the layer.
        module: the live layer.
        offset: where its weights start in the flat vector.
        include_bias: whether its bias is part of the vector, behind its weight.
    """

    name: str
    module: nn.Module
    offset: int
    include_bias: bool = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its repairable parameters by dotted name, in the order of the flat vector."""
        prefix = f"{self.name}." if self.name else ""
        found: dict[str, nn.Parameter] = {f"{prefix}weight": self.module.weight}  # type: ignore[dict-item]
        if self.include_bias and self.module.bias is not None:
            found[f"{prefix}bias"] = self.module.bias  # type: ignore[assignment]
        return found

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def weight_shape(self) -> torch.Size:
        """`out x in/groups x kernel...`, for a Linear `out x in`."""
        return self.module.weight.shape  # type: ignore[return-value]


@dataclass(frozen=True)
class WeightSpace:
    """All sites as one flat vector of `size` weights: for each site its weight in memory order, then its bias if it is included."""

    sites: tuple[Site, ...]

    @property
    def size(self) -> int:
        return sum(site.size for site in self.sites)

    @property
    def device(self) -> torch.device:
        return self.sites[0].module.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights as deployed."""
        return self.sites[0].module.weight.dtype  # type: ignore[return-value]

    def flat(self) -> Tensor:
        """A detached copy of the live weights, `size`."""
        return torch.cat([p.detach().flatten() for site in self.sites for p in site.parameters.values()])

    def changed(self, where: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Whole parameters by dotted name with the weights at flat positions `where` (`K` int64) set to `values` (`K`).

        The live parameters are not touched. The result suits `torch.func.functional_call` and `write`.
        """
        flat = self.flat()
        flat[where.to(flat.device)] = values.to(flat.device, flat.dtype)
        out, at = {}, 0
        for site in self.sites:
            for name, parameter in site.parameters.items():
                out[name] = flat[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()
        return out

    @torch.no_grad()
    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies whole parameters into the live model."""
        for site in self.sites:
            for name, parameter in site.parameters.items():
                parameter.copy_(parameters[name])


def find_sites(model: nn.Module, layer: str | Sequence[str] = "auto", *, include_bias: bool = False) -> WeightSpace:
    """Resolves layer names.

    Args:
        model: the model whose layers are meant.
        layer: a dotted name, several of them, or `auto`: the last Linear in the order of registration.
        include_bias: whether biases may be changed too.

    Raises:
        ConfigurationError: an unknown name (the nearest ones are given), a kind that cannot be repaired, a name twice, a lazy
            or quantised layer, layers of several dtypes or devices.
    """
    modules = dict(model.named_modules())
    names = [layer] if isinstance(layer, str) else list(layer)
    if names == ["auto"]:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ConfigurationError(
                explain("`layer='auto'` found no Linear layer.", f"name one of {_repairable(modules)} with `layer=`.")
            )
        names = [linear[-1]]
    if not names or len(set(names)) != len(names):
        raise ConfigurationError(explain(f"`layer={layer!r}` names no layer or one twice.", "name each layer once."))
    sites: list[Site] = []
    offset = 0
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.3) or _repairable(modules)
            raise ConfigurationError(
                explain(f"`layer={name!r}` is not in the model.", f"the nearest names are {near}.")
            )
        module = modules[name]
        if not isinstance(module, REPAIRABLE):
            inside = _repairable(dict(module.named_modules(prefix=name)))
            raise ConfigurationError(
                explain(
                    f"`layer={name!r}` is a {type(module).__name__}, which cannot be repaired.",
                    f"name a Linear or Conv1d/2d/3d{', such as ' + str(inside) if inside else ''}.",
                )
            )
        if isinstance(module.weight, nn.parameter.UninitializedParameter) or not module.weight.is_floating_point():
            raise ConfigurationError(
                explain(
                    f"`layer={name!r}` has no floating-point weight yet (lazy or quantised).",
                    "run one batch through a lazy model first; repair before quantising.",
                )
            )
        site = Site(name, module, offset, include_bias)
        offset += site.size
        sites.append(site)
    kinds = {(site.module.weight.dtype, site.module.weight.device) for site in sites}
    if len(kinds) > 1:
        raise ConfigurationError(
            explain(
                f"`layer={layer!r}` spans several dtypes or devices: {sorted(map(str, kinds))}.",
                "repair them one by one.",
            )
        )
    return WeightSpace(tuple(sites))


def _repairable(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, REPAIRABLE)][-5:]
