"""How much each weight matters for some data: backward and forward impacts (paper, section II.1, step i).

A zero that asks for its gradient is added to the output of each layer to be repaired. The loss gradient of these
zeros and the layers' inputs give every weight's gradient, whether or not the weights ask for one themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from lightning_nrl.collective import Collective
from lightning_nrl.errors import ConfigurationError, EvidenceError, ReplayError, explain
from lightning_nrl.localization.layers import (
    absolute_input,
    bias_gradients,
    by_sample,
    positions,
    weight_gradient,
    weight_gradients,
)
from lightning_nrl.localization.localization import Impact
from lightning_nrl.sites import Site, WeightSpace
from lightning_nrl.tasks import Task, at_least_float32

__all__ = ["Aggregation", "Replay", "check_aggregation", "measure"]

Aggregation = Literal["mean_gradient", "per_sample"]
"""How many gradients become one backward impact: |their mean|, or the mean of each sample's |gradient|."""

PIECE = 2**24
"""Most gradient entries (samples x weights) that are held at once when each sample has its own."""


CHUNK = 256
"""Most samples whose gradients are computed at once, as in a training step."""


class Replay(Protocol):
    """What is needed of a recording: known data in chunks, and the model run on them with layers' outputs replaced."""

    def chunks(self, size: int | None = None) -> Iterable[Any]:
        """This rank's data, at most `size` samples each, with `rows` (`n` int64, rows of the evidence) and `target`."""
        ...

    @property
    def space(self) -> WeightSpace:
        """The layers to be repaired."""
        ...

    def replay(self, chunk: Any, edit: Callable[[Site, Tensor, Tensor], Tensor], copies: int = 1) -> Tensor:
        """The logits of a chunk when `edit(site, input, output)` replaces the output of each layer."""
        ...


def check_aggregation(aggregation: str) -> None:
    """Refuses an unknown aggregation.

    Raises:
        ConfigurationError: it is not one of `Aggregation`.
    """
    if aggregation not in get_args(Aggregation):
        raise ConfigurationError(
            explain(f"`aggregation={aggregation!r}` is unknown.", f"choose one of {list(get_args(Aggregation))}.")
        )


def measure(
    recording: Replay,
    task: Task,
    rows_mask: Tensor,
    *,
    aggregation: Aggregation = "mean_gradient",
    collective: Collective | None = None,
) -> Impact:
    """Backward and forward impact of every weight on the marked samples (paper, section II.1, step i).

    Backward is `dL/dw_ij = dL/do_j * do_j/dw_ij`: the absolute value of its mean over samples, or the mean of its
    absolute value. Forward is `o_i * w_ij`: the mean of its absolute value. A convolution's weight meets many inputs:
    its gradient is the sum over positions, its forward impact the mean over samples and positions, padding included.
    A bias passes on itself. Ranks add up their sums, so it does not matter how the samples were dealt out.

    Args:
        recording: the model on the known data of this rank.
        task: gives each sample's loss.
        rows_mask: `N` bool, the samples to measure on, by row of the evidence.
        aggregation: how the gradients of many samples become one number.
        collective: the ranks that share the data.

    Returns:
        Impacts in the order of the weight space, on its device, in float64 (float32 where the device has no float64).

    Raises:
        ConfigurationError: an unknown aggregation.
        EvidenceError: no sample is marked on any rank, or an impact is not finite.
        ReplayError: a layer is never called, or the first dimension of its input is not that of the samples.
    """
    check_aggregation(aggregation)
    space = recording.space
    sums = _Sums.zeros(space)
    with _deterministic():
        for chunk in recording.chunks(CHUNK):
            marked = rows_mask[chunk.rows.to(rows_mask.device)].nonzero().squeeze(1)
            if len(marked):
                _add(sums, recording, chunk, task, marked.to(space.device), aggregation)
    return _mean(space, _Sums.of(space, (collective or Collective()).sum(sums.flat)))


class _Sums(NamedTuple):
    """Sums over samples as views of one flat tensor, so that ranks add them up in one exchange."""

    flat: Tensor
    gradient: Tensor  # W, of gradients or of their absolute values
    input: Tensor  # W, of the absolute value that each weight is multiplied with
    positions: Tensor  # one a site: how many such values there were
    strayed: Tensor  # one a site: in how many chunks unmarked samples got a gradient
    samples: Tensor  # 1

    @classmethod
    def of(cls, space: WeightSpace, flat: Tensor) -> _Sums:
        sites = len(space.sites)
        return cls(flat, *flat.split([space.size, space.size, sites, sites, 1]))

    @classmethod
    def zeros(cls, space: WeightSpace) -> _Sums:
        wide = torch.float32 if space.device.type == "mps" else torch.float64
        size = 2 * space.size + 2 * len(space.sites) + 1
        return cls.of(space, torch.zeros(size, dtype=wide, device=space.device))


class _Call(NamedTuple):
    """One call of a layer: its input and its output's loss gradient, `m x p x ...` in at least float32."""

    input: Tensor
    gradient: Tensor


def _add(sums: _Sums, recording: Replay, chunk: Any, task: Task, marked: Tensor, aggregation: Aggregation) -> None:
    """Adds the marked samples of one chunk to the sums."""
    calls, strayed = _trace(recording, chunk, task, marked)
    sums.samples.add_(len(marked))
    sums.strayed.add_(strayed)
    with _no_autocast(marked.device):
        for i, site in enumerate(recording.space.sites):
            here = slice(site.offset, site.offset + site.size)
            sums.gradient[here] += _gradient_sum(site, calls[i], aggregation)
            for call in calls[i]:
                count = positions(site.module, call.gradient)
                one = call.input.new_full(site.weight_shape[:1], count)
                sums.input[here] += _flat(site, absolute_input(site.module, call.input), one)
                sums.positions[i] += count


