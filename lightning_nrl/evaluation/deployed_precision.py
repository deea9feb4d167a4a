"""The number formats in which a model runs, and the effect of their rounding on margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import Context, may_use_tf32
from lightning_nrl.evaluation.sample_results import SampleResults

ROUNDING_FACTOR = 2.0
"""Assumed rounding error of a margin, in units of machine epsilon times the median margin of passed
samples. In this unit, margins in bfloat16 and float16 differed from float32 by at most 2.0 (1.4 for
99 % of samples) in digit classifiers of three and four layers, and by at most 10.0 (5.7 for 99 %)
in one of ten layers without normalisation."""
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
        found = {p.dtype for p in model.parameters()}
        kinds = sorted(
            found,
            key=lambda dtype: (
                torch.finfo(dtype).eps if dtype.is_floating_point else -1,
                str(dtype),
            ),
        )
        weights = tuple(map(_name, kinds))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with context():
            is_mixed = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
                device.type
            )
            autocast = _name(torch.get_autocast_dtype(device.type)) if is_mixed else ""
        if device.type != "cuda":
            return cls(device.type, weights, autocast)
        flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        name = f"cuda ({torch.cuda.get_device_name(device)})"
        return cls(
            name,
            weights,
            autocast,
            may_use_tf32(_calls_cudnn(model)) and torch.float32 in found,
            *flags,
        )

    @property
    def eps(self) -> float:
        """Machine epsilon of the coarsest number format in use."""
        dtypes = [getattr(torch, name) for name in (*self.weights, self.autocast) if name]
        found = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
        return max(
            [*found, *([TF32_EPS] if self.tf32 else [])], default=torch.finfo(torch.float32).eps
        )

    def __str__(self) -> str:
        notes = {
            f"autocast to {self.autocast}": self.autocast,
            "TF32 allowed": self.tf32,
            "cuDNN deterministic": self.cudnn_deterministic,
            "cuDNN benchmark": self.cudnn_benchmark,
        }
        where = f"{' and '.join(self.weights) or 'no weights'} on {self.device}"
        return ", ".join([where, *(note for note, applies in notes.items() if applies)])


def rounding_margin(precision: DeployedPrecision, before: SampleResults) -> float | None:
    """Estimates the error of margins by `ROUNDING_FACTOR`. Returns None if no passed sample has a
    finite margin.
    """
    margin = before.margin[before.passed & before.margin.isfinite()]
    return (
        None
        if not len(margin)
        else ROUNDING_FACTOR * precision.eps * max(0.0, float(margin.median()))
    )


def coarse_rounding(precision: DeployedPrecision, before: SampleResults) -> float:
    """Returns `rounding_margin`. Returns 0 if that is None or if `precision` is no coarser than
    float32.
    """
    return (
        (rounding_margin(precision, before) or 0.0)
        if precision.eps > torch.finfo(torch.float32).eps
        else 0.0
    )


def rounding_reserve(precision: DeployedPrecision, before: SampleResults) -> Tensor | None:
    """Computes the margin, shape `N`, that each sample must have after a repair to be safe from
    rounding.

    A targeted sample needs r = `coarse_rounding`. A passed sample needs r or half of its own
    margin, whichever is smaller. Other failed samples need no margin. Returns None if r is 0.
    """
    rounding = coarse_rounding(precision, before)
    if not rounding:
        return None
    kept = (KEPT_SHARE * before.margin).nan_to_num(0.0).clamp(0, rounding)
    return torch.where(before.passed, kept, torch.where(before.targeted, rounding, 0.0))


def _calls_cudnn(model: nn.Module) -> bool:
    return any(p.ndim > 2 for p in model.parameters()) or any(
        isinstance(m, nn.RNNBase) for m in model.modules()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
