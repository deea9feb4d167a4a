"""Which of two models answers where they disagree: the new one where its logits leave no doubt, else the old one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.errors import ConfigurationError, check_kind

__all__ = [
    "UNKNOWN",
    "Classes",
    "MarginSwitch",
    "SwitchRule",
    "TwoModels",
    "check_logits",
    "checked_classes",
    "margin_over",
    "predicts",
]

UNKNOWN = -1e4
"""The old model's logit for a class that it does not know. Its probability is 0 in every precision; as it is finite,
and far from the end of half precision (65,504), no NaN comes of it in a softmax, a mean or a difference of logits."""

Classes = Mapping[int, int] | Sequence[int]
"""For each class of the old model, counted from 0, its index in the new model's output."""


def margin_over(logits: Tensor, classes: Tensor) -> Tensor:
    """How far the largest logit of each sample lies above that of a given class, such as another model's prediction.

    Args:
        logits: `n x C` of any floating dtype.
        classes: `n` int64, from 0 to C - 1.

    Returns:
        `n` float32 from 0, computed in float32 or better; 0 where the class is the predicted one. NaN where a logit is
        NaN, or where the two are equal and infinite.

    Example:
        >>> margin_over(torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 4.0]]), torch.tensor([1, 2]))
        tensor([2., 0.])
    """
    exact = at_least_float32(logits)
    return (exact.amax(1) - exact.gather(1, classes.unsqueeze(1)).squeeze(1)).float()


def predicts(logits: Tensor, classes: Tensor) -> Tensor:
    """Where the largest logit is that of a given class, and none is NaN, `n` bool, from logits `n x C`."""
    return (logits.argmax(1) == classes) & ~logits.isnan().any(1)