def _trace(recording: Replay, chunk: Any, task: Task, marked: Tensor) -> tuple[list[list[_Call]], Tensor]:
    """Calls of each site on the marked samples of a chunk, and at which sites unmarked samples got a gradient too."""
    n, sites = len(chunk.rows), recording.space.sites
    seen: list[tuple[int, Tensor, Tensor]] = []

    def add_zero(site: Site, x: Tensor, output: Tensor) -> Tensor:
        if len(x) % n or len(output) % n:
            raise _not_by_sample(site, f"its input is {list(x.shape)} for {n} samples")
        zero = torch.zeros_like(output, requires_grad=True)
        # A copy, since the model may go on to change its own tensors in place.
        mine = by_sample(site.module, x.detach(), n).index_select(0, marked)
        seen.append((sites.index(site), mine, zero))
        return output + zero

    with torch.enable_grad():
        loss = task.loss(recording.replay(chunk, add_zero), chunk.target)[marked].sum()
    if seen and not loss.requires_grad:
        names = [sites[i].name for i, _, _ in seen]
        raise ReplayError(
            explain(
                f"`layer`: the loss has no gradient with respect to the outputs of {names}.",
                "the model's forward must neither detach what these layers return nor run under `torch.no_grad()`.",
            )
        )
    zeros = [zero for _, _, zero in seen]
    gradients = torch.autograd.grad(loss, zeros, materialize_grads=True) if seen else ()
    calls: list[list[_Call]] = [[] for _ in sites]
    strayed = torch.zeros(len(sites), dtype=torch.bool, device=marked.device)
    for (i, x, _), gradient in zip(seen, gradients, strict=True):
        gradient = by_sample(sites[i].module, gradient, n)
        strayed[i] |= (gradient.index_fill(0, marked, 0).abs() > 0).any()
        calls[i].append(_Call(at_least_float32(x), at_least_float32(gradient.index_select(0, marked))))
    return calls, strayed


def _gradient_sum(site: Site, calls: Sequence[_Call], aggregation: Aggregation) -> Tensor:
    """Sum over samples of the gradient of a site's weights over all its calls, or of that gradient's absolute value."""
    layer = site.module
    total = torch.zeros(site.size, dtype=torch.float32, device=layer.weight.device)
    if aggregation == "per_sample" and isinstance(layer, nn.Linear) and [c.input.shape[1] for c in calls] == [1]:
        # Of one position, |g_j * x_i| = |g_j| * |x_i|: no sample needs a gradient of its own.
        calls, aggregation = [_Call(calls[0].input.abs(), calls[0].gradient.abs())], "mean_gradient"
    if aggregation == "mean_gradient":
        for x, g in calls:
            total = total + _flat(site, weight_gradient(layer, x, g), bias_gradients(g).sum(0))
        return total
    m, step = len(calls[0].input) if calls else 0, max(1, PIECE // site.size)
    for start in range(0, m, step):
        pieces = [(x[start : start + step], g[start : start + step]) for x, g in calls]
        weight = torch.stack([weight_gradients(layer, x, g) for x, g in pieces]).sum(0)
        bias = torch.stack([bias_gradients(g) for _, g in pieces]).sum(0)
        total = total + _flat(site, weight.abs().sum(0), bias.abs().sum(0))
    return total


def _flat(site: Site, weight: Tensor, bias: Tensor) -> Tensor:
    """A site's part of the flat vector."""
    return torch.cat([weight.flatten(), bias]) if len(site.parameters) > 1 else weight.flatten()


def _mean(space: WeightSpace, sums: _Sums) -> Impact:
    """Impacts from the sums over all samples of all ranks."""
    if not sums.samples.item():
        raise EvidenceError(
            explain("`rows_mask` marks no sample to measure impacts on.", "mark at least one sample on one rank.")
        )
    for site, count, strayed in zip(space.sites, sums.positions.tolist(), sums.strayed.tolist(), strict=True):
        if not count:
            raise ReplayError(
                explain(
                    f"`layer={site.name!r}` is never called when the model runs.",
                    "name a layer whose own forward is called; attention uses the weights of its `out_proj` directly.",
                )
            )
        if strayed:
            raise _not_by_sample(site, "the losses of other samples reach into the chosen ones")
    size = torch.tensor([site.size for site in space.sites], device=sums.flat.device)
    backward = sums.gradient.abs() / sums.samples
    forward = sums.input / sums.positions.repeat_interleave(size) * space.flat().to(sums.flat).abs()
    if not bool((backward + forward).isfinite().all()):
        raise EvidenceError(
            explain(
                "`layer`: impacts are not finite.",
                "look for samples with a NaN or infinite loss, or for gradients that overflow half precision.",
            )
        )
    return Impact(backward, forward, int(sums.samples))


def _not_by_sample(site: Site, found: str) -> ReplayError:
    return ReplayError(
        explain(
            f"`layer={site.name!r}` does not have samples as the first dimension: {found}.",
            "name a layer whose input is [samples, ...], or [samples * positions, ...] sample by sample.",
        )
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same impacts in every run: cuDNN's faster kernels add in any order, and near-ties in rank would turn."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums in full width, also where the model itself is deployed in mixed precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
