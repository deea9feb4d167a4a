"""The number formats in which a model runs, and the effect of their rounding on margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import Context, may_use_tf32
from lightning_nrl._utils.state import device_of
from lightning_nrl.evaluation.sample_results import SampleResults

ROUNDING_FACTOR = 2.0
"""Assumed rounding error of a margin: machine epsilons times the median margin of passed samples.

In this unit, margins in bfloat16 and float16 differed from float32 by at most 2.0 (1.4 for 99 % of
samples) in digit classifiers of three and four layers, and by at most 10.0 (5.7 for 99 %) in one of
ten layers without normalisation.
"""
FLOAT32_EPS = torch.finfo(torch.float32).eps
TF32_EPS = 2.0**-10  # machine epsilon of TensorFloat-32, whose mantissa has the length of float16's
KEPT_SHARE = 0.5  # largest share of its margin that a passed sample has to keep against rounding


@dataclass(frozen=True)
class DeployedPrecision:
    """Device and number formats in which a model runs.

    Attributes:
        device: device type, such as `cpu`; for a GPU, followed by its name in parentheses.
        weights: dtypes of the parameters: integer dtypes first, then floating-point dtypes from
            fine to coarse.
        autocast: dtype of mixed precision; an empty string if autocast is off.
        tf32: True if the device may round float32 to TensorFloat-32.
        cudnn_deterministic: True if cuDNN uses only deterministic kernels; False if the device is
            no GPU.
        cudnn_benchmark: True if cuDNN chooses kernels by benchmarks; False if the device is no GPU.
    """

    device: str
    weights: tuple[str, ...]
    autocast: str = ""
    tf32: bool = False
    cudnn_deterministic: bool = False
    cudnn_benchmark: bool = False

    @classmethod
    def of(cls, model: nn.Module, context: Context) -> DeployedPrecision:
        dtypes = {p.dtype for p in model.parameters()}
        weights = tuple(_name(dtype) for dtype in sorted(dtypes, key=_fineness))
        device = device_of(model)
        autocast = ""
        with context():
            has_autocast = torch.amp.is_autocast_available(device.type)
            if has_autocast and torch.is_autocast_enabled(device.type):
                autocast = _name(torch.get_autocast_dtype(device.type))
        if device.type != "cuda":
            return cls(device.type, weights, autocast)
        return cls(
            f"cuda ({torch.cuda.get_device_name(device)})",
            weights,
            autocast,
            tf32=may_use_tf32(_calls_cudnn(model)) and torch.float32 in dtypes,
            cudnn_deterministic=torch.backends.cudnn.deterministic,
            cudnn_benchmark=torch.backends.cudnn.benchmark,
        )

    @property
    def eps(self) -> float:
        """Machine epsilon of the coarsest number format in use."""
        eps = TF32_EPS if self.tf32 else 0.0
        for name in filter(None, (*self.weights, self.autocast)):
            eps = max(eps, _eps(getattr(torch, name)))
        return eps or FLOAT32_EPS

    def __str__(self) -> str:
        weights = " and ".join(self.weights) or "no weights"
        text = f"{weights} on {self.device}"
        if self.autocast:
            text += f", autocast to {self.autocast}"
        if self.tf32:
            text += ", TF32 allowed"
        if self.cudnn_deterministic:
            text += ", cuDNN deterministic"
        if self.cudnn_benchmark:
            text += ", cuDNN benchmark"
        return text


def rounding_margin(precision: DeployedPrecision, before: SampleResults) -> float | None:
    """Estimates the error of margins by `ROUNDING_FACTOR`.

    Returns None if no passed sample has a finite margin.
    """
    margin = before.margin[before.passed & before.margin.isfinite()]
    if not len(margin):
        return None
    return ROUNDING_FACTOR * precision.eps * max(0.0, float(margin.median()))


def coarse_rounding(precision: DeployedPrecision, before: SampleResults) -> float:
    """Returns `rounding_margin`, or 0 without one or if `precision` is no coarser than float32."""
    if precision.eps <= FLOAT32_EPS:
        return 0.0
    return rounding_margin(precision, before) or 0.0


def rounding_reserve(precision: DeployedPrecision, before: SampleResults) -> Tensor | None:
    """Computes the margins, shape `N`, that make samples safe from rounding after a repair.

    A targeted sample needs r = `coarse_rounding`. A passed sample needs r or half of its own
    margin, whichever is smaller. Other failed samples need no margin. Returns None if r is 0.
    """
    rounding = coarse_rounding(precision, before)
    if not rounding:
        return None
    kept = (KEPT_SHARE * before.margin).nan_to_num(0.0).clamp(0, rounding)
    return torch.where(before.passed, kept, torch.where(before.targeted, rounding, 0.0))


def _calls_cudnn(model: nn.Module) -> bool:
    has_convolutions = any(p.ndim > 2 for p in model.parameters())
    return has_convolutions or any(isinstance(m, nn.RNNBase) for m in model.modules())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _fineness(dtype: torch.dtype) -> tuple[float, str]:
    return _eps(dtype), str(dtype)