class ClassMapping(nn.Module):
    """How the old model's classes are numbered in the new one: a buffer of indices, None where they are alike."""

    classes: Tensor | None

    def __init__(self, classes: Classes | None = None) -> None:
        super().__init__()
        index = None if classes is None else torch.tensor(checked_classes(classes))
        self.register_buffer("classes", index)
        self._needed = _needed(index)

    def mapped(self, old: Tensor, n_classes: int) -> Tensor:
        """The old logits in the order of the new ones, `n x n_classes`; `UNKNOWN` for classes that are only there."""
        if self.classes is None:
            return old
        return old.new_full((old.shape[0], n_classes), UNKNOWN).index_copy(1, self.classes, old)

    def side_by_side(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Both models' logits with the same classes, `n x C`, in the dtype that holds both.

        Raises:
            ConfigurationError: these are no logits, or their classes do not fit together.
        """
        # What is traced was checked when it first ran, and a trace must not look at numbers.
        if not torch.jit.is_tracing():
            self.check(old, new)
        dtype = torch.promote_types(old.dtype, new.dtype)
        return self.mapped(old, new.shape[1]).to(dtype), new.to(dtype)

    def check(self, old: Any, new: Any) -> None:
        """A `ConfigurationError` unless both outputs are logits, and of as many classes as they should be."""
        check_logits("old", old)
        check_logits("new", new)
        mapped = new.shape[1] if self.classes is None else self.classes.shape[0]
        if old.shape[1] != mapped or self._needed > new.shape[1]:
            given = (
                "it is not given" if self.classes is None else f"it maps {mapped}, the highest to {self._needed - 1}"
            )
            raise ConfigurationError(
                f"`classes`: the old model has {old.shape[1]} classes, the new one {new.shape[1]}, and {given}.",
                "give `classes={index in the old output: index in the new output, ...}` for every old class.",
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._needed = _needed(self.classes)


class SwitchRule(ClassMapping):
    """The decision alone, without the models: a threshold, and how classes are numbered.

    The threshold is a float32 buffer, in logits; it stays float32 when the module is converted to half precision.
    """

    threshold: Tensor

    def __init__(self, threshold: float, classes: Classes | None = None) -> None:
        super().__init__(classes)
        self.register_buffer("threshold", torch.tensor(_checked_threshold(threshold), dtype=torch.float32))

    def is_served(self, old: Tensor, new: Tensor) -> Tensor:
        """Which samples the new model answers, `n` bool, from both models' logits with the same classes, `n x C`."""
        predicted = old.argmax(1)
        return predicts(new, predicted) | (margin_over(new, predicted) > self.threshold)

    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        """The logits that are served, `n x C`, of the dtype that holds both; errors are those of `side_by_side`."""
        old, both = self.side_by_side(old, new)
        return torch.where(self.is_served(old, both).unsqueeze(1), both, old)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Half precision would round the threshold, and make a large one infinite.
        self.threshold = self.threshold.float() if exact.is_meta else exact.to(self.threshold.device)
        return self


class TwoModels(ClassMapping):
    """Two models that run on every sample, in evaluation mode whatever is asked."""

    old: nn.Module
    new: nn.Module

    def hold(self, old: nn.Module, new: nn.Module) -> None:
        """Takes the models in; a `ConfigurationError` if one of them is no module."""
        for argument, model in (("old", old), ("new", new)):
            check_kind(argument, model, isinstance(model, nn.Module), "module", f"{argument}=<an `nn.Module`>")
        self.old, self.new = old, new
        self.eval()

    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        """What is served, `n x C`, from the logits of both."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs both models, and serves logits `n x C`."""
        return self.choose(self.old(*args, **kwargs), self.new(*args, **kwargs))

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: what is served is the models in evaluation mode."""
        return super().train(False)


class MarginSwitch(SwitchRule, TwoModels):
    """Two models as one: where they disagree the new model answers if it is sure, else the old one.

    The new model is sure of a sample if its largest logit lies more than `threshold` above its logit of the class that
    the old model predicts. Where both predict the same class the new model answers: no change of class, and with
    drifted inputs the better probabilities. Both models run on every sample, so it costs the time and the memory of
    both.

    - `threshold=inf` predicts as the old model does, any threshold below 0 is exactly the new one.
    - Where the new model's logits hold NaN, the old model answers, whatever the threshold.
    - It is made for deployment: both models are put into evaluation mode, and `train()` leaves them there.
    - Nothing waits for the device, and no branch is taken on data, so it can be traced and exported.

    Args:
        old: the model in use; its forward returns logits `n x C_old`.
        new: its update, called with the same arguments; logits `n x C`.
        threshold: logits, any number but NaN; `choose_threshold` finds one. Later: `switch.threshold.fill_(1.5)`.
        classes: for each class of the old model its index in the new model's output, as a mapping or a sequence; None
            if both have the same classes. Classes that the old model does not know get the logit `UNKNOWN` from it.

    Raises:
        ConfigurationError: the threshold is no number, `classes` does not number every old class, or `old` or `new` is
            no module. When run: if the outputs are no logits, or their classes do not fit together.

    Example:
        The models disagree on both samples; the new one is sure of the first and hesitates at the second.

        >>> old, new = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = old.load_state_dict({"weight": torch.eye(2)})
        >>> _ = new.load_state_dict({"weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]])})
        >>> switch = MarginSwitch(old, new, threshold=1.0)
        >>> with torch.no_grad():
        ...     switch(torch.tensor([[3.0, 0.0], [0.5, 0.0]]))
        tensor([[0.0000, 3.0000],
                [0.5000, 0.0000]])
    """

    def __init__(self, old: nn.Module, new: nn.Module, threshold: float, classes: Classes | None = None) -> None:
        super().__init__(threshold, classes)
        self.hold(old, new)

    def extra_repr(self) -> str:
        """The threshold, for `print`."""
        return f"threshold={float(self.threshold):g}"


def check_logits(argument: str, logits: Any) -> None:
    """A `ConfigurationError` for what is no tensor of logits `n x C` with at least two classes."""
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1 and logits.is_floating_point():
        return
    found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise ConfigurationError(
        f"`{argument}`: the switch needs logits [samples, classes], found {found}.",
        "give floats, one for each of two or more classes; wrap a model whose forward returns something else.",
    )


def checked_classes(classes: Classes) -> list[int]:
    """The new index of each old class, in the order of the old ones; each needs one of its own."""
    found: list[Any] = []
    if isinstance(classes, Mapping):
        found = [classes.get(i) for i in range(len(classes))]
    elif isinstance(classes, Sequence) and not isinstance(classes, str):
        found = list(classes)
    fits = all(isinstance(index, Integral) and not isinstance(index, bool) and int(index) >= 0 for index in found)
    if not found or not fits or len(set(found)) < len(found):
        raise ConfigurationError(
            f"`classes={classes!r}` does not give each class of the old model an index of its own.",
            "give `{0: 0, 1: 2, ...}`, from each index in the old output, counted from 0, to that in the new one.",
        )
    return [int(index) for index in found]


def _checked_threshold(threshold: float) -> float:
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or math.isnan(threshold):
        raise ConfigurationError(
            f"`threshold={threshold!r}` is no number of logits.",
            "give one from 0, such as 1.0, or what `choose_threshold(...).threshold` says.",
        )
    return float(threshold)


def _needed(classes: Tensor | None) -> int:
    """How many classes the new model must have at least."""
    return 0 if classes is None or classes.is_meta else int(classes.max()) + 1
